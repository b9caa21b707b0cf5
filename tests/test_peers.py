"""Cases that broke other libraries when they were tried.

Elsewhere: a loss on some leaves, z0 and closed-over tracers of the reversible gradient are in
`adjoints/test_reversible.py`, of the implicit one in `adjoints/test_implicit.py`; what `beta=1` and
`tol=0` mean, in `test_fixed_point.py` (`test_beta_refused`, `test_fixed_depth`); a tolerance that
recompiles and `shard_map` in `test_transforms.py`; a subclass of a reversible solver in
`adjoints/test_reversible.py::test_another_solver_is_refused`; memory under vmap in
`adjoints/test_exact.py`; a batch that stops with its worst example in
`test_conformance_outcomes.py::test_mixed_batch`.
"""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from dense import dense, tree
from problems import relative_error
from registry import ADJOINTS, SOLVERS

import deqjax
from deqjax import RESULTS

from bench import problems as _p


@pytest.mark.x64
@pytest.mark.parametrize("name", ADJOINTS)
def test_aux_closed_over_tracers_and_a_loss_on_some_leaves(name):
    """All at once, with a z0 made of parameters; "exact" to the digits of a float64."""
    way = ADJOINTS[name]
    solver, adjoint = SOLVERS[way.solver](1e-12), way.adjoint(1e-12)
    (d,) = tree()
    # The cotangent of a loss of leaf "b" alone, in which aux has its part.
    g = d.g | {"a": np.zeros(3)}
    d = d._replace(g=g)
    p = d.problem.astype(jnp.float64)
    one, two = map(jnp.asarray, g["b"])

    def loss(args, _):
        fn = lambda z, _: (p.fn(z, args), {"twice": 2 * z["b"][0], "step": jnp.asarray(3)})
        z0 = jax.tree.map(lambda z: z + jnp.sum(args[1]), p.z0)
        sol = deqjax.fixed_point(fn, solver, z0, has_aux=True, max_steps=400, adjoint=adjoint)
        assert sol.aux["step"].dtype == jnp.int64
        return jnp.vdot(one, sol.aux["twice"]) / 2 + jnp.vdot(two, sol.value["b"][1])

    grad = jax.jit(jax.grad(loss))(p.args, None)
    assert relative_error(grad, way.promised(d)) < 1e-8


@pytest.mark.parametrize("name", ["anderson", "broyden", "picard"])
def test_zero_tolerance_and_zero_steps_are_what_they_say(name):
    fn = lambda z, _: jnp.cos(z)
    run = lambda **options: deqjax.fixed_point(fn, SOLVERS[name](0.0), jnp.ones(3), **options)
    sol = run(max_steps=9)
    assert int(sol.stats["num_steps"]) == 9
    assert sol.result == RESULTS.successful
    assert not bool(jnp.any(sol.value == 1.0))
    still = run(max_steps=9, steps=0)
    assert bool(jnp.all(still.value == 1.0))
    np.testing.assert_allclose(still.stats["residual"], 1 / np.cos(1.0) - 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["phantom", "shine"])
def test_a_loss_of_statistics_is_refused_or_right(name):
    """The residual has its gradient, beside that of the value: no term is dropped in silence."""
    solver = deqjax.Broyden(rtol=0.0, atol=0.0)
    adjoint = ADJOINTS[name].adjoint(1e-3)
    fn = lambda z, b: 0.5 * jnp.sin(z) + b

    def loss(b, c):
        sol = deqjax.fixed_point(fn, solver, jnp.ones(2), b, steps=2, adjoint=adjoint)
        return jnp.sum(sol.value) + c * sol.stats["residual"]

    b = jnp.asarray([0.3, 0.9])
    without, both = (jax.grad(loss)(b, c) for c in (0.0, 1.0))
    assert bool(jnp.all(jnp.isfinite(both)))
    assert not bool(jnp.all(without == both))


def test_a_failed_backward_solve_neither_aborts_nor_lies():
    """By a Lineax solver at its own ceiling, in our front door and in Optimistix's."""
    d = dense(_p.linear(0.99, n=12, both=True))
    p = d.problem.astype(jnp.float32)
    adjoint = deqjax.ImplicitAdjoint(lineax.GMRES(1e-6, 1e-6, restart=2, max_steps=2))
    for door in (deqjax.fixed_point, optimistix.fixed_point):
        solve = lambda args, door=door: (
            door(p.fn, deqjax.Anderson(1e-5, 1e-5), p.z0, args, adjoint=adjoint, throw=False).value
        )
        assert bool(jnp.all(jnp.isfinite(solve(p.args))))
        grad = jax.grad(lambda args, solve=solve: jnp.sum(solve(args)))(p.args)
        assert all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(grad))
    keep = deqjax.ImplicitAdjoint(adjoint.linear_solver, on_failure="keep")
    _, stats = deqjax.implicit_vjp(
        p.fn, jnp.asarray(p.solution, jnp.float32), p.args, jnp.ones(12), adjoint=keep
    )
    assert stats["result"] != RESULTS.successful
    assert bool(jnp.all(jnp.isfinite(stats["solution"])))


@pytest.mark.parametrize(
    "solver", [optimistix.Newton(1e-5, 1e-5), optimistix.FixedPointIteration(1e-5, 1e-5)]
)
def test_the_solvers_of_optimistix_in_shard_map(solver):
    """A sentence of ours."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    body = lambda x: deqjax.fixed_point(lambda z, x: 0.5 * z + x, solver, jnp.zeros(1), x).value
    sharded = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="outside jax.shard_map"):
        sharded(jnp.ones(8))

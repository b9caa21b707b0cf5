"""How a solve ends: caps, the best iterate, failures, batches; of every solver of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from registry import BEST, SOLVERS

import deqjax
from deqjax import RESULTS

from bench import problems as _p

solvers = pytest.mark.parametrize("make", [SOLVERS[name] for name in BEST], ids=BEST)


def relative(z, fz):
    gap, size = (np.linalg.norm(np.asarray(x, np.float64), axis=-1) for x in (fz - z, fz))
    return gap / size


@pytest.mark.x64
@pytest.mark.parametrize(
    "make",
    [
        lambda tol: deqjax.FixedPointIteration(tol, tol),
        lambda tol: deqjax.Anderson(tol, tol, depth=2),
        lambda tol: deqjax.Broyden(tol, tol, depth=2),
    ],
    ids=["picard", "anderson", "broyden"],
)
def test_best_iterate_at_the_cap(make):
    """The least error of all iterates so far, by the solver's own measure; and its residual."""
    p = _p.rotation(1.2, n=10).astype(jnp.float64)
    # A test that no iterate meets, and one that takes every step: the same iterates.
    tol = 1e-13
    rule, walk = make(tol), make(0.0)
    run = lambda solver, n: deqjax.fixed_point(p.fn, solver, p.z0, p.args, max_steps=12, steps=n)
    path = [run(walk, n).value for n in range(13)]
    measure = lambda z: float(
        jnp.max(jnp.abs((p.fn(z, p.args) - z) / (tol + tol * jnp.abs(p.fn(z, p.args)))))
    )
    errors = [measure(z) for z in path]
    ends = (0, 1, 5, 8, 12)
    for n in ends:
        sol = run(rule, n)
        assert sol.result == RESULTS.nonlinear_max_steps_reached
        assert int(sol.stats["num_steps"]) == n
        best = path[int(np.argmin(errors[: n + 1]))]
        np.testing.assert_allclose(sol.value, best, rtol=1e-9)
        residual = relative(np.asarray(sol.value), np.asarray(p.fn(sol.value, p.args)))
        np.testing.assert_allclose(sol.stats["residual"], residual, rtol=1e-9)
    # Somewhere the last is not the best.
    assert any(np.argmin(errors[: n + 1]) < n for n in ends)


@pytest.mark.x64
def test_gradients_of_the_best_iterate():
    """The gradient of the iterate returned: unrolled to that step, or implicit at it."""
    fn = lambda z, b: 1.5 * jnp.sin(b * z) + b
    z0, b, n = 0.4, 0.9, 6
    picard = deqjax.FixedPointIteration(1e-14, 1e-14)

    def path(b):
        zs = [jnp.asarray(z0)]
        for _ in range(n):
            zs.append(fn(zs[-1], b))
        return jnp.stack(zs)

    solve = lambda b, adjoint: (
        deqjax.fixed_point(fn, picard, z0, b, max_steps=n, adjoint=adjoint).value
    )
    zs = path(jnp.asarray(b))
    errors = jnp.abs(fn(zs, b) - zs) / (1 + jnp.abs(fn(zs, b)))
    k = int(jnp.argmin(errors))
    checkpointed = jax.grad(lambda b: solve(b, deqjax.RecursiveCheckpointAdjoint()))(b)
    np.testing.assert_allclose(checkpointed, jax.jacfwd(path)(b)[k], rtol=1e-12)
    implicit = jax.grad(lambda b: solve(b, deqjax.ImplicitAdjoint(deqjax.Anderson(1e-12))))(b)
    f_z, f_b = jax.grad(fn, (0, 1))(zs[k], b)
    np.testing.assert_allclose(implicit, f_b / (1 - f_z), rtol=1e-9)


@solvers
def test_codes(make):
    """The cap, NaN, divergence; `throw` raises each, and nothing else does."""
    outcomes = [
        (RESULTS.nonlinear_max_steps_reached, lambda z, _: jnp.sqrt(z**2 + 1), 5),
        (RESULTS.nonfinite, lambda z, _: jnp.log(-1 - z**2), 20),
        (RESULTS.nonlinear_divergence, lambda z, _: 1e20 * (1 + z**2), 20),
        (RESULTS.successful, lambda z, _: jnp.cos(z), 60),
    ]
    for code, fn, n in outcomes:
        run = lambda throw, fn=fn, n=n: deqjax.fixed_point(
            fn, make(1e-4), jnp.asarray([0.5]), max_steps=n, throw=throw
        )
        assert run(False).result == code
        if code == RESULTS.successful:
            run(True)
        else:
            with pytest.raises(RuntimeError):
                jax.block_until_ready(run(True).value)


@pytest.mark.optimised
@solvers
def test_mixed_batch(make):
    """Each example meets its own tolerance in its own number of steps, whoever is beside it."""
    p = _p.mixed(easy=7).astype(jnp.float32)
    solver = make(1e-4)

    @jax.jit
    def run(z0, args):
        return deqjax.fixed_point(p.fn, solver, z0, args, batched=True, max_steps=2000)

    sol = run(p.z0, p.args)
    steps = np.asarray(sol.stats["num_steps"])
    assert bool(jnp.all(sol.result == RESULTS.successful))
    assert steps[-1] > 1.5 * steps[:-1].max()
    assert np.all(steps[:-1] <= 12)
    fz = p.fn(sol.value, p.args)
    assert np.all(np.abs(fz - sol.value) <= 1.01e-4 * (1 + np.abs(fz)))
    np.testing.assert_allclose(sol.stats["residual"], relative(sol.value, fz), rtol=1e-2, atol=1e-6)
    # Other mates: the hard one is away, or all are copies of one. Bit for bit.
    for i in (0, 6, 7):
        index = jnp.full(8, i)
        alone = run(p.z0[index], jax.tree.map(lambda x, j=index: x[j], p.args))
        assert bool(jnp.all(alone.value == sol.value[i][None]))
        assert bool(jnp.all(alone.stats["num_steps"] == steps[i]))
        one = run(p.z0[i : i + 1], jax.tree.map(lambda x, i=i: x[i : i + 1], p.args))
        # A batch of another size may round otherwise.
        assert abs(int(one.stats["num_steps"][0]) - steps[i]) <= 2


@pytest.mark.x64
@solvers
def test_vmap_is_a_python_loop(make):
    """Values, steps and gradients; grad of vmap and vmap of grad."""
    p = _p.mixed(easy=3).astype(jnp.float64)
    solver = make(1e-10)
    fn = lambda z, args: args[0] @ z + args[1]

    def one(z0, args):
        sol = deqjax.fixed_point(fn, solver, z0, args, max_steps=4000)
        return jnp.sum(jnp.sin(sol.value)), sol.stats["num_steps"]

    grad = jax.value_and_grad(lambda args, z0: one(z0, args), has_aux=True)
    loop = jax.jit(grad)
    rows = [loop(jax.tree.map(lambda x, i=i: x[i], p.args), p.z0[i]) for i in range(4)]
    truth = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    out = jax.jit(jax.vmap(grad))(p.args, p.z0)
    assert jnp.array_equal(out[0][1], truth[0][1])
    total = lambda args: jnp.sum(jax.vmap(one)(p.z0, args)[0])
    for a, b in [(out[1], truth[1]), (jax.jit(jax.grad(total))(p.args), truth[1])]:
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@solvers
def test_steps_per_problem_and_none(make):
    p = _p.mixed(easy=3).astype(jnp.float32)
    budget = jnp.asarray([0, 1, 2, 3])
    sol = deqjax.fixed_point(
        p.fn, make(1e-7), p.z0, p.args, batched=True, max_steps=8, steps=budget
    )
    assert sol.stats["num_steps"].tolist() == [0, 1, 2, 3]
    assert bool(jnp.all(sol.result == RESULTS.nonlinear_max_steps_reached))
    assert bool(jnp.all(sol.value[0] == p.z0[0]))
    np.testing.assert_allclose(sol.value[1], p.args[1][1], rtol=1e-6)
    fixed = deqjax.fixed_point(
        p.fn, make(0.0), p.z0, p.args, batched=True, max_steps=8, steps=budget
    )
    assert bool(jnp.all(fixed.result == RESULTS.successful))
    assert fixed.stats["num_steps"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [deqjax.Anderson, deqjax.Broyden])
def test_through_the_door_of_optimistix(make):
    """The cap and a NaN: codes, and no exception."""
    options = dict(max_steps=4, throw=False)
    run = lambda fn: optimistix.fixed_point(fn, make(1e-6), jnp.ones(2), **options)
    assert run(lambda z, _: jnp.sqrt(z**2 + 1)).result == RESULTS.nonlinear_max_steps_reached
    assert run(lambda z, _: z * jnp.nan).result != RESULTS.successful
    assert run(lambda z, _: 0.5 * z).result == RESULTS.successful


@solvers
def test_traced_zero_tolerances_ask_for_steps(make):
    """As static ones do, and though no measure can tell which iterate is the best."""
    fn = lambda z, b: jnp.tanh(0.5 * z) + b
    b = jnp.asarray([1.0, -0.3])
    solve = lambda tol: deqjax.fixed_point(fn, make(tol), jnp.zeros(2), b, max_steps=3)
    traced, static = jax.jit(solve)(0.0), solve(0.0)
    assert traced.result == RESULTS.successful
    assert traced.stats["num_steps"] == 3
    np.testing.assert_allclose(traced.value, static.value, rtol=1e-6)


@pytest.mark.x64
@pytest.mark.parametrize("line_search", [False, True])
def test_memory_of_a_problem_that_has_stopped(line_search):
    """SHINE's gradient of one that ran out of steps, however long its batch-mate goes on."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(np.linalg.qr(rng.standard_normal((6, 6)))[0])
    xs = jnp.asarray(2 * rng.standard_normal((2, 6)))
    fn = lambda z, a: jnp.tanh(a[0][:, None] * (z @ q.T) + a[1])
    solver = deqjax.Broyden(1e-8, 1e-9, line_search=line_search)
    options = dict(batched=True, max_steps=30)
    options["adjoint"] = deqjax.BroydenAdjoint(on_failure="keep", max_steps=1)

    @jax.jit
    def grad(rate, steps):
        def loss(xs):
            args = (jnp.stack([2.5, rate]), xs)
            sol = deqjax.fixed_point(fn, solver, 0 * xs, args, steps=steps, **options)
            return jnp.sum(jnp.sin(sol.value[0]))

        return jax.grad(loss)(xs)[0]

    for n in (2, 5, 8, 11):
        alone = grad(0.1, jnp.asarray([n, 0]))
        for rate in (0.9, 2.5):
            np.testing.assert_array_equal(grad(rate, jnp.asarray([n, 30])), alone)


@pytest.mark.parametrize("solver", [deqjax.Anderson(), deqjax.Broyden()], ids=["and", "broyden"])
def test_derivatives_of_coefficients_ask_for_float64(solver):
    adjoint = deqjax.RecursiveCheckpointAdjoint()
    with pytest.raises(ValueError, match="expects a float64 state with"):
        deqjax.fixed_point(lambda z, b: jnp.cos(z) + b, solver, 0.0, 0.1, adjoint=adjoint)

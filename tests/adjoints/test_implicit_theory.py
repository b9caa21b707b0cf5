"""The implicit gradient: accuracy, memory, higher derivatives, warm starts, what is reported."""

import collections

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from dense import dense
from problems import relative_error, tanh

import deqjax
from deqjax import RESULTS

from bench import problems as _p

ANDERSON = deqjax.Anderson(1e-12, 1e-12)
BROYDEN = deqjax.Broyden(1e-12, 1e-12)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("rho", [0.9, 0.99, 0.999])
def test_default_gradient_in_float32(rho, both):
    """Within `10 tol / (1 - rho)` of the dense one, or NaN; A is normal: cond is 1 / (1 - rho)."""
    d = dense(_p.linear(rho, both=both))
    p = d.problem.astype(jnp.float32)
    tol = 10 * float(jnp.finfo(jnp.float32).eps)
    # At the solution itself: what is wrong is the backward solve's doing.
    z = jnp.asarray(p.solution, jnp.float32)
    g = jnp.asarray(d.g, jnp.float32)
    solver = deqjax.Anderson(rtol=1.0, atol=1.0)
    loss = lambda args: jnp.vdot(deqjax.fixed_point(p.fn, solver, z, args).value, g)
    grad = jax.jit(jax.grad(loss))(p.args)
    assert relative_error(grad, d.implicit()) < 10 * tol / (1 - rho)
    # And with a ceiling that is too low: no number at all.
    low = lambda args: jnp.vdot(
        deqjax.fixed_point(
            p.fn, solver, z, args, adjoint=deqjax.ImplicitAdjoint(max_steps=3)
        ).value,
        g,
    )
    assert all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(jax.jit(jax.grad(low))(p.args)))


@pytest.mark.parametrize("linear", [None, deqjax.Anderson(1e-6), deqjax.Broyden(1e-6)])
def test_a_singular_system_has_no_gradient(linear):
    """Any residual is small beside a y that is large enough: `I - J` without an inverse."""
    adjoint = deqjax.ImplicitAdjoint(linear)
    g, z = jnp.asarray([1.0, 0.3]), jnp.ones(2)
    for j in ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.5]], [[0.75, 0.25], [0.25, 0.75]]):
        fn = lambda z, args: args[0] @ z + args[1]
        args = jnp.asarray(j), jnp.zeros(2)
        (_, grad), stats = deqjax.implicit_vjp(fn, z, args, g, adjoint=adjoint)
        assert stats["result"] != RESULTS.successful
        assert all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(grad))


@pytest.mark.optimised
@pytest.mark.parametrize("rho", [0.5, 0.99])
def test_memory_is_linear_in_size_and_small(rho):
    """The backward pass at 32,768 entries in float32: 8 MiB are 64 copies of the state."""

    def temporary(n):
        fn = lambda z, b: rho * jnp.tanh(jnp.roll(z, 1)) + b
        run = jax.jit(lambda z, b, g: deqjax.implicit_vjp(fn, z, b, g)[0])
        x = jax.ShapeDtypeStruct((n,), jnp.float32)
        return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(32_768), temporary(4 * 32_768)
    assert small <= 8 * 2**20
    assert large <= 4.1 * small


@pytest.mark.x64
@pytest.mark.parametrize(
    "solver, linear, leaf, outer",
    [
        (ANDERSON, deqjax.Broyden(1e-11), "u", jax.jacrev),
        (BROYDEN, deqjax.Anderson(1e-11), "v", jax.jacrev),
        (ANDERSON, None, "v", jax.jacfwd),
    ],
)
def test_second_derivatives_of_a_pytree_state(solver, linear, leaf, outer):
    """The Hessian of one leaf, where others move or do not; against differences."""
    fn = lambda z, a: {"u": jnp.tanh(0.5 * z["u"] + a), "v": 0.3 * z["v"] + a[0] * jnp.sum(z["u"])}
    z0 = {"u": jnp.zeros(2), "v": jnp.zeros(3)}
    adjoint = deqjax.ImplicitAdjoint(linear)

    def loss(a):
        value = deqjax.fixed_point(fn, solver, z0, a, adjoint=adjoint).value
        return jnp.sum(jnp.sin(value[leaf]))

    a, h = jnp.asarray([0.3, -0.8]), 1e-5
    one = jax.jit(jax.grad(loss))
    truth = np.stack([(one(a + h * e) - one(a - h * e)) / (2 * h) for e in jnp.eye(2)])
    hessian = jax.jit(outer(jax.grad(loss)))(a)
    np.testing.assert_allclose(hessian, truth, rtol=1e-7, atol=1e-7)
    assert np.all(np.abs(truth[0, 0]) > 1e-3)


@pytest.mark.x64
@pytest.mark.parametrize("linear", [None, deqjax.Broyden(1e-11), lineax.GMRES(1e-11, 1e-11)])
def test_jacobian_of_one_leaf_in_both_modes(linear):
    d = dense(_p.split(_p.linear(0.8, n=10, seed=1)))
    p = d.problem.astype(jnp.float64)
    adjoint = deqjax.ImplicitAdjoint(linear)

    def leaf(x):
        args = (p.args[0], x)
        return deqjax.fixed_point(p.fn, BROYDEN, p.z0, args, adjoint=adjoint).value["a"]

    for jacobian in (jax.jacrev(leaf), jax.jacfwd(leaf)):
        np.testing.assert_allclose(jax.jit(jacobian)(p.args[1]), d.inverse[:3], atol=1e-8)


def test_warm_start():
    """From the solution of a system nearby: fewer steps, the same answer."""
    p = tanh(32, 0.9)
    z, g = jnp.asarray(p.solution, jnp.float32), p.cotangent
    run = lambda g, y0: deqjax.implicit_vjp(
        p.fn, z, p.args, g, adjoint=deqjax.ImplicitAdjoint(y0=y0)
    )
    cold, stats = run(g, None)
    (_, again), nothing = run(g, stats["solution"])
    assert int(nothing["num_steps"]) <= 1
    close, warm = run(1.001 * g, stats["solution"])
    assert int(warm["num_steps"]) < int(stats["num_steps"])
    assert warm["result"] == stats["result"] == RESULTS.successful
    bound = 10 * 10 * float(jnp.finfo(jnp.float32).eps) / (1 - p.rate) ** 2
    assert relative_error(again, cold[1]) < bound
    assert relative_error(close[1], jax.tree.map(lambda x: 1.001 * x, cold[1])) < bound


@pytest.mark.x64
def test_solution_is_the_adjoint_state():
    d = dense(_p.tanh(0.9, n=12))
    p = d.problem.astype(jnp.float64)
    z, g = jnp.asarray(p.solution), jnp.asarray(d.g)
    for linear in (None, deqjax.Anderson(1e-12), lineax.GMRES(1e-12, 1e-12)):
        adjoint = deqjax.ImplicitAdjoint(linear)
        (_, grad), stats = deqjax.implicit_vjp(p.fn, z, p.args, g, adjoint=adjoint)
        assert relative_error(stats["solution"], d.inverse.T @ d.g) < 1e-9
        assert relative_error(grad, d.implicit()) < 1e-9


def test_training_that_logs_its_backward_solve_at_no_extra_cost():
    """`implicit_vjp` instead of jax.grad: its gradient, its cost, and steps and residual."""
    count = collections.Counter()

    def evaluation(z):
        count["evaluations"] += 1

    def product(g):
        count["products"] += 1

    def backwards(_, g):
        jax.debug.callback(product, g)
        return (g,)

    tick = jax.custom_vjp(lambda z: z)
    tick.defvjp(lambda z: (z, None), backwards)

    def fn(z, args):
        jax.debug.callback(evaluation, z)
        return jnp.tanh(args[0] @ tick(z) + args[1])

    p = tanh(8, 0.8)
    solver = deqjax.Anderson(1e-5, 1e-5)
    outer = lambda z: jnp.sum(jnp.square(z - 0.1))

    def plain(args):
        value, grad = jax.value_and_grad(
            lambda args: outer(deqjax.fixed_point(fn, solver, p.z0, args).value)
        )(args)
        return value, grad, None

    def logged(args):
        z = deqjax.fixed_point(fn, solver, p.z0, args).value
        value, g = jax.value_and_grad(outer)(z)
        (_, grad), stats = deqjax.implicit_vjp(fn, z, args, g)
        return value, grad, stats

    def train(step):
        count.clear()
        args, losses, log = p.args, [], []
        run = jax.jit(step)
        for _ in range(3):
            value, grad, stats = run(args)
            args = jax.tree.map(lambda x, g: x - 0.05 * g, args, grad)
            losses.append(float(value))
            if stats is not None:
                log.append((int(stats["num_steps"]), float(stats["residual"])))
                assert stats["result"] == RESULTS.successful
        jax.effects_barrier()
        return args, losses, log, dict(count)

    args, losses, _, cost = train(plain)
    args_, losses_, log, cost_ = train(logged)
    assert losses_ == pytest.approx(losses, rel=1e-6)
    assert relative_error(args_, args) < 1e-6
    # The product with J that comes with the one for args is counted, and dropped where it is not.
    assert cost_["evaluations"] <= cost["evaluations"]
    assert cost_["products"] <= cost["products"] + 3
    assert losses[-1] < losses[0]
    assert all(0 < steps < 60 and residual < 1e-5 for steps, residual in log)
    assert cost["products"] > sum(steps for steps, _ in log)


@pytest.mark.parametrize("linear", [None, deqjax.Broyden(1e-6, 1e-6)], ids=["default", "broyden"])
def test_warm_start_of_a_masked_and_of_a_failed_example(linear):
    """b = 0 has y = 0 whatever y0 is; and a y0 that is not finite is none."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(0.9 * np.linalg.qr(rng.standard_normal((4, 4)))[0], jnp.float32)
    fn = lambda z, x: z @ q.T + x
    z = jnp.zeros((3, 4))
    g = jnp.ones((3, 4)).at[1].set(0)
    y0 = jnp.ones((3, 4)).at[2].set(jnp.nan)
    run = lambda adjoint: deqjax.implicit_vjp(fn, z, z, g, batched=True, adjoint=adjoint)
    (_, warm), stats = run(deqjax.ImplicitAdjoint(linear, y0=y0))
    (_, cold), _ = run(deqjax.ImplicitAdjoint(linear))
    assert jnp.all(stats["result"] == deqjax.RESULTS.successful)
    assert not jnp.any(warm[1])
    np.testing.assert_allclose(warm, cold, rtol=1e-4, atol=1e-5)


def test_a_loose_tolerance_is_no_licence():
    """Ten times 0.1 would pass anything."""
    q = jnp.asarray(np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))[0])
    fn = lambda z, x: 0.97 * (q @ z) + x
    adjoint = deqjax.ImplicitAdjoint(tol=0.1, max_steps=1)
    (_, d), stats = deqjax.implicit_vjp(fn, jnp.zeros(40), q[0], q[1], adjoint=adjoint)
    assert stats["residual"] > 0.1
    assert jnp.all(jnp.isnan(d))


def test_no_tolerance_at_all_is_refused():
    with pytest.raises(ValueError, match="rtol above 0"):
        deqjax.ImplicitAdjoint(deqjax.FixedPointIteration(rtol=0.0, atol=0.0))
    with pytest.raises(ValueError, match=r"expects a deqjax\.ImplicitAdjoint"):
        z = jnp.zeros(2)
        deqjax.implicit_vjp(lambda z, _: z / 2, z, None, z, adjoint=deqjax.BroydenAdjoint())

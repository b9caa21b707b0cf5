"""The linear equation of an implicit gradient: every leaf its due, every solver judged, and how
wrong the answer may be."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from problems import relative_error

import deqjax
from deqjax import RESULTS

MAP = lambda z, a: a[0] @ z + a[1]


def triangular(n, seed):
    """A J of spectral radius 0.5, and an inverse of I - J that is up to 1e13 in norm."""
    rng = np.random.default_rng(seed)
    j = np.triu(rng.standard_normal((n, n)), 1) * 10 / np.sqrt(24) + 0.5 * np.eye(n)
    return j, rng


def symmetric(n, rho, rng):
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return q @ np.diag(rho * np.append(1, rng.uniform(-1, 1, n - 1))) @ q.T


def exact(j, g):
    """y and the inverse of I - J^T, in long double by Newton's iteration."""
    a = np.eye(len(j), dtype=np.longdouble) - np.asarray(j, np.longdouble).T
    x = np.linalg.inv(a.astype(float)).astype(np.longdouble)
    for _ in range(5):
        x = x + x @ (np.eye(len(j)) - a @ x)
    return x @ np.asarray(g, np.longdouble), x


def solve(j, g, **options):
    j, g = (jnp.asarray(x, jnp.result_type(float)) for x in (j, g))
    args = (j, jnp.zeros_like(g))
    return deqjax.implicit_vjp(MAP, jnp.zeros_like(g), args, g, **options)


def test_a_gradient_that_is_all_rounding_is_none():
    """The residual is 1e-6, and the error 1e2 to 1e5: y is large enough for any."""
    run = jax.jit(lambda j, g: solve(j, g)[0][1][1])
    for seed in (3, 12, 18, 19, 37):
        j, rng = triangular(16, seed)
        j = j.astype(np.float32)
        g = ((np.eye(16) - j).T @ rng.standard_normal(16)).astype(np.float32)
        assert jnp.all(jnp.isnan(run(j, g)))
    # A normal J whose eigenvalues are as near to 1 is still solved.
    j, g = np.float32(symmetric(16, 0.9999, rng)), np.float32(rng.standard_normal(16))
    assert relative_error(run(j, g), exact(j, g)[0]) < 2e-2


@pytest.mark.x64
@pytest.mark.parametrize("kind", ["triangular", "jordan"])
def test_condition_and_error_of_matrices_that_are_not_normal(kind):
    run = jax.jit(lambda j, g: solve(j, g, condition=True))
    for seed in range(3):
        j, rng = triangular(16, seed)
        if kind == "jordan":
            j = (0.6 + 0.1 * seed) * np.eye(16) + np.eye(16, k=1)
        g = rng.standard_normal(16)
        (_, (_, y)), stats = run(j, g)
        true, inverse = exact(j, g)
        error = float(np.max(np.abs(np.asarray(y) - true)) / np.max(np.abs(true)))
        norm = float(np.max(np.sum(np.abs(inverse), 1)))
        assert norm / 10 < stats["condition"] < 1.01 * norm
        assert error / 10 < stats["error_estimate"] < 10 * error


def test_no_error_beyond_ten_times_the_estimate():
    """In float32, of each problem of a batch as if it were alone; infinite where a solve failed."""
    n, rng = 16, np.random.default_rng(0)
    js = [triangular(n, seed)[0] for seed in range(4)]
    js += [0.5 * np.eye(n) + c * np.eye(n, k=1) for c in (0.3, 1.0)]
    js += [symmetric(n, rho, rng) for rho in (0.5, 0.99, 0.9999)]
    js += [0.9 * np.abs(js[-1]) / np.max(np.sum(np.abs(js[-1]), 0)), np.eye(n)]
    js = np.asarray(js, np.float32)
    g = rng.standard_normal((len(js), n)).astype(np.float32)
    fn = lambda z, a: jnp.einsum("bij,bj->bi", a[0], z, precision="highest") + a[1]
    run = lambda js, g: deqjax.implicit_vjp(fn, 0 * g, (js, 0 * g), g, batched=True, condition=True)
    (_, (_, y)), stats = jax.jit(run)(js, jnp.asarray(g))
    good = np.asarray(stats["result"] == RESULTS.successful)
    assert not good[-1] and np.sum(good) >= 7
    assert np.all(np.isinf(stats["error_estimate"][~good]))
    for i in np.flatnonzero(good):
        true, inverse = exact(js[i], g[i])
        error = float(np.max(np.abs(np.asarray(y[i]) - true)) / np.max(np.abs(true)))
        assert error < 10 * stats["error_estimate"][i]
        assert stats["condition"][i] < 1.1 * float(np.max(np.sum(np.abs(inverse), 1)))
    _, alone = jax.jit(run)(js[:1], jnp.asarray(g[:1]))
    np.testing.assert_allclose(alone["condition"][0], stats["condition"][0], rtol=1e-2)


def two_leaves(dtype, scale):
    """Uncoupled, of radius 0.8 and 0.995; the cotangent of the first is `scale` times the other."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(symmetric(12, rho, rng), jnp.float32) for rho in (0.8, 0.995))
    fn = lambda z, x: {
        "a": (a @ z["a"].astype(jnp.float32)).astype(dtype) + x["a"],
        "b": b @ z["b"] + x["b"],
    }
    g = {
        "a": jnp.asarray(scale * rng.standard_normal(12), dtype),
        "b": jnp.asarray(rng.standard_normal(12), jnp.float32),
    }
    true = {k: exact(j, np.asarray(g[k], float))[0] for k, j in (("a", a), ("b", b))}
    return fn, jax.tree.map(jnp.zeros_like, g), g, true


@pytest.mark.parametrize("scale", [1e6, 1e-6])
@pytest.mark.parametrize(
    "linear",
    [None, deqjax.Broyden(1e-6), lineax.GMRES(1e-6, 0.0)],
    ids=["default", "broyden", "lineax"],
)
def test_a_leaf_with_a_small_cotangent(linear, scale):
    fn, z, g, true = two_leaves(jnp.float32, scale)
    adjoint = deqjax.ImplicitAdjoint(linear)
    (_, y), stats = deqjax.implicit_vjp(fn, z, z, g, adjoint=adjoint)
    assert stats["result"] == RESULTS.successful
    assert stats["residual"] < 1.2e-5
    assert relative_error(y["a"], true["a"]) < 1e-4
    assert relative_error(y["b"], true["b"]) < 1e-3


def test_a_small_leaf_of_broyden_adjoint():
    """SHINE's inverse knows nothing of the second leaf: the residual of that leaf says so."""
    fn, z, g, true = two_leaves(jnp.float32, 1e6)
    solver, adjoint = deqjax.Broyden(1e-3, 1e-3), deqjax.BroydenAdjoint(tol=1e-4)

    def loss(x):
        value = deqjax.fixed_point(fn, solver, z, x, adjoint=adjoint).value
        return sum(jnp.vdot(value[k], g[k]) for k in g)

    x = jax.tree.map(jnp.ones_like, z)
    y = jax.jit(jax.grad(loss))(x)
    assert relative_error(y["a"], true["a"]) < 1e-3
    assert relative_error(y["b"], true["b"]) < 200 * 1e-4


def test_a_bfloat16_leaf_loosens_no_other():
    fn, z, g, true = two_leaves(jnp.bfloat16, 1.0)
    (_, y), stats = deqjax.implicit_vjp(fn, z, z, g)
    assert stats["result"] == RESULTS.successful
    assert relative_error(y["b"], true["b"]) < 1e-3
    assert relative_error(y["a"], true["a"]) < 0.1


@pytest.mark.parametrize("linear", [None, deqjax.Anderson(1e-6)], ids=["default", "anderson"])
def test_a_leaf_that_is_nothing_but_rounding_does_not_keep_the_others(linear):
    """y of the second leaf is 0, as the sum of terms that are not."""
    rng = np.random.default_rng(0)
    j, g = np.float32(symmetric(12, 0.9, rng)), np.float32(rng.standard_normal(12))
    true, _ = exact(j, g)
    c = rng.standard_normal(12)
    c = jnp.asarray(c - true * (c @ true) / (true @ true), jnp.float32)
    fn = lambda z, x: {"a": j @ z["a"] + c * z["b"] + x["a"], "b": 0.5 * z["b"] + x["b"]}
    z = {"a": jnp.zeros(12), "b": jnp.zeros(())}
    adjoint = deqjax.ImplicitAdjoint(linear)
    (_, y), stats = deqjax.implicit_vjp(fn, z, z, z | {"a": g}, adjoint=adjoint)
    assert stats["result"] == RESULTS.successful
    assert stats["num_steps"] < 60
    assert relative_error(y["a"], true) < 2e-5


@pytest.mark.parametrize("linear", [lineax.SVD(), lineax.AutoLinearSolver(well_posed=False)])
def test_a_singular_system_is_none_of_lineax_either(linear):
    """Lineax calls a least squares solution a success that misses a third of g and more."""
    for j in ([[1.0, 0.0], [0.0, 0.5]], [[0.75, 0.25], [0.25, 0.75]]):
        grad, stats = solve(j, [1.0, 0.3], adjoint=deqjax.ImplicitAdjoint(linear))
        assert stats["result"] != RESULTS.successful
        assert stats["residual"] > 0.1
        assert all(bool(jnp.all(jnp.isnan(x))) for x in jax.tree.leaves(grad))


def test_the_tolerance_of_a_linear_solver_is_that_of_the_solve():
    """And no finer one: 0.9 to the power of the steps."""
    for rtol in (1e-2, 1e-4):
        adjoint = deqjax.ImplicitAdjoint(deqjax.FixedPointIteration(rtol))
        _, stats = solve([[0.9]], [1.0], adjoint=adjoint)
        steps = np.log(rtol / 0.1) / np.log(0.9)
        assert abs(int(stats["num_steps"]) - steps) < 5


@pytest.mark.x64
def test_what_lineax_calls_stagnated_is_right():
    """It asks for less than rounding leaves; what was measured is 1e-15."""
    rng = np.random.default_rng(1)
    j, g = symmetric(12, 0.9, rng), rng.standard_normal(12)
    adjoint = deqjax.ImplicitAdjoint(lineax.GMRES(1e-17, 1e-17))
    (_, (_, y)), stats = solve(j, g, adjoint=adjoint)
    assert stats["result"] == RESULTS.successful
    assert stats["residual"] < 1e-14
    assert relative_error(y, exact(j, g)[0]) < 1e-13


@pytest.mark.parametrize("adjoint", [deqjax.ImplicitAdjoint(), deqjax.BroydenAdjoint(tol=1e-5)])
def test_a_short_forward_solve_does_not_shorten_the_backward_one(adjoint):
    """One step from a warm start, and the gradient of all of them."""
    rng = np.random.default_rng(2)
    j, g = np.float32(symmetric(12, 0.95, rng)), np.float32(rng.standard_normal(12))
    x = jnp.ones(12)
    z0 = jnp.asarray(np.linalg.solve(np.eye(12) - j, x), jnp.float32)
    solver = deqjax.Broyden(1e-4, 1e-4)
    loss = lambda x: jnp.vdot(
        deqjax.fixed_point(MAP, solver, z0, (j, x), max_steps=1, adjoint=adjoint).value, g
    )
    assert relative_error(jax.jit(jax.grad(loss))(x), exact(j, g)[0]) < 1e-3


@pytest.mark.x64
def test_a_conserved_quantity():
    """The stationary distribution of a Markov chain: NaN as it stands, right normalised inside f.

    Of two states, p = (b, a) / (a + b) with a and b the rates at which the first and second are
    left.
    """
    start = jnp.asarray([0.5, 0.5])
    chain = lambda a, b: jnp.stack([jnp.stack([1 - a, b]), jnp.stack([a, 1 - b])])
    plain = lambda p, P: P @ p
    normal = lambda p, P: P @ p / jnp.sum(P @ p)
    solver = deqjax.FixedPointIteration(1e-13, 1e-13)

    def first(rates, fn, on_failure="nan"):
        adjoint = deqjax.ImplicitAdjoint(on_failure=on_failure)
        return deqjax.fixed_point(fn, solver, start, chain(*rates), adjoint=adjoint).value[0]

    rates = jnp.asarray([0.3, 0.1])
    a, b = rates
    truth = jnp.stack([-b, a]) / (a + b) ** 2
    np.testing.assert_allclose(first(rates, normal), b / (a + b), rtol=1e-11)
    np.testing.assert_allclose(jax.grad(first)(rates, normal), truth, rtol=1e-11)
    assert jnp.all(jnp.isnan(jax.grad(first)(rates, plain)))
    with pytest.raises(RuntimeError, match="conserves a quantity"):
        jax.block_until_ready(jax.grad(first)(rates, plain, "raise"))

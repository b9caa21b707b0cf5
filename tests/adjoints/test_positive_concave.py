"""The adjoint with a bound: never below the true error, tight, and few products."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error
from registry import names

import deqjax
from deqjax import RESULTS
from deqjax.nn import PositiveConcaveConv2d

from bench import problems as _p

# The function, and its slope in NumPy, by formulas that lose nothing at saturated units.
CELLS = {
    "tanh": (jnp.tanh, lambda u: np.cosh(np.minimum(u, 300)) ** -2.0),
    "relu6": (jax.nn.relu6, lambda u: ((u > 0) & (u < 6)).astype(float)),
    "sigmoid": (jax.nn.sigmoid, lambda u: np.exp(-u) / (1 + np.exp(-u)) ** 2),
    "softsign": (jax.nn.soft_sign, lambda u: (1 + np.abs(u)) ** -2.0),
}
DTYPES = [np.float32, pytest.param(np.float64, marks=pytest.mark.x64)]
ADJOINT = deqjax.PositiveConcaveAdjoint()


def double(x):
    return np.asarray(x, np.float64)


def product(adjoint, fn, z, args, batched=False):
    """`I - J` by JVPs, and what the adjoint knows of it."""
    push = lambda v: jax.jvp(lambda z: fn(z, args), (z,), (v,))[1]
    matvec = lambda v: jax.tree.map(jnp.subtract, v, push(v))
    return matvec, adjoint.known(matvec, z, int(batched))


def batch(cell, dtype, size, n=12, seed=0, radii=(0.3, 0.9, 1.0, 1.5, 6.0, 30.0)):
    """`(fn, z, args, J)` of so many random problems; some have rows of zeros, some saturate."""
    act, slope = CELLS[cell]
    rng = np.random.default_rng(seed)
    w = rng.uniform(size=(size, n, n)) ** rng.choice([1, 4], (size, 1, 1))
    w *= (rng.choice(radii, size) / [_p.radius(w) for w in w])[:, None, None]
    w *= rng.uniform(size=(size, n, 1)) > 0.1
    x = rng.uniform(0.5, 1.5, (size, n)) * 10 ** rng.uniform(-3, 1, (size, 1))
    fn = lambda z, args: jax.vmap(lambda z, w, x: act(w @ z + x))(z, *args)
    args = jnp.asarray(w, dtype), jnp.asarray(x, dtype)
    z = jax.lax.fori_loop(0, 200, lambda _, z: fn(z, args), jnp.ones((size, n), dtype))
    u = np.einsum("bij,bj->bi", double(args[0]), double(z)) + double(args[1])
    return fn, z, args, slope(u)[..., None] * double(args[0])


def check(stats, known, jac, g, transpose, tol=None):
    """True errors, in the norm of the bound, of those that have one; at most that."""
    eye = np.eye(jac.shape[-1])
    a = np.swapaxes(eye - jac, 1, 2) if transpose else eye - jac
    truth = np.linalg.solve(a, double(g)[..., None])[..., 0]
    w = double(known.w).reshape(truth.shape)
    if transpose:
        norm = lambda y: np.sum(w * np.abs(y), -1)
    else:
        norm = lambda y: np.max(np.abs(y) / w, -1)
    error = norm(double(stats["solution"]).reshape(truth.shape) - truth) / norm(truth)
    bound = double(stats["error_bound"])
    has = np.isfinite(bound)
    assert np.mean(has) > 0.9
    assert np.all(error[has] <= bound[has])
    assert np.all(stats["result"] == RESULTS.successful)
    if tol is not None:
        assert np.all(bound[has] <= tol)
    return error[has], bound[has]


@pytest.mark.parametrize("transpose", [True, False], ids=["reverse", "forward"])
@pytest.mark.parametrize("cell", names(CELLS, "softsign"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_holds(dtype, cell, transpose):
    """The bound holds for 32 problems each, at every tolerance down to what the dtype can tell."""
    fn, z, args, jac = batch(cell, dtype, 32)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(z.shape), dtype)
    for tol in (1e-2, None):
        adjoint = deqjax.PositiveConcaveAdjoint(tol=tol)
        matvec, known = product(adjoint, fn, z, args, batched=True)
        if transpose:
            _, stats = deqjax.implicit_vjp(fn, z, args, g, adjoint=adjoint, batched=True)
        else:
            options = dict(transpose=False, max_steps=256, rank=1)
            y, stats = adjoint.solve(matvec, g, known, **options)
            stats["solution"] = y
        check(stats, known, jac, g, transpose)


@pytest.mark.x64
@pytest.mark.parametrize("cell", CELLS)
def test_tight_and_within_the_tolerance(cell):
    """The series, whose error lies along the mode that c belongs to; true error <= tol."""
    fn, z, args, jac = batch(cell, np.float64, 64, radii=(0.3, 0.6))
    g = jnp.asarray(np.random.default_rng(1).standard_normal(z.shape))
    _, known = product(ADJOINT, fn, z, args, batched=True)
    _, stats = deqjax.implicit_vjp(fn, z, args, g, adjoint=ADJOINT, batched=True)
    error, bound = check(stats, known, jac, g, True, tol=1e-4)
    assert np.median(bound / error) < 1.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_images(getkey, dtype):
    """A convolution, n = 75, in the norm of an image."""
    cell = PositiveConcaveConv2d(3, 3, dtype=dtype, key=getkey())
    weight = jax.random.uniform(getkey(), (3, 3, 3, 3), dtype) / 20
    cell = eqx.tree_at(lambda c: c.weight, cell, weight, is_leaf=lambda x: x is cell.weight)
    fn = jax.vmap(cell)
    x = jax.vmap(cell.inject)(jax.random.normal(getkey(), (4, 5, 5, 3), dtype))
    z = jax.lax.fori_loop(0, 100, lambda _, z: fn(z, x), x)
    g = jax.random.normal(getkey(), z.shape, dtype)
    with jax.enable_x64(True):
        up = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)
        exact = lambda z, x: up(cell)(z.reshape(5, 5, 3), x).reshape(-1)
        jac = jax.vmap(jax.jacfwd(exact))(up(z).reshape(4, -1), up(x))
    _, known = product(ADJOINT, fn, z, x, batched=True)
    (d_fn, _), stats = deqjax.implicit_vjp(cell_batch(cell), z, x, g, adjoint=ADJOINT, batched=True)
    check(stats, known, np.asarray(jac), g.reshape(4, -1), True, tol=1e-4)
    assert d_fn.cell.weight.shape == weight.shape


class cell_batch(eqx.Module):
    cell: eqx.Module

    def __call__(self, z, x):
        return jax.vmap(self.cell)(z, x)


SLOW = {
    "tanh, rho(J) 0.996": (_p.slow_tanh, 7, 900),
    "relu6, rho(W) 0.999": (lambda: _p.positive(_p._relu6, 0.999, 3e-3), 8, 1800),
    "relu6, rho(W) 1.01": (lambda: _p.positive(_p._relu6, 1.01, 1e-3), 6, 22),
}


@pytest.mark.x64
@pytest.mark.parametrize("name", SLOW)
def test_products(name):
    """To a relative error of 1e-4 that is known to be, by products of the transpose."""
    make, most, series = SLOW[name]
    p = make().astype(np.float64)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(80))
    run = lambda adjoint: deqjax.implicit_vjp(
        p.fn, jnp.asarray(p.solution), p.args, g, adjoint=adjoint, max_steps=4000
    )[1]
    stats = run(ADJOINT)
    assert stats["result"] == RESULTS.successful
    assert stats["num_steps"] + 1 <= most
    assert stats["error_bound"] < 1e-4
    truth = run(deqjax.ImplicitAdjoint(tol=1e-13))["solution"]
    assert relative_error(stats["solution"], truth) < 1e-4
    # At the same residual, which is no such error.
    alone = deqjax.ImplicitAdjoint(deqjax.FixedPointIteration(1e-4))
    assert run(alone)["num_steps"] + 1 >= series


@pytest.mark.optimised
@pytest.mark.x64
def test_batch_mates_do_not_matter():
    """Bit for bit; one mate is slow, one has no bound, one no cotangent, one a NaN."""
    a = jnp.asarray([[0.2, 0.9, 0.997, 1.5, 0.5, 0.7]]).T
    x = jnp.asarray([[0.1, 0.2, 0.3]]) * jnp.asarray([[1, 1, 1e-3, 1, 1, 1]]).T
    fn = lambda z, args: args[0] * (0.8 * z + 0.2 * jnp.roll(z, 1, axis=-1)) + args[1]
    z = jax.lax.fori_loop(0, 9000, lambda _, z: fn(z, (a, x)), x)
    z = z.at[3].set(1.0)
    g = jnp.ones((6, 3)).at[:, 0].set(-2.0).at[4].set(0.0).at[5, 1].set(jnp.nan)
    run = lambda *parts: deqjax.implicit_vjp(
        fn, parts[0], parts[1:3], parts[3], adjoint=ADJOINT, batched=True
    )
    (_, grads), stats = run(z, a, x, g)
    assert list(stats["result"] == RESULTS.successful) == [True] * 5 + [False]
    assert list(np.isfinite(stats["error_bound"])) == [True] * 3 + [False, True, False]
    assert stats["error_bound"][4] == 0 and not jnp.any(stats["solution"][4])
    assert jnp.all(jnp.isnan(grads[1][5]))
    for i in range(5):
        (_, alone), one = run(*(v[i : i + 1] for v in (z, a, x, g)))
        for both in zip(
            jax.tree.leaves((alone, one)), jax.tree.leaves((grads, stats)), strict=True
        ):
            assert jnp.array_equal(both[0][0], both[1][i], equal_nan=True)


@pytest.mark.parametrize("why", ["negative weights", "rho(J) 2", "z = 0", "half precision"])
def test_no_bound(why):
    """Then the gradient is that of the default `ImplicitAdjoint`, and the bound infinite."""
    dtype = jnp.bfloat16 if why == "half precision" else jnp.float32
    w = jnp.asarray([[0.1, 0.4], [0.3, 0.2]], dtype)
    w = {"negative weights": -1, "rho(J) 2": 4}.get(why, 1) * w
    z = jnp.asarray([0.0, 0.0] if why == "z = 0" else [0.5, 0.4], dtype)
    fn = lambda z, args: args[0] @ z + args[1]
    args, g = (w, jnp.ones(2, dtype)), jnp.asarray([1, -2], dtype)
    (_, grad), stats = deqjax.implicit_vjp(fn, z, args, g, adjoint=ADJOINT)
    (_, plain), same = deqjax.implicit_vjp(fn, z, args, g)
    assert jnp.isinf(stats["error_bound"])
    assert stats["result"] == RESULTS.successful
    assert stats["num_steps"] == same["num_steps"]
    assert relative_error(grad, plain) <= 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.x64
def test_failure_is_nan_kept_or_raised():
    """A value that is kept has a bound, and no small one."""
    p = _p.slow_tanh().astype(np.float64)
    z, g = jnp.asarray(p.solution), jnp.ones(80)
    run = lambda how: deqjax.implicit_vjp(
        p.fn,
        z,
        p.args,
        g.at[0].set(-60.0),
        adjoint=deqjax.PositiveConcaveAdjoint(tol=1e-8, on_failure=how, max_steps=3),
    )
    (_, grad), stats = run("nan")
    assert jnp.isnan(grad[1]).all() and stats["result"] != RESULTS.successful
    (_, grad), stats = run("keep")
    assert jnp.isfinite(grad[1]).all() and stats["error_bound"] > 1e-7
    with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve"):
        jax.block_until_ready(run("raise"))
    for bad in (dict(tol=0.0), dict(on_failure="no"), dict(max_steps=0)):
        with pytest.raises(ValueError, match="^PositiveConcaveAdjoint expects"):
            deqjax.PositiveConcaveAdjoint(**bad)
    with pytest.raises(ValueError, match="implicit_vjp expects a deqjax.ImplicitAdjoint or"):
        deqjax.implicit_vjp(p.fn, z, p.args, g, adjoint=deqjax.JacobianFreeAdjoint())

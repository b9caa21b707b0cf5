"""The adjoint with a bound: never below the true error, tight, and few products."""

import _problems as _p
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error

import deqjax
from deqjax import RESULTS
from deqjax.nn import DEQ, PositiveConcaveConv2d, PositiveConcaveLinear

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


def batch(cell, dtype, size, n=20, seed=0, radii=(0.3, 0.9, 1.0, 1.5, 6.0, 30.0)):
    """`(fn, z, args, J)` of so many random problems; some have rows of zeros, some saturate."""
    act, slope = CELLS[cell]
    rng = np.random.default_rng(seed)
    w = rng.uniform(size=(size, n, n)) ** rng.choice([1, 4], (size, 1, 1))
    w *= (rng.choice(radii, size) / [_p.radius(w) for w in w])[:, None, None]
    w *= rng.uniform(size=(size, n, 1)) > 0.1
    x = rng.uniform(0.5, 1.5, (size, n)) * 10 ** rng.uniform(-3, 1, (size, 1))
    fn = lambda z, args: jax.vmap(lambda z, w, x: act(w @ z + x))(z, *args)
    args = jnp.asarray(w, dtype), jnp.asarray(x, dtype)
    z = jax.lax.fori_loop(0, 1000, lambda _, z: fn(z, args), jnp.ones((size, n), dtype))
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
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_holds(dtype, cell, transpose):
    """Of 64 problems each, at every tolerance down to what the dtype can tell."""
    fn, z, args, jac = batch(cell, dtype, 64)
    g = jnp.asarray(np.random.default_rng(1).standard_normal(z.shape), dtype)

    for tol in (0.5, 0.1, 1e-2, 1e-4, None):
        adjoint = deqjax.PositiveConcaveAdjoint(tol=tol)
        matvec, known = product(adjoint, fn, z, args, batched=True)
        if transpose:
            _, stats = deqjax.implicit_vjp(fn, z, args, g, adjoint=adjoint, batched=True)
        else:
            options = dict(transpose=False, max_steps=256, rank=1)
            solve = jax.jit(lambda g: adjoint.solve(matvec, g, known, **options))
            y, stats = solve(g)
            stats["solution"] = y
        check(stats, known, jac, g, transpose)

"""Fixed-point problems with known answers, as data."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """`z = fn(z, args)`, its contraction factor in the Euclidean norm, and closed forms."""

    name: str
    fn: Callable
    z0: Any
    args: Any
    rate: float
    solution: Any  # z*
    cotangent: Any  # g = dL/dz*
    gradient: Any  # dL/dargs


def relative_error(tree, truth) -> float:
    """Euclidean, in NumPy float64."""
    flat = lambda t: np.concatenate(
        [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(t)]
    )
    return float(np.linalg.norm(flat(tree) - flat(truth)) / np.linalg.norm(flat(truth)))


def matrix(n: int, rate: float, seed: int) -> np.ndarray:
    """A non-symmetric n x n matrix with largest singular value `rate`."""
    a = np.random.default_rng(seed).standard_normal((n, n))
    return a * (rate / np.linalg.norm(a, 2))


def affine(n: int, rate: float, seed: int = 0, dtype=np.float32) -> Problem:
    """z = A z + b: z* = (I - A)^-1 b; with y = (I - A)^-T g, dL/db = y and dL/dA = y z*^T."""
    rng = np.random.default_rng(seed + 1)
    # The answer is that of the rounded data, so that rounding them is no error.
    a, b, g = (
        np.asarray(jnp.asarray(x, dtype), np.float64)
        for x in (matrix(n, rate, seed), rng.standard_normal(n), rng.standard_normal(n))
    )
    z = np.linalg.solve(np.eye(n) - a, b)
    y = np.linalg.solve((np.eye(n) - a).T, g)
    a_, b_, g_ = (jnp.asarray(x, dtype) for x in (a, b, g))
    fn = lambda z, args: args[0] @ z + args[1]
    z0 = jnp.zeros(n, dtype)
    return Problem(f"affine-{rate}", fn, z0, (a_, b_), rate, z, g_, (np.outer(y, z), y))


def tanh(n: int, rate: float, seed: int = 0, dtype=np.float32) -> Problem:
    """z = tanh(W z + x), solved by Newton's method in float64."""
    rng = np.random.default_rng(seed + 1)
    w, x, g = (
        np.asarray(jnp.asarray(x, dtype), np.float64)
        for x in (matrix(n, rate, seed), rng.standard_normal(n), rng.standard_normal(n))
    )
    z, s = np.zeros(n), np.ones(n)
    for _ in range(50):
        s = 1 - np.tanh(w @ z + x) ** 2
        z = z - np.linalg.solve(np.eye(n) - s[:, None] * w, z - np.tanh(w @ z + x))
    y = np.linalg.solve((np.eye(n) - s[:, None] * w).T, g) * s
    w_, x_, g_ = (jnp.asarray(x, dtype) for x in (w, x, g))
    fn = lambda z, args: jnp.tanh(args[0] @ z + args[1])
    return Problem(
        f"tanh-{rate}", fn, jnp.zeros(n, dtype), (w_, x_), rate, z, g_, (np.outer(y, z), y)
    )


def pytree(rate: float, seed: int = 0, dtype=np.float32) -> Problem:
    """The affine problem with its state split over a nested pytree of several shapes."""
    flat = affine(7, rate, seed, dtype)
    split = lambda v: {"a": v[:3], "b": (v[3:].reshape(2, 2), None)}
    join = lambda t: jnp.concatenate([t["a"], t["b"][0].reshape(4)])
    fn = lambda z, args: split(flat.fn(join(z), args))
    return flat._replace(
        name=f"pytree-{rate}",
        fn=fn,
        z0=split(flat.z0),
        solution=split(flat.solution),
        cotangent=split(flat.cotangent),
    )


def suite(dtype) -> list[Problem]:
    """The problems that every solver and every adjoint has to pass."""
    return [
        affine(8, 0.3, dtype=dtype),
        affine(8, 0.9, seed=3, dtype=dtype),
        tanh(8, 0.8, dtype=dtype),
        pytree(0.5, dtype=dtype),
    ]


nothing_but_nan = lambda tree: all(jnp.all(jnp.isnan(x)) for x in jax.tree.leaves(tree))


def noisy(size):
    """A cell that draws anew at each call, and at each call something else."""
    calls = collections.Counter()

    def draw(z):
        calls["f"] += 1
        return np.asarray(size * np.sin(calls["f"]), np.float32)

    def fn(z, a):
        # Depends on z, so that it is not taken out of the loop; it has no derivative.
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        noise = jax.pure_callback(draw, shape, jax.lax.stop_gradient(z))
        return jnp.tanh(a[0] @ z + a[1]) + noise

    return fn

"""Positive concave problems `z = sigma(W z + x)`, batches of them, solved in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The function, and its derivative as a function of its argument, in NumPy.
SIGMAS = {
    "tanh": (np.tanh, lambda u: 1 - np.tanh(u) ** 2),
    "relu6": (lambda u: np.clip(u, 0, 6), lambda u: ((u > 0) & (u < 6)).astype(float)),
    "sigmoid": (lambda u: 1 / (1 + np.exp(-u)), lambda u: np.exp(-u) / (1 + np.exp(-u)) ** 2),
    "soft_sign": (lambda u: u / (1 + u), lambda u: 1 / (1 + u) ** 2),
}
FUNCTIONS = {
    "tanh": jnp.tanh,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "soft_sign": jax.nn.soft_sign,
}
SUPREMUM = {"tanh": 1.0, "relu6": 6.0, "sigmoid": 1.0, "soft_sign": 1.0}


class Concave(NamedTuple):
    """A batch of problems that share W."""

    name: str
    fn: Any  # fn(z, (W, x)) of a batch
    one: Any  # of one
    args: Any
    solution: np.ndarray  # (batch, n), float64
    rho: np.ndarray  # (batch,), spectral radius at the solution


def concave(
    name: str, rho: float, x: float, n: int = 20, batch: int = 4, seed: int = 0, dtype=None
):
    """W uniform, of spectral radius `rho`; x uniform about `x`."""
    dtype = dtype or jnp.result_type(float)
    rng = np.random.default_rng(seed)
    w = rng.uniform(size=(n, n))
    w *= rho / np.abs(np.linalg.eigvals(w)).max()
    args = jnp.asarray(w, dtype), jnp.asarray(x * rng.uniform(0.5, 1.5, (batch, n)), dtype)
    w, xs = (np.asarray(a, np.float64) for a in args)  # that of the rounded data is meant
    act, slope = SIGMAS[name]
    z = np.stack([_newton(act, slope, w, x, SUPREMUM[name]) for x in xs])
    slopes = slope(z @ w.T + xs)
    radius = np.array([np.abs(np.linalg.eigvals(s[:, None] * w)).max() for s in slopes])
    sigma = FUNCTIONS[name]
    fn = lambda z, args: sigma(z @ args[0].T + args[1])
    return Concave(f"{name}-{rho}-{x}", fn, lambda z, a: sigma(a[0] @ z + a[1]), args, z, radius)


def _newton(act, slope, w, x, top):
    """Newton's method from above falls to the solution."""
    z, eye = np.full(len(x), top), np.eye(len(x))
    for _ in range(200):
        u = w @ z + x
        step = np.linalg.solve(eye - slope(u)[:, None] * w, z - act(u))
        z = z - step
        if np.abs(step).max() <= 1e-15 * np.abs(z).max():
            break
    assert np.abs(act(w @ z + x) - z).max() <= 1e-14 * np.abs(z).max()
    return z


def relative(z, truth) -> np.ndarray:
    """The largest relative error of each example."""
    return np.abs(np.asarray(z, np.float64) / truth - 1).max(-1)

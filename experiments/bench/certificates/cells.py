"""Batches of `z = sigma(W z + x)`, W >= 0, with solutions far more exact than what they judge.

Solved in NumPy: by Newton's method in float64, which falls to z* from above, then refined with
residuals in long double (64 bits of mantissa). `doubt` bounds what is left, and is the only
allowance that any comparison here makes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import deqjax
from deqjax.positive import AbstractActivation, Power, Shifted

from bench.problems import convolved, radius

LONG = np.longdouble
# Roundings of a function, an addition and a division in long double, of a few units each.
_UNITS = 100


class Sigma(NamedTuple):
    """An activation: in JAX, and its value and slope in NumPy, in any precision."""

    jax: Callable[[Any], Any]
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]

    @property
    def supremum(self) -> float:
        return deqjax.positive.qualify(self.jax).supremum


def _erf(u: np.ndarray) -> np.ndarray:
    """SciPy has none in long double: exp(-u^2) times a series without a negative term."""
    if u.dtype != LONG:
        return special.erf(u)
    cut = np.minimum(u, 7)  # erf(7) = 1 - 4e-23
    term = total = cut
    for k in range(1, 260):
        term = term * 2 * cut**2 / (2 * k + 1)
        total = total + term
    root = np.sqrt(4 * np.arctan(LONG(1)))
    return np.minimum(2 / root * np.exp(-(cut**2)) * total, 1)


def _cosh(u: np.ndarray) -> np.ndarray:
    return np.cosh(np.minimum(u, 300))


# Constants that float32 holds exactly: the f that is meant is that of the stored numbers.
_SHIFTED, _POWER = Shifted(jnp.tanh, 1.25), Power(0.5, 2.0**-10)
SIGMAS: dict[str, Sigma] = {
    "tanh": Sigma(jnp.tanh, np.tanh, lambda u: 1 / _cosh(u) ** 2),
    "relu6": Sigma(jax.nn.relu6, lambda u: np.minimum(u, 6), lambda u: (u < 6).astype(u.dtype)),
    "sigmoid": Sigma(jax.nn.sigmoid, lambda u: 1 / (1 + np.exp(-u)),
                     lambda u: np.exp(-u) / (1 + np.exp(-u)) ** 2),
    "soft_sign": Sigma(jax.nn.soft_sign, lambda u: u / (1 + u), lambda u: 1 / (1 + u) ** 2),
    "hard_tanh": Sigma(jax.nn.hard_tanh, lambda u: np.minimum(u, 1),
                       lambda u: (u < 1).astype(u.dtype)),
    "arctan": Sigma(jnp.arctan, np.arctan, lambda u: 1 / (1 + u**2)),
    "erf": Sigma(jax.lax.erf, _erf,
                 lambda u: 2 / math.sqrt(math.pi) * np.exp(-(np.minimum(u, 100) ** 2))),
    "saturating": Sigma(deqjax.positive.saturating, lambda u: -np.expm1(-u), lambda u: np.exp(-u)),
    "log1p": Sigma(jnp.log1p, np.log1p, lambda u: 1 / (1 + u)),
    "sqrt": Sigma(jnp.sqrt, np.sqrt, lambda u: 0.5 / np.sqrt(u)),
    "hard_sigmoid": Sigma(jax.nn.hard_sigmoid, lambda u: np.minimum(u + 3, 6) / 6,
                          lambda u: (u < 3).astype(u.dtype) / 6),
    "tanh + 1.25": Sigma(_SHIFTED, lambda u: np.tanh(u) + 1.25, lambda u: 1 / _cosh(u) ** 2),
    "sqrt(u + 2^-10)": Sigma(_POWER, lambda u: np.sqrt(u + 2.0**-10),
                             lambda u: 0.5 / np.sqrt(u + 2.0**-10)),
}  # fmt: skip


def untested() -> list[str]:
    """Activations that qualify and are not in the table above, which should be none."""
    known = [s.jax for s in SIGMAS.values() if not isinstance(s.jax, AbstractActivation)]
    records = {deqjax.positive.ACTIVATIONS[s] for s in known}
    names = {s.__name__ for s in known} | {"atan", "logistic", "expit"}  # other names of the same
    every = deqjax.positive.ACTIVATIONS.items()
    return [s.__name__ for s, record in every if record not in records or s.__name__ not in names]


class Batch(NamedTuple):
    """Problems that share W (n, n), or have one each (b, n, n); x (b, n)."""

    name: str
    w: np.ndarray
    x: np.ndarray
    solution: np.ndarray  # (b, n), long double
    doubt: np.ndarray  # (b, n): |solution - z*| is at most so much
    jacobian: np.ndarray  # (b, n, n) at the solution, long double

    @property
    def args(self) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.w), jnp.asarray(self.x)

    @property
    def fn(self) -> Callable[[jax.Array, tuple[jax.Array, jax.Array]], jax.Array]:
        """f of the whole batch; one object for one activation, so that nothing is retraced."""
        return function(self.name, self.w.ndim == 2)

    def error(self, z: Any) -> np.ndarray:
        """The largest relative error of an entry per example."""
        return np.abs(np.asarray(z, LONG) / self.solution - 1).max(-1)

    def steps(self, dtype: Any, rtol: float, most: int) -> int | None:
        """Picard steps from 0 in `dtype` until the true error of all is at most rtol."""
        w, x, value = self.w.astype(dtype), self.x.astype(dtype), SIGMAS[self.name].value
        z, target = np.zeros_like(x), self.solution.astype(float)
        for k in range(most):
            z = value(z @ w.T + x)
            if np.abs(z / target - 1).max() <= rtol:
                return k + 1
        return None


@functools.cache
def function(name: str, shared: bool) -> Callable:
    sigma = SIGMAS[name].jax

    def fn(z, args):
        w, x = args
        return sigma((z @ w.T if shared else jnp.einsum("bij,bj->bi", w, z)) + x)

    return fn


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.linalg.solve(matrix, right.astype(float)[..., None])[..., 0]


def solved(name: str, w: np.ndarray, x: np.ndarray) -> Batch:
    """The solutions for the numbers as they are stored."""
    sigma, n = SIGMAS[name], x.shape[-1]
    eye = np.eye(n)

    def written(dtype: Any) -> tuple[Callable, Callable]:
        """f and its Jacobian in this precision."""
        wide, add = np.broadcast_to(w, (*x.shape, n)).astype(dtype), x.astype(dtype)
        u = lambda z: np.matmul(wide, z[..., None])[..., 0] + add
        slopes = lambda z: (sigma.slope(u(z))[..., None] * wide).astype(dtype)
        return lambda z: sigma.value(u(z)), slopes

    # Newton's method in float64, from above.
    f, jacobian = written(float)
    z = np.full(x.shape, min(sigma.supremum, 1e3))
    while np.any(low := np.any(f(z) > z * (1 + 1e-12), -1)):
        z[low] *= 2
    for _ in range(300):
        step = _solve(eye - jacobian(z), z - f(z))
        z = z - step
        if np.all(np.abs(step) <= 1e-14 * z):
            break
    # Refined with residuals in long double.
    f, jacobian = written(LONG)
    z, matrix = z.astype(LONG), eye
    for _ in range(4):
        matrix = (eye - jacobian(z)).astype(float)
        z = z + _solve(matrix, f(z) - z)
    left = np.abs(f(z) - z) + (2 * n + _UNITS) * float(np.finfo(LONG).eps) * z
    # z - z* = (I - J)^-1 (z - f(z)) to first order; twice that, for the rest of it.
    doubt = 2 * _solve(matrix, left)
    worst = float(np.max(doubt / z))
    if not (np.all(doubt > 0) and worst < 1e-13):
        raise RuntimeError(f"The solutions of {name} problems are in doubt by {worst:.1e}.")
    return Batch(name, w, x, z, doubt, jacobian(z))


def dense(name: str, rho: float, x: float, batch: int, n: int, dtype: Any, seed: int = 0) -> Batch:
    """One W, uniform, with this spectral radius; x uniform in [0.5, 1.5] times `x`."""
    rng = np.random.default_rng(seed)
    w = rng.uniform(size=(n, n))
    w *= rho / radius(w)
    return solved(name, w.astype(dtype), (x * rng.uniform(0.5, 1.5, (batch, n))).astype(dtype))


class Images(NamedTuple):
    """A convolutional cell, its x, and the same problem written out as a dense one."""

    cell: deqjax.nn.PositiveConcaveConv2d
    x: jax.Array
    written: Batch


def images(
    name: str, rho: float, x: float, batch: int, size: int, channels: int, dtype: Any, seed: int = 0
) -> Images:
    """`size` x `size` images; the matrix is read off a convolution of unit images in float64."""
    make = deqjax.nn.PositiveConcaveConv2d
    rng = np.random.default_rng(seed)
    kernel, shape = rng.uniform(size=(3, 3, channels, channels)), (size, size, channels)
    n = math.prod(shape)
    units = np.eye(n).reshape(n, *shape)
    matrix = lambda kernel: convolved(units, kernel[None]).reshape(n, n).T
    kernel = (kernel * rho / radius(matrix(kernel))).astype(dtype)
    cell = make(channels, 3, SIGMAS[name].jax, nonnegative=None, dtype=dtype, key=jax.random.key(0))
    cell = eqx.tree_at(lambda cell: cell.weight, cell, jnp.asarray(kernel))
    x_in = (x * rng.uniform(0.5, 1.5, (batch, *shape))).astype(dtype)
    written = solved(name, matrix(kernel.astype(float)).astype(dtype), x_in.reshape(batch, n))
    return Images(cell, jnp.asarray(x_in), written)

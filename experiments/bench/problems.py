"""Fixed-point problems on which solvers are held against each other, with what is known of each.

All are made in NumPy float64 from a seed, solved there, and rounded to the dtype that is asked for.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike


class Problem(NamedTuple):
    """`z = fn(z, args)`."""

    name: str
    fn: Callable[[Any, Any], Any]
    z0: Any
    args: Any
    solution: Any  # float64
    rho: float  # spectral radius of df/dz at the solution

    @property
    def picard(self) -> bool:
        """Tells whether Picard iteration converges."""
        return self.rho < 1

    def astype(self, dtype: DTypeLike) -> "Problem":
        """The problem with z0 and args in `dtype`."""
        cast = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
        return self._replace(z0=cast(self.z0), args=cast(self.args))


def _affine(z, args):
    return z @ args[0].T + args[1]


def _tanh(z, args):
    return jnp.tanh(z @ args[0].T + args[1])


def _relu6(z, args):
    return jnp.clip(z @ args[0].T + args[1], 0, 6)


# The function, and its derivative as a function of its value, in NumPy.
_ACTIVATIONS = {
    _affine: (lambda u: u, lambda z: np.ones_like(z)),
    _tanh: (np.tanh, lambda z: 1 - z**2),
    _relu6: (lambda u: np.clip(u, 0, 6), lambda z: ((z > 0) & (z < 6)).astype(float)),
}


def radius(matrix: np.ndarray) -> float:
    """The largest modulus of an eigenvalue."""
    return float(np.abs(np.linalg.eigvals(matrix.astype(float))).max())


def convolved(z: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Images (b, h, w, i) with kernels (b or 1, 3, 3, i, o), zero padding, in any precision."""
    h, w = z.shape[1:3]
    padded = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = itertools.product(range(3), range(3))
    parts = [padded[:, a : a + h, b : b + w] @ kernel[:, None, a, b] for a, b in taps]
    return np.add.reduce(parts)


def _make(name: str, fn: Callable, a: np.ndarray, b: np.ndarray, start: float = 0.0) -> Problem:
    """Solved by Newton's method after Picard steps from `start`, the basin of one solution."""
    act, slope = _ACTIVATIONS[fn]
    z, eye = np.full(len(b), start), np.eye(len(b))
    for _ in range(0 if fn is _affine else 2000):
        z = act(a @ z + b)
    for _ in range(60):
        z = act(a @ z + b)
        if np.linalg.norm(act(a @ z + b) - z) <= 1e-14 * np.linalg.norm(z):
            break
        z = z - np.linalg.solve(eye - slope(z)[:, None] * a, z - act(a @ z + b))
    assert np.linalg.norm(act(a @ z + b) - z) <= 1e-11 * np.linalg.norm(z), name
    return Problem(name, fn, np.zeros(len(b)), (a, b), z, radius(slope(z)[:, None] * a))


def linear(rho: float, n: int = 40, seed: int = 0, both: bool = False) -> Problem:
    """z = A z + b, A symmetric with eigenvalues evenly from 0 (or -rho) to rho."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    a = (q * np.linspace(-rho if both else 0, rho, n)) @ q.T
    return _make(f"linear{', +-' if both else ' '}{rho}", _affine, a, rng.standard_normal(n))


def rotation(rho: float, angle: float = 1.5, n: int = 20, seed: int = 0) -> Problem:
    """z = A z + b, A of rho times plane rotations by half to all of `angle` radians."""
    rng = np.random.default_rng(seed)
    a = np.zeros((n, n))
    for i, t in enumerate(np.linspace(angle / 2, angle, n // 2)):
        c, s = rho * np.cos(t), rho * np.sin(t)
        a[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return _make(f"rotation {rho}", _affine, a, rng.standard_normal(n))


def tanh(norm: float, n: int = 80, seed: int = 0, scale: float = 1.0) -> Problem:
    """z = tanh(W z + x), W Gaussian with this spectral norm, x Gaussian with this deviation."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, n))
    w *= norm / np.linalg.norm(w, 2)
    return _make(f"tanh, norm {norm}", _tanh, w, scale * rng.standard_normal(n))


def positive(fn: Callable, rho: float, x: float, n: int = 80, seed: int = 0) -> Problem:
    """z = sigma(W z + x), W uniform and nonnegative with this spectral radius, x about `x` > 0."""
    rng = np.random.default_rng(seed)
    w = rng.uniform(size=(n, n))
    w *= rho / radius(w)
    name = f"{fn.__name__.strip('_')}, W >= 0, rho(W) {rho}"
    return _make(name, fn, w, x * rng.uniform(0.5, 1.5, n), start=6.0)


def slow_tanh() -> Problem:
    """Positive concave, with rho(J) = 0.996: tanh(u) ~ u - u^3 / 3 gives it by the size of x."""
    return positive(_tanh, 1.0, 8.5e-5)._replace(name="tanh, rho(J) 0.996")


def split(p: Problem) -> Problem:
    """The same problem with its state cut into a pytree of three leaves."""
    cut = lambda v: {"a": v[:3], "b": (v[3:7].reshape(2, 2), v[7:])}
    join = lambda t: jnp.concatenate([t["a"], t["b"][0].reshape(4), t["b"][1]])
    fn = lambda t, args: cut(p.fn(join(t), args))
    return p._replace(name=f"{p.name}, pytree", fn=fn, z0=cut(p.z0), solution=cut(p.solution))


def suite(scale: int = 1) -> list[Problem]:
    """Every problem of one state, of 8 to 80 unknowns times `scale`; `slow_tanh` has 80."""
    k = scale
    return [
        *(linear(rho, n=40 * k) for rho in (0.1, 0.5, 0.9, 0.99, 0.999)),
        linear(0.99, n=40 * k, both=True),
        rotation(0.9, n=20 * k),
        rotation(1.0, n=20 * k),
        rotation(1.2, n=20 * k),
        tanh(0.8, n=8 * k),
        tanh(0.99, n=80 * k, scale=0.05),
        tanh(1.95, n=80 * k, scale=0.1),
        slow_tanh(),
        positive(_tanh, 1.0, 8.5e-5, n=80 * k, seed=1),
        positive(_relu6, 0.999, 3e-3, n=80 * k),
        positive(_relu6, 1.01, 1e-3, n=80 * k),
        split(linear(0.9, n=40 * k, seed=1)),
    ]


def mixed(easy: int = 31, seed: int = 0) -> Problem:
    """A batch of `easy` problems with rho 0.3 and a last one with rho 0.99, along axis 0."""
    parts = [linear(0.3, n=16, seed=seed + i) for i in range(easy)]
    parts.append(linear(0.99, n=16, seed=seed + easy))
    stack = lambda *leaves: np.stack(leaves)
    z0, args, solution = jax.tree.map(stack, *((p.z0, p.args, p.solution) for p in parts))
    fn = lambda z, args: jax.vmap(_affine)(z, args)
    return Problem(f"mixed batch, {easy} easy and 1 hard", fn, z0, args, solution, 0.99)

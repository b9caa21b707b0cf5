"""Implicit gradients by dense linear algebra in float64, for problems of `bench.problems.py`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bench import problems as _p


class Dense(NamedTuple):
    """A problem, and the loss `<g, z>` on it."""

    problem: _p.Problem
    jacobian: np.ndarray  # df/dz at the solution
    g: Any  # shaped like z
    pull: Any  # dL/dargs from y, a flat vector

    @property
    def inverse(self) -> np.ndarray:
        return np.linalg.inv(np.eye(len(self.jacobian)) - self.jacobian)

    @property
    def condition(self) -> float:
        """The condition of I - J: by how much a relative residual can understate an error."""
        eye = np.eye(len(self.jacobian))
        return float(np.linalg.norm(self.inverse, 2) * np.linalg.norm(eye - self.jacobian, 2))

    def implicit(self):
        """`(df/dtheta)^T (I - J)^-T g`."""
        return self.pull(self.inverse.T @ flat(self.g))

    def phantom(self, steps: int, damp: float):
        """`(1 - damp) sum_k (df/dtheta)^T (B^T)^k g` over k < steps, B = damp I + (1 - damp) J."""
        b = damp * np.eye(len(self.jacobian)) + (1 - damp) * self.jacobian
        powers = (np.linalg.matrix_power(b.T, k) for k in range(steps))
        return self.pull((1 - damp) * sum(powers) @ flat(self.g))


def flat(tree: Any) -> np.ndarray:
    """All leaves in one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def dense(problem: _p.Problem, seed: int = 0) -> Dense:
    """With a random g; in float64 whatever the mode."""
    with jax.enable_x64(True):
        p = problem.astype(jnp.float64)
        z, unravel = ravel_pytree(jax.tree.map(jnp.asarray, p.solution))
        g = np.random.default_rng(seed).standard_normal(z.size)
        f = lambda z, args: ravel_pytree(p.fn(unravel(z), args))[0]
        jacobian, vjp = jax.jit(lambda z, args: (jax.jacfwd(f)(z, args), args))(z, p.args)
        pull = lambda y: jax.vjp(lambda a: f(z, a), vjp)[1](jnp.asarray(y))[0]

        def pulled(y):
            with jax.enable_x64(True):
                return jax.tree.map(np.asarray, pull(y))

        return Dense(problem, np.asarray(jacobian), jax.tree.map(np.asarray, unravel(g)), pulled)


def affine(n: int = 10) -> list[Dense]:
    """One function and one shape: they share what is compiled."""
    problems = [
        _p.linear(0.5, n),
        _p.linear(0.9, n),
        _p.linear(0.99, n),
        _p.linear(0.9, n, both=True),
        _p.rotation(0.8, n=n),
        _p.rotation(1.2, n=n),
    ]
    return [dense(p) for p in problems]


def curved(n: int = 10) -> list[Dense]:
    """Another such family: tanh."""
    problems = [_p.tanh(0.8, n), _p.tanh(0.95, n, scale=0.1), _p.positive(_p._tanh, 1.0, 3e-3, n)]
    return [dense(p) for p in problems]


def tree(n: int = 10) -> list[Dense]:
    """A pytree state."""
    return [dense(_p.split(_p.linear(0.8, n, seed=1)))]

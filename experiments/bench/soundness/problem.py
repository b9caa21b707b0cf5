"""A cell's solve, for the programs in which its gradient is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

EXAMPLES = 2
STEPS = 8  # an even number is two of each


class Problem(NamedTuple):
    """A cell's function and its arrays, in the dtype of the program."""

    fn: Callable[[Any, Any, Any], Any]
    beta: float
    w: Any
    x: Any
    z0: Any
    g: Any

    def solver(self, tol: float = 0.0) -> deqjax.Reversible:
        return deqjax.Reversible(rtol=tol, atol=tol, beta=self.beta)


def solve(p: Problem, w, x, z0, tol=0.0, **more):
    f = lambda z, a: p.fn(z, *a)
    if more.get("batched"):
        f = lambda z, a: jax.vmap(p.fn, (0, None, 0))(z, *a)
    options: Any = dict(max_steps=STEPS, adjoint=deqjax.ReversibleAdjoint()) | more
    return deqjax.fixed_point(f, p.solver(tol), z0, (w, x), **options)


def dot(a, b):
    return jnp.sum(a.astype(jnp.promote_types(a.dtype, jnp.float32)) * b)


def fixed_steps(count: int) -> np.ndarray:
    return np.full(count, STEPS)


def first_example(p: Problem):
    return p.w, p.x[0], p.z0[0]


def loss_of(p: Problem, w, x, z0, **more):
    return dot(solve(p, w, x, z0, **more).value, p.g[0])


def of_first(out, steps: int = STEPS):
    """Of the first example alone."""
    w, x, z0 = out
    return w, None if x is None else x[None], None if z0 is None else z0[None], np.array([steps])

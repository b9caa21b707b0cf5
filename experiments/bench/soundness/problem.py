"""A cell's solve, for the programs in which its gradient is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import deqjax

EXAMPLES = 2
STEPS = 8  # an even number is two of each
OPTIONS: dict[str, Any] = {"max_steps": STEPS, "adjoint": deqjax.ReversibleAdjoint()}


class Problem(NamedTuple):
    """A cell's function and its arrays, in the dtype of the program."""

    fn: Callable[[Any, Any, Any], Any]
    beta: float
    w: Any
    x: Any
    z0: Any
    g: Any

    @property
    def first(self) -> tuple[Any, Any, Any]:
        """Arguments of the first example alone."""
        return self.w, self.x[0], self.z0[0]

    def solver(self, tol: float = 0.0) -> deqjax.Reversible:
        return deqjax.Reversible(rtol=tol, atol=tol, beta=self.beta)

    def solve(self, w: Any, x: Any, z0: Any, tol: float = 0.0, **more: Any) -> deqjax.Solution:
        f = jax.vmap(self.fn, (0, None, 0)) if more.get("batched") else self.fn
        fn, options = lambda z, a: f(z, *a), OPTIONS | more
        return deqjax.fixed_point(fn, self.solver(tol), z0, (w, x), **options)


def dot(a, b):
    return jnp.sum(a.astype(jnp.promote_types(a.dtype, jnp.float32)) * b)

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._iterate import checkpointed_while, last_steps, lax_while
from .._tree import mesh_axes, select, stop_gradient, straight_through, vary
from ..solvers import Anderson, Broyden
from ._base import AbstractAdjoint, check_ceiling, check_last, unpack


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    """Differentiates the steps that were taken, recomputing them from checkpoints.

    The gradient is exactly that of the unrolled solver, for every solver and any number of steps,
    in forward and reverse mode and to any order.

    **Arguments:**

    - `checkpoints`: the number of stretches into which `max_steps` is divided; the state is stored
        at the start of each. `None` is `sqrt(max_steps)`, which needs the least memory.
    - `last`: K, to differentiate only the last K steps of each problem (truncated backpropagation):
        the state before them is a constant. The gradient is that of `jax.lax.stop_gradient` there,
        to any order. `None` is all steps.

    **Cost:** three evaluations of `f` and one VJP per step: once forwards, once to recompute its
    stretch, once for its VJP. `checkpoints + max_steps / checkpoints` copies of the state, and
    about four of the parameters. Steps after a stop are skipped, except under `jax.vmap` and in
    `jax.shard_map`, where each call costs `max_steps` steps. With `last=K` this is the cost of K
    steps; those before them take one evaluation each. With a tolerance, or in a loop of
    Optimistix, the solve runs twice, also if nothing is differentiated: only after the first run is
    it known which steps are the last. For evaluation leave `last` out.

    **When not to use it:** at a converged fixed point, where `deqjax.ImplicitAdjoint` gives the
    derivative with O(1) memory; for `deqjax.Reversible`, where `deqjax.ReversibleAdjoint` gives the
    same gradient with two stored states and one evaluation of f fewer per step. The derivative of
    the steps of `deqjax.Anderson` and `deqjax.Broyden` lags behind the value, far more than that of
    Picard steps: in float64 its error was 5.9e-3 where the value was right to 1e-6.

    **Raises:** `ValueError` for `checkpoints` or `last` below 1, with no `max_steps` (Optimistix
    allows `None`), or with `deqjax.Anderson` or `deqjax.Broyden` and a state narrower than float64,
    in which the derivatives of their coefficients are noise.

    Reference: Griewank and Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000); this
    is their scheme with two levels.
    """

    checkpoints: int | None = None
    last: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.checkpoints is not None and self.checkpoints < 1:
            raise ValueError(
                f"RecursiveCheckpointAdjoint expects at least 1 checkpoint, got "
                f"{self.checkpoints}; pass None for the default number."
            )
        check_last("RecursiveCheckpointAdjoint", self.last)

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        del rewrite_fn, tags
        p = unpack(inputs)
        narrow = any(jnp.finfo(x.dtype).bits < 64 for x in jax.tree.leaves(p.z0))
        if isinstance(p.solver, Anderson | Broyden) and narrow:
            raise ValueError(
                f"RecursiveCheckpointAdjoint expects a float64 state with "
                f"{type(p.solver).__name__}, got {eqx.tree_pformat(p.z0)}; use "
                f"deqjax.ImplicitAdjoint(), or differentiate deqjax.FixedPointIteration: near a "
                f"fixed point the coefficients of these steps are quotients of roundings, and "
                f"their derivatives are noise."
            )
        check_ceiling("RecursiveCheckpointAdjoint", p.max_steps)
        loop = ft.partial(checkpointed_while, checkpoints=self.checkpoints)
        if self.last is None:
            return primal_fn((*inputs, loop))
        if p.budget is None:  # Optimistix's loop, which cannot start in the middle
            return primal_fn((*inputs, ft.partial(_last_of_while, last=self.last, loop=loop)))
        if p.budget.fixed:
            return last_steps((*inputs, loop), p.budget.limit, self.last)
        # The number of steps is known only after the solve.
        z, result = primal_fn((*stop_gradient(inputs), lax_while))
        again, _ = last_steps((*inputs, loop), result.state.index, self.last)
        return straight_through(z, again), result


def _last_of_while(
    cond: Callable, body: Callable, init: Any, *, max_steps: int, last: int, loop: Callable
) -> Any:
    """A `while` loop that is differentiated through its last steps alone, by `loop`."""
    constant, constant_body = stop_gradient((init, eqx.filter_closure_convert(body, init)))
    start = (vary(jnp.asarray(0), mesh_axes(init)), constant)
    advance = lambda carry: (carry[0] + 1, constant_body(carry[1]))
    n, _ = lax_while(lambda c: cond(c[1]), advance, start, max_steps=max_steps)
    early = jnp.maximum(n - last, 0)
    _, state = lax_while(lambda c: c[0] < early, advance, start)
    return loop(cond, body, select(early > 0, state, init), max_steps=min(last, max_steps))

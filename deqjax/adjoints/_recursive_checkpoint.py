import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._tree import mesh_axes, select, vary
from ._base import AbstractAdjoint


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    """Differentiates the steps that were taken, recomputing them from checkpoints.

    The gradient is exactly that of the unrolled solver, for every solver and any number of steps,
    in forward and reverse mode and to any order.

    **Arguments:**

    - `checkpoints`: how many stretches `max_steps` is divided into, the state being kept at the
        start of each; `None` is `sqrt(max_steps)`, which needs the least memory.

    **Cost:** three evaluations of `f` and one VJP a step: once forwards, once to recompute its
    stretch, once for its VJP. `checkpoints + max_steps / checkpoints` copies of the state, and
    about four of the parameters. Steps beyond a stop are skipped, except under `jax.vmap` and in
    `jax.shard_map`, where each call costs
    `max_steps` of them.

    **When not to use it:** at a converged fixed point `deqjax.ImplicitAdjoint` gives its derivative
    at O(1) memory, and within its bound `deqjax.ReversibleAdjoint` that of the steps.

    **Raises:** `ValueError` for `checkpoints < 1`, or with no `max_steps` (Optimistix allows
    `None`).

    Reference: Griewank and Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26 (2000); this
    is their scheme with two levels.
    """

    checkpoints: int | None = None

    def __check_init__(self):
        if self.checkpoints is not None and self.checkpoints < 1:
            raise ValueError(
                f"RecursiveCheckpointAdjoint expects at least 1 checkpoint, got "
                f"{self.checkpoints}; None chooses their number."
            )

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        """See `deqjax.adjoints`."""
        del rewrite_fn, tags
        return primal_fn((*inputs, ft.partial(_while_loop, checkpoints=self.checkpoints)))


def _while_loop(
    cond: Callable, body: Callable, init: Any, *, max_steps: int | None, checkpoints: int | None
) -> Any:
    """`jax.lax.while_loop` as a checkpointed scan of stretches of checkpointed steps."""
    if max_steps is None:
        raise ValueError(
            "RecursiveCheckpointAdjoint expects a number as max_steps, got None; "
            "choose a ceiling on the number of steps."
        )
    stretches = min(checkpoints or math.isqrt(max_steps - 1) + 1, max_steps)
    length = -(-max_steps // stretches)
    # Devices of a shard_map that stop at different steps may not branch: the sums over devices in
    # the transpose of a branch would wait for ever.
    axes = mesh_axes(init)

    def if_going(fn, carry):
        k, state = carry
        going = cond(state) & (k < max_steps)
        if axes:
            return select(going, fn(carry), carry)
        return jax.lax.cond(going, fn, lambda carry: carry, carry)

    def step(carry):
        k, state = carry
        return k + 1, body(state)

    def scan(fn, length):
        fn = jax.checkpoint(fn, prevent_cse=False)
        return lambda carry: jax.lax.scan(lambda c, _: (fn(c), None), carry, length=length)[0]

    stretch = scan(ft.partial(if_going, step), length)
    return scan(ft.partial(if_going, stretch), stretches)((vary(jnp.asarray(0), axes), init))[1]

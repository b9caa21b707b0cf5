import functools as ft
from collections.abc import Callable

import equinox.internal as eqxi
from jaxtyping import PyTree

from .._tree import mesh_axes
from ._base import AbstractAdjoint


class RecursiveCheckpointAdjoint(AbstractAdjoint):
    """Differentiates the steps that were taken, recomputing them from checkpoints.

    The gradient is exactly that of the unrolled solver, for every solver and any number of steps.

    **Arguments:**

    - `checkpoints`: copies of the solver's state to keep; `None` chooses about `log(max_steps)` to
        `sqrt(max_steps)` of them, as `equinox.internal.while_loop` does.

    **Cost:** one VJP of `f` a step, and each step recomputed a small number of times (once, with as
    many checkpoints as steps); `checkpoints` copies of the state.

    **When not to use it:** at a converged fixed point `deqjax.ImplicitAdjoint` gives its derivative
    at O(1) memory. No forward mode.

    **Raises:** `ValueError` inside `jax.shard_map`, which the checkpointed loop does not support:
    use `deqjax.ReversibleAdjoint` or `deqjax.ImplicitAdjoint` there.

    Reference: Stumm and Walther, New algorithms for optimal online checkpointing, SIAM J. Sci.
    Comput. 32 (2010).
    """

    checkpoints: int | None = None

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        """See `deqjax.adjoints`."""
        del rewrite_fn, tags
        axes = mesh_axes(inputs)
        if axes:
            raise ValueError(
                f"RecursiveCheckpointAdjoint expects to be used outside jax.shard_map, got inputs "
                f"that vary over the mesh axes {sorted(map(str, axes))}; use "
                f"deqjax.ReversibleAdjoint or deqjax.ImplicitAdjoint, or jax.jit with NamedSharding."
            )
        loop = ft.partial(eqxi.while_loop, kind="checkpointed", checkpoints=self.checkpoints)
        return primal_fn((*inputs, loop))

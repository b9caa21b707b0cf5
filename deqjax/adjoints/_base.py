"""What every adjoint shares.

`apply` is the one seam between a solve and its derivative. Both front doors call it as Optimistix
does, `adjoint.apply(primal_fn, rewrite_fn, inputs, tags)`: `primal_fn(inputs + (while_loop,))`
runs the loop, `rewrite_fn(z, None, inputs)` is `f(z) - z`.
"""

from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import optimistix
from jaxtyping import PyTree

AbstractAdjoint = optimistix.AbstractAdjoint


class Problem(NamedTuple):
    """What an adjoint knows of the solve that it differentiates."""

    fn: Any
    solver: Any
    z0: PyTree
    args: PyTree
    max_steps: int | None
    batched: bool
    rest: tuple  # the other inputs, in their places


def unpack(inputs: tuple) -> Problem:
    """Reads the positional inputs of either front door; Optimistix's layout is private."""
    fn, solver, z0, args, *rest = inputs
    if len(inputs) == 5:  # deqjax: one Budget
        (budget,) = rest
        return Problem(fn, solver, z0, args, budget.max_steps, budget.batched, tuple(rest))
    if len(inputs) == 9:  # Optimistix: options, max_steps, f_struct, aux_struct, tags
        return Problem(fn, solver, z0, args, rest[1], False, tuple(rest))
    raise ValueError(
        f"Expected the 5 inputs of deqjax or the 9 of Optimistix 0.1, got {len(inputs)}; "
        f"install optimistix>=0.1,<0.2."
    )


def stop_gradient(tree: PyTree) -> PyTree:
    """`jax.lax.stop_gradient` on the inexact arrays of any pytree."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def no_gradient(tree: PyTree) -> PyTree:
    """`tree`, raising if a loss ever differentiates it: better than a silently dropped term."""
    return jax.tree.map(eqxi.nondifferentiable_backward, tree)

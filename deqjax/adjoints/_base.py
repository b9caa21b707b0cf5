"""What every adjoint shares.

`apply` is the one seam between a solve and its derivative. Both front doors call it as Optimistix
does, `adjoint.apply(primal_fn, rewrite_fn, inputs, tags)`: `primal_fn(inputs + (while_loop,))`
runs the loop, `rewrite_fn(z, None, inputs)` is `f(z) - z`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import PyTree

from .._tree import dot, mesh_axes, scale, vary

AbstractAdjoint = optimistix.AbstractAdjoint


class Problem(NamedTuple):
    """What an adjoint knows of the solve that it differentiates."""

    fn: Any
    solver: Any
    z0: PyTree
    args: PyTree
    max_steps: int | None
    rank: int
    rest: tuple  # the other inputs, in their places


def unpack(inputs: tuple) -> Problem:
    """Reads the positional inputs of either front door; Optimistix's layout is private."""
    fn, solver, z0, args, *rest = inputs
    if len(inputs) == 5:  # deqjax: one Budget
        (budget,) = rest
        return Problem(fn, solver, z0, args, budget.max_steps, budget.rank, tuple(rest))
    if len(inputs) == 9:  # Optimistix: options, max_steps, f_struct, aux_struct, tags
        return Problem(fn, solver, z0, args, rest[1], 0, tuple(rest))
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


def tangent_of_extras(extras: PyTree, t_z: PyTree) -> PyTree:
    """Zero, but made of tangents: so that `no_gradient` notices a loss of the extras."""
    zero = dot(t_z, scale(0, t_z))
    like = lambda x: vary(jnp.broadcast_to(zero.astype(x.dtype), x.shape), mesh_axes(x))
    return jax.tree.map(like, eqx.filter(extras, eqx.is_inexact_array))


def strong(tree: PyTree) -> PyTree:
    """`tree` as strongly typed arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def check_cotangent(name: str, z: PyTree, cotangent: PyTree) -> None:
    """Raises `ValueError` unless `cotangent` is shaped like `z`."""
    if jax.eval_shape(lambda: z) != jax.eval_shape(lambda: cotangent):
        raise ValueError(
            f"{name} expects a cotangent of the structure, shapes and dtypes of z, "
            f"{eqx.tree_pformat(z)}, got {eqx.tree_pformat(cotangent)}."
        )


def arrays_of(fn: Callable, z: PyTree, args: PyTree) -> tuple[PyTree, Callable]:
    """The inexact arrays of the pytree `fn`, and `call(own, z, args)`, a pytree of the hidden ones.

    One of the two has none: it could not be said which of the cotangents is whose.
    """
    own, static = eqx.partition(fn, eqx.is_inexact_array)
    whole = lambda own, z, args: eqx.combine(own, static)(z, args)
    call = eqx.filter_closure_convert(whole, own, z, args)
    if jax.tree.leaves(own) and jax.tree.leaves(eqx.filter(call, eqx.is_inexact_array)):
        raise ValueError(
            "implicit_vjp and reversible_vjp expect an fn that either holds its arrays (an Equinox "
            "module) or closes over them, got one that does both; pass the arrays it closes over "
            "through args."
        )
    return own, call

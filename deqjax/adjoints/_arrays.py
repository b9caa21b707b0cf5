"""The arrays of a function and of its arguments, for a backward pass that returns cotangents."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from .._traced import Traced, trace


class Own(NamedTuple):
    """A function, the arrays that it holds, and the arrays of its arguments, each in one list.

    Either the own or the hidden arrays are empty, so that it is clear where a cotangent belongs.
    """

    call: Traced  # call(own, z, args), a pytree of the hidden arrays, which fn closes over
    own: list[Array]
    args: list[Array]


def arrays_of(name: str, fn: Callable, z: PyTree, *args: PyTree) -> tuple[Own, Callable]:
    """The arrays of `fn(z, *args)`, and a function that gives their cotangents the form of `fn`.

    It returns those of `fn` and of the first of `args`.
    """
    own, static = eqx.partition(fn, eqx.is_inexact_array)
    whole = lambda own, z, args: eqx.combine(own, static)(z, *args)
    call = trace(whole, own, z, args)
    own, own_tree = jax.tree.flatten(own)
    arrays, args_tree = jax.tree.flatten(eqx.filter(args, eqx.is_array))
    if own and any(map(eqx.is_inexact_array, call.consts)):
        raise ValueError(
            f"{name} expects an fn that either holds its arrays (an Equinox module) or closes over "
            f"them, got one that does both; pass the arrays it closes over, or makes, through args."
        )

    def form(d: Own) -> tuple[PyTree, PyTree]:
        hidden = jax.tree.leaves(d.call)
        d_fn = jax.tree.unflatten(own_tree, d.own) if own else hidden
        return d_fn, jax.tree.unflatten(args_tree, d.args)[0]

    return Own(call, own, arrays), form

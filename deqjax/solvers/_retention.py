"""A relaxation beta per channel: on integers `1 - beta = n / d`, n the integer nearest to it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from jaxtyping import Array, Inexact, Int, PyTree

from .._tree import straight_through, widen


def is_number(beta: Any) -> bool:
    """Whether beta is known when traced, one number for all entries; not an array, or several."""
    return isinstance(beta, float | int | np.floating)


def as_arrays(beta: PyTree) -> PyTree:
    """A number, or a pytree of arrays."""
    as_array = lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x
    return beta if is_number(beta) else jax.tree.map(as_array, beta)


def is_wrapped(beta: PyTree) -> bool:
    """Whether beta is made of parameters, which `nn.DEQ` unwraps."""
    wrapper = lambda x: isinstance(x, paramax.AbstractUnwrappable)
    return any(map(wrapper, jax.tree.leaves(beta, is_leaf=wrapper)))


def numerator(beta: Inexact[Array, "*c"], d: int) -> Int[Array, "*c"]:
    """n, from 1 to d - 1."""
    retention = d * (1 - widen(jax.lax.stop_gradient(beta)))
    return jnp.clip(jnp.round(retention), 1, d - 1).astype(jnp.int32)


def rounded(beta: Inexact[Array, "*c"], d: int) -> Inexact[Array, "*c"]:
    """`1 - n / d`, with the derivative of beta."""
    exact = (d - numerator(beta, d)).astype(widen(beta).dtype) / d
    return straight_through(exact.astype(beta.dtype), beta)


def check_kind(beta: PyTree) -> None:
    """Raises `ValueError` unless beta is a number, or a pytree of real arrays."""
    leaves = jax.tree.leaves(beta)
    real = lambda x: eqx.is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)
    if not (is_number(beta) or is_wrapped(beta) or (leaves and all(map(real, leaves)))):
        raise ValueError(
            f"Reversible expects beta to be a number, a real array, or a pytree of these, got "
            f"{eqx.tree_pformat(beta)}; pass for instance 0.8."
        )


def check_shapes(beta: PyTree, z: PyTree) -> None:
    """Raises `ValueError` unless each array of beta broadcasts against its leaves of one z."""
    try:
        pairs = zip(jax.tree.leaves(jax.tree.broadcast(beta, z)), jax.tree.leaves(z), strict=True)
        fits = all(np.broadcast_shapes(jnp.shape(b), x.shape) == x.shape for b, x in pairs)
    except ValueError:
        fits = False
    if not fits:
        shapes = jax.tree.map(jnp.shape, beta), jax.tree.map(jnp.shape, z)
        raise ValueError(
            f"Reversible expects beta to be a number, an array that broadcasts against each leaf "
            f"of one problem's z, or a pytree of them, got the shapes {shapes[0]} for a z of "
            f"{shapes[1]}; give it the shape of the last axes, for instance (channels,), and call "
            f"paramax.unwrap on a parameter outside nn.DEQ."
        )

"""Parts shared by layers: masks drawn once per solve, and cells with a nonnegative weight."""

import abc
import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from .._checks import check_size, is_int
from ..positive import (
    AbstractNonnegative,
    Enclosure,
    Properties,
    StrictlyPositive,
    certify,
    properties,
)
from ._convolution import conv2d

Weight = paramax.AbstractUnwrappable[Array] | Float[Array, "..."]
# W as a function of an unbounded parameter, or None: the parameter is W, and `positive.project`
# keeps it nonnegative.
Nonnegative = Callable[[Array], Array] | None


class AbstractMask(eqx.Module):
    """A module whose only array is a mask, which `nn.DEQ` draws once per solve."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> "AbstractMask":
        """The module with a new mask."""


def masks_of(tree: PyTree, key: PRNGKeyArray) -> PyTree:
    """A new mask for every `AbstractMask` in `tree`, and `None` for everything else.

    The result has the structure of `tree`, for `eqx.combine(masks, tree)`.
    """
    count = itertools.count()

    def node(x):
        return x.draw(jax.random.fold_in(key, next(count))) if is_mask(x) else None

    is_mask = lambda x: isinstance(x, AbstractMask)
    return jax.tree.map(node, tree, is_leaf=is_mask)


class AbstractCertified(eqx.Module):
    """A cell that knows a theorem by which its fixed point is enclosed."""

    @abc.abstractmethod
    def certify(
        self, z: PyTree, x: PyTree, *, batched: bool = False, fan_in: int | None = None
    ) -> Enclosure:
        """Encloses the fixed point near z, for the injected x; `fan_in` as in `deqjax.certify`."""


class AbstractPositiveCell(AbstractNonnegative, AbstractCertified):
    """A cell made of `sigma(W z + x)`, `W >= 0`, with x as positive as sigma needs it."""

    weight: AbstractVar[Weight]
    activation: AbstractVar[Callable[[Array], Array]]
    known: AbstractVar[Properties]  # the properties of the activation, looked up once
    floor: AbstractVar[float]
    sharpness: AbstractVar[float]

    def product(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """`W z`, or the convolution of one image."""
        weight = paramax.unwrap(self.weight)
        return weight @ z if weight.ndim == 2 else conv2d(z[None], weight)[0]

    def __deepcopy__(self, memo: dict) -> "AbstractPositiveCell":
        # Copies only arrays: to every cache, a copy of a jitted function is another function.
        copied = lambda x: copy.deepcopy(x, memo) if eqx.is_array_like(x) else x
        return jax.tree.map(copied, self)

    def inject(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Makes the input positive, as the class says; `nn.DEQ` does this once before the solve."""
        if self.known.kind == 2:
            return jax.nn.relu(x)
        return StrictlyPositive(self.floor, self.sharpness)(x)


def fill(
    cell: Any,
    sizes: tuple[int, ...],
    activation: Callable[[Array], Array],
    nonnegative: Nonnegative,
    floor: float,
    sharpness: float,
    dtype: DTypeLike | None,
    key: PRNGKeyArray,
) -> None:
    """Sets the fields that every positive cell has; `sizes` is `(size,)` or `(channels, k)`."""
    length, *kernel = sizes
    for k in kernel:
        check_kernel_size(k)
    shape = (*kernel * 2, length, length)
    cell.weight = nonnegative_weight(shape, dtype, key, nonnegative)
    cell.activation, cell.known = activation, properties(activation)
    positive = StrictlyPositive(floor, sharpness)
    cell.floor, cell.sharpness = positive.floor, positive.sharpness


def certify_concave(
    cell: Callable, z: PyTree, x: PyTree, *, batched: bool, fan_in: int | None
) -> Enclosure:
    """`deqjax.certify` of a positive concave cell on one example, or on a batch."""
    cell = paramax.unwrap(cell)
    return certify(jax.vmap(cell) if batched else cell, z, x, batched=batched, fan_in=fan_in)


def nonnegative_weight(
    shape: tuple[int, ...], dtype: DTypeLike | None, key: PRNGKeyArray, nonnegative: Nonnegative
) -> Weight:
    """Draws W0 ~ U(0, 1) sqrt(1e-4) / sqrt(out + in), as the pcDEQ reference, in each form."""
    check_size("size or channels", shape[-1])
    # Why a square by default: Adam moves v by the learning rate, whatever the gradient's size. For
    # a square, W = 4e-4 is v = 0.02, and a step of 1e-3 changes W by 10 %. For softplus it is
    # v = -8: the step changes W by 0.1 %, and weight decay, which pulls v to 0, pulls W up to
    # log 2. Why not a clamp and weight norm, as in the reference: a row of zeros gives 0/0.
    scale = math.sqrt(1e-4) / math.sqrt(shape[-2] + shape[-1])
    w = scale * jax.random.uniform(key, shape, dtype)
    if nonnegative is None:
        return w
    if nonnegative is jnp.square:
        return paramax.Parameterize(nonnegative, jnp.sqrt(w))
    if nonnegative is jax.nn.softplus:
        # Uniform numbers can be 0, and softplus(-inf) = 0 would stay there for ever.
        w = jnp.maximum(w, scale * float(jnp.finfo(w.dtype).eps))
        return paramax.Parameterize(nonnegative, jnp.log(jnp.expm1(w)))
    raise ValueError(
        f"A cell with a nonnegative weight expects nonnegative=jnp.square, jax.nn.softplus or "
        f"None (an array, for deqjax.positive.project after each update), got {nonnegative!r}; "
        f"for another function, set cell.weight to paramax.Parameterize(function, v)."
    )


def check_kernel_size(kernel_size: int) -> None:
    """Raises `ValueError` unless the kernel has a centre."""
    if not is_int(kernel_size) or kernel_size % 2 == 0:
        raise ValueError(
            f"A convolution expects an odd kernel_size, got {kernel_size!r}; use the next odd "
            "size: an even one has no centre and shifts its input by half a position."
        )

"""What the layers share: masks drawn once a solve, cells with a nonnegative weight, and a
channels-last convolution whose cotangents are fast inside a loop.

On a CPU, XLA reaches its fast kernel only for a plain NHWC/HWIO convolution; inside a `while` the
stock cotangents (swapped axes, dilated kernels) fall to a naive loop nest. Both are therefore
written as something the forward pass is already good at:

    y[n, i, j] = sum_ab x[n, s i + a - p, s j + b - p] w[a, b]              p = k // 2, stride s
    dx         = the stride-1 convolution of zero-stuffed g with w flipped, its channels swapped
    dw[a, b]   = sum_nij x[n, s i + a - p, s j + b - p] g[n, i, j]^T        k * k matrix products

It is a primitive because the alternatives lose a transformation: `jax.custom_vjp` has no forward
mode and, under `jax.vmap` with a shared kernel, makes one kernel cotangent per example;
`jax.custom_derivatives.linear_call` cannot be batched.
"""

import abc
import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from numbers import Integral

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from .._number import check_size
from .._tree import mesh_axes, vary
from ..positive import (
    AbstractNonnegative,
    Enclosure,
    Properties,
    StrictlyPositive,
    certify,
)

Weight = paramax.AbstractUnwrappable[Array] | Float[Array, "..."]
# W as a function of an unbounded parameter, or None: the parameter is W, and `positive.project`
# keeps it nonnegative.
Nonnegative = Callable[[Array], Array] | None


class AbstractMask(eqx.Module):
    """A module whose only array is a mask, which `nn.DEQ` draws once a solve."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray) -> "AbstractMask":
        """Itself with a new mask."""


def masks_of(tree: PyTree, key: PRNGKeyArray) -> PyTree:
    """New masks for every `AbstractMask` in `tree`, for `eqx.combine(masks, tree)`: it has the
    structure of `tree`, with `None` for everything else."""
    count = itertools.count()

    def node(x):
        return x.draw(jax.random.fold_in(key, next(count))) if is_mask(x) else None

    is_mask = lambda x: isinstance(x, AbstractMask)
    return jax.tree.map(node, tree, is_leaf=is_mask)


class AbstractPositiveCell(AbstractNonnegative):
    """A cell made of `sigma(W z + x)`, `W >= 0`, with x as positive as sigma needs it."""

    activation: AbstractVar[Callable[[Array], Array]]
    known: AbstractVar[Properties]  # the record of the activation, looked up once
    floor: AbstractVar[float]
    sharpness: AbstractVar[float]

    @abc.abstractmethod
    def product(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """`W z`."""

    def __deepcopy__(self, memo: dict) -> "AbstractPositiveCell":
        # Arrays alone: a copy of JAX's jitted functions is another function to every cache.
        copied = lambda x: copy.deepcopy(x, memo) if eqx.is_array_like(x) else x
        return jax.tree.map(copied, self)

    def inject(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Make the input positive (`nn.DEQ` does it, once before the solve); see the class."""
        if self.known.kind == 2:
            return jax.nn.relu(x)
        return StrictlyPositive(self.floor, self.sharpness)(x)


def certify_concave(
    cell: Callable, z: PyTree, x: PyTree, *, batched: bool, fan_in: int | None
) -> Enclosure:
    """`deqjax.certify` of a positive concave cell on one example, or on a batch."""
    cell = paramax.unwrap(cell)
    # A module, not `jax.vmap(cell)`: that is another function, compiled anew, at each call.
    fn = eqx.Partial(_over_batch, cell) if batched else cell
    return certify(fn, z, x, batched=batched, fan_in=fan_in)


def _over_batch(cell: Callable, z: PyTree, x: PyTree) -> PyTree:
    return jax.vmap(cell)(z, x)


def nonnegative_weight(
    shape: tuple[int, ...], dtype: DTypeLike | None, key: PRNGKeyArray, nonnegative: Nonnegative
) -> Weight:
    """W0 ~ U(0, 1) sqrt(1e-4) / sqrt(out + in), as in the pcDEQ reference, however it is kept
    nonnegative."""
    check_size("size or channels", shape[-1])
    # Why a square by default: Adam moves v by the learning rate, whatever the gradient's size.
    # W = 4e-4 is v = 0.02 there, so that a step of 1e-3 changes W by 10 %; it is v = -8 under
    # softplus, where the step changes W by 0.1 %, and where weight decay, pulling v to 0, pulls W
    # up to log 2. Why not a clamp and weight norm, as in the reference: a row of zeros gives 0/0.
    scale = math.sqrt(1e-4) / math.sqrt(shape[-2] + shape[-1])
    w = scale * jax.random.uniform(key, shape, dtype)
    if nonnegative is None:
        return w
    if nonnegative is jnp.square:
        return paramax.Parameterize(nonnegative, jnp.sqrt(w))
    if nonnegative is jax.nn.softplus:
        # Uniform numbers can be 0, and softplus(-inf) = 0 would stay there for good.
        w = jnp.maximum(w, scale * float(jnp.finfo(w.dtype).eps))
        return paramax.Parameterize(nonnegative, jnp.log(jnp.expm1(w)))
    raise ValueError(
        f"A cell with a nonnegative weight expected nonnegative=jnp.square, jax.nn.softplus or "
        f"None (an array, for deqjax.positive.project after each update), got {nonnegative!r}. "
        f"For another function, put paramax.Parameterize(function, v) in the place of cell.weight."
    )


def conv2d(
    x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"], stride: int = 1
) -> Float[Array, "n h2 w2 o"]:
    """Convolve a batch of channels-last images, zero padding `k // 2` on each side, `k` odd."""
    if x.ndim != 4 or x.shape[-1] != kernel.shape[2] or x.dtype != kernel.dtype:
        raise ValueError(
            f"The convolution expected images (..., {kernel.shape[2]} channels) of dtype "
            f"{kernel.dtype}, channels last; got {x.shape} of {x.dtype}. Move the channels to the "
            "last axis, or cast one of the two."
        )
    axes = mesh_axes(x, kernel)
    # Read here, since the convolution itself is traced when it is compiled, outside of the context
    # that may have set it.
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return conv_p.bind(vary(x, axes), vary(kernel, axes), stride=stride, precision=precision)


def _forward(x, kernel, *, stride, precision):
    pad = [(k // 2, k // 2) for k in kernel.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride,) * 2
    return lax.conv_general_dilated(
        x, kernel, strides, pad, dimension_numbers=layout, precision=precision
    )


def _abstract(x, kernel, *, stride, precision):
    del precision
    n, h, w, _ = x.shape
    # `update` keeps the mesh axes x varies over; `conv2d` gave the kernel the same ones.
    shape = (n, -(-h // stride), -(-w // stride), kernel.shape[3])
    return x.update(shape=shape, weak_type=False)


def _image_cotangent(g, x, kernel, *, stride, precision):
    # Zeros between the entries of g, and after the last one if the stride skipped a row of x.
    gaps = [(0, (n - 1) % stride, stride - 1) for n in x.aval.shape[1:3]]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    with jax.default_matmul_precision(precision):
        return conv2d(g, jnp.flip(kernel, (0, 1)).swapaxes(2, 3))


def _kernel_cotangent(g, x, kernel, *, stride, precision):
    k1, k2, _, out = shape = kernel.aval.shape
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (k1 // 2,) * 2, (k2 // 2,) * 2, (0, 0)))
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    g = g.reshape(math.prod(g.shape[:3]), out)

    def product(a, b):
        shifted = lax.slice(x, (0, a, b, 0), (n, a + h, b + w, c), (1, stride, stride, 1))
        # Flat, since XLA's CPU products of three contracted axes take half as long again.
        left = shifted.reshape(g.shape[0], c).T
        return jnp.matmul(left, g, precision=precision, preferred_element_type=wide)

    taps = [product(a, b) for a in range(k1) for b in range(k2)]
    return jnp.stack(taps).reshape(shape).astype(x.dtype)


def _batch(args, dims, *, stride, precision):
    x, kernel = args
    if dims[1] is None:  # a shared kernel: one convolution, and one sum for its cotangent
        x = jnp.moveaxis(x, dims[0], 0)
        with jax.default_matmul_precision(precision):
            y = conv2d(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), kernel, stride)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    return jax.vmap(partial(_forward, stride=stride, precision=precision), dims)(x, kernel), 0


def check_kernel_size(kernel_size: int) -> None:
    """Raises `ValueError` unless the kernel has a centre."""
    if not isinstance(kernel_size, Integral) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"A convolution expected an odd kernel_size, got {kernel_size!r}: an even "
            "one has no centre and shifts the image by half a pixel. Use the next odd size."
        )


conv_p = Primitive("deqjax_conv2d")
conv_p.def_impl(jax.jit(_forward, static_argnames=("stride", "precision")))
conv_p.def_abstract_eval(_abstract)
ad.defbilinear(conv_p, _image_cotangent, _kernel_cotangent)
batching.primitive_batchers[conv_p] = _batch
mlir.register_lowering(conv_p, mlir.lower_fun(_forward, multiple_results=False))

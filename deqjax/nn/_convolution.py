"""A channels-last convolution whose value and cotangents are fast inside a loop.

    y[n, i, j] = sum_ab x[n, s i + a - p, s j + b - p] w[a, b]              p = k // 2, stride s

y is linear in x and in w. With an image g of the shape of y, the cotangents of

    <g, y(x, w)>

for g, x and w are y itself and two more linear maps. These are three primitives; each has the two
others as its transposes. On a CPU, XLA reaches its fast kernel only for a plain NHWC/HWIO
convolution; inside a `while` the stock cotangents (swapped axes, dilated kernels) fall to a naive
loop nest. There all three are written as operations that are fast:

    dx         = the stride-1 convolution of zero-stuffed g with w flipped, its channels swapped
    dw[a, b]   = sum_nij x[n, s i + a - p, s j + b - p] g[n, i, j]^T        k * k matrix products

or by minimal filtering (`_winograd.py`) where that is faster. On any other platform the stock rules
are lowered. A kernel cotangent per example takes k * k products on every platform.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array, Float

from .._bilinear import asks_highest, bind, default_precision, primitive
from .._tree import mesh_axes, vary
from . import _winograd

# The time of minimal filtering over that of the direct sums, in a loop of 8 on two cores, for f and
# for f with both cotangents (experiments/kernels.py; busy cores, free ones). Below 32 channels,
# moving tiles costs what products save (28 x 28, 24 channels: 0.78 to 1.2); on few pixels, an odd
# side does:
#
#     images, pixels, channels   f           VJP
#     64      28 x 28  32        0.87, 0.58  0.84, 0.74
#     64      28 x 28  82        0.74, 0.60  0.73, 0.64
#     64      14 x 14  48        0.73, 0.44  0.84, 0.58
#     64       7 x 7   48        1.14        1.03
#     16      33 x 33  64        0.62, 0.41  0.71, 0.62
#      1      32 x 32  64        0.90, 0.74  0.64, 0.49
#     64      32 x 32  128       0.62, 0.60  0.57, 0.54
_CHANNELS, _SIDE = 32, 8


def conv2d(
    x: Float[Array, "n h w i"], kernel: Float[Array, "k k i o"], stride: int = 1
) -> Float[Array, "n h2 w2 o"]:
    """Convolves a batch of channels-last images, zero padding `k // 2` on each side, `k` odd.

    At the highest matrix precision by the direct sums, which do not cancel.
    """
    check_images(x, kernel)
    return bind(forward_p, x, kernel, stride=stride, precision=default_precision())


def check_images(x: Array, kernel: Array) -> None:
    """Raises `ValueError` unless x is a batch of images for the kernel."""
    if x.ndim != 4 or x.shape[-1] != kernel.shape[2] or x.dtype != kernel.dtype:
        raise ValueError(
            f"The convolution expects images (..., {kernel.shape[2]} channels) of dtype "
            f"{kernel.dtype}, channels last, got {x.shape} of {x.dtype}; move the channels to the "
            "last axis, or cast one of the two."
        )


def stock(x, w, *, stride, precision):
    """The convolution, with JAX's own derivatives."""
    pad = [(k // 2, k // 2) for k in w.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride,) * 2
    return lax.conv_general_dilated(
        x, w, strides, pad, dimension_numbers=layout, precision=precision
    )


def _like(x, shape):
    return vary(jnp.zeros(shape, x.dtype), mesh_axes(x))


def _stock_image(g, w, *, size, **params):
    x = _like(g, (g.shape[0], *size, w.shape[2]))
    return jax.linear_transpose(lambda x: stock(x, w, **params), x)(g)[0]


def _stock_kernel(x, g, *, size, **params):
    w = _like(x, (*size, x.shape[-1], g.shape[-1]))
    return jax.linear_transpose(lambda w: stock(x, w, **params), w)(g)[0]


def _filtered(x: Array, size: Any, inputs: int, outputs: int, **params: Any) -> bool:
    """Whether minimal filtering is possible, faster, and precise enough."""
    possible = size == (3, 3) and params["stride"] == 1 and jnp.finfo(x.dtype).bits >= 32
    large = min(inputs, outputs) >= _CHANNELS and min(x.shape[1:3]) >= _SIDE
    return possible and large and not asks_highest(params["precision"])


def _forward(x, w, **params):
    if _filtered(x, w.shape[:2], w.shape[2], w.shape[3], **params):
        return _winograd.convolve(x, w)
    return stock(x, w, **params)


def _image(g, w, *, size, stride, precision):
    # Zeros between the entries of g, and after the last one if the stride skipped a row of x.
    gaps = [(0, (n - 1) % stride, stride - 1) for n in size]
    g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *gaps, (0, 0, 0)])
    return _forward(g, jnp.flip(w, (0, 1)).swapaxes(2, 3), stride=1, precision=precision)


def _kernel(x, g, *, size, stride, precision):
    if _filtered(x, size, x.shape[-1], g.shape[-1], stride=stride, precision=precision):
        return _winograd.kernel_cotangent(x, g)
    return taps(x, g, size=size, stride=stride, precision=precision)


def taps(x, g, *, size, stride, precision):
    """The cotangent of the kernel by one matrix product for each of its entries."""
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), *((k // 2,) * 2 for k in size), (0, 0)))
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    g = g.reshape(math.prod(g.shape[:3]), g.shape[-1])

    def product(a, b):
        shifted = lax.slice(x, (0, a, b, 0), (n, a + h, b + w, c), (1, stride, stride, 1))
        # Flat: on a CPU, XLA's products of three contracted axes take half as long again.
        left = shifted.reshape(g.shape[0], c).T
        return jnp.matmul(left, g, precision=precision, preferred_element_type=wide)

    products = [product(a, b) for a in range(size[0]) for b in range(size[1])]
    return jnp.stack(products).reshape(*size, c, g.shape[-1]).astype(x.dtype)


def _forward_shape(x, w, *, stride, **_):
    n, h, k, _ = x.shape
    return n, -(-h // stride), -(-k // stride), w.shape[3]


def _image_shape(g, w, *, size, **_):
    return g.shape[0], *size, w.shape[2]


def _kernel_shape(x, g, *, size, **_):
    return *size, x.shape[3], g.shape[3]


def _merged(primitive: Primitive, rule: Callable, args, dims, **params):
    """Batches a rule: one convolution of more images if the kernel is shared."""
    images, kernel = args
    if dims[1] is None:
        images = jnp.moveaxis(images, dims[0], 0)
        flat = images.reshape(math.prod(images.shape[:2]), *images.shape[2:])
        out = bind(primitive, flat, kernel, **params)
        return out.reshape(*images.shape[:2], *out.shape[1:]), 0
    return jax.vmap(partial(rule, **params), dims)(images, kernel), 0


def _each(args, dims, **params):
    """One cotangent per example."""
    return jax.vmap(partial(taps, **params), dims)(*args), 0


forward_p = primitive("deqjax_conv2d", _forward, stock, _forward_shape)
image_p = primitive("deqjax_conv2d_image", _image, _stock_image, _image_shape)
kernel_p = primitive("deqjax_conv2d_kernel", _kernel, _stock_kernel, _kernel_shape)
ad.defbilinear(
    forward_p,
    lambda g, x, w, **p: bind(image_p, g, w, size=x.aval.shape[1:3], **p),
    lambda g, x, w, **p: bind(kernel_p, x, g, size=w.aval.shape[:2], **p),
)
ad.defbilinear(
    image_p,
    lambda x, g, w, *, size, **p: bind(forward_p, x, w, **p),
    lambda x, g, w, *, size, **p: bind(kernel_p, x, g, size=w.aval.shape[:2], **p),
)
ad.defbilinear(
    kernel_p,
    lambda w, x, g, *, size, **p: bind(image_p, g, w, size=x.aval.shape[1:3], **p),
    lambda w, x, g, *, size, **p: bind(forward_p, x, w, **p),
)
batching.primitive_batchers[forward_p] = partial(_merged, forward_p, stock)
batching.primitive_batchers[image_p] = partial(_merged, image_p, _stock_image)
batching.primitive_batchers[kernel_p] = _each

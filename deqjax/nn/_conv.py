"""Channels-last convolution as a layer."""

import math
from typing import Literal

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ._base import check_kernel_size
from ._convolution import check_images, conv2d


class Conv2d(eqx.Module):
    """Channels-last two-dimensional convolution, with a backward rule that is fast inside a loop.

        y[i, j] = sum_ab x[s i + a - p, s j + b - p] kernel[a, b] + bias        p = kernel_size // 2

    x is zero out of bounds, so that stride 1 keeps the image's size; stride 2 halves it, rounding
    up. The initial kernel and bias are uniform on +-1/sqrt(in_channels * kernel_size^2).

    **Arguments:**

    - `in_channels`, `out_channels`: lengths of the last axis before and after.
    - `kernel_size`: odd, in pixels.
    - `stride`: 1 or 2.
    - `use_bias`: whether to add a bias per output channel.
    - `dtype`: of the parameters; default: JAX's default float.
    - `compute_dtype`: of the products. At each call x and the kernel are cast to it, and the result
        is cast back, so that with float32 parameters and `jnp.bfloat16` the kernel cotangents of
        several calls are summed in float32. Default: the parameters' dtype.
    - `key`: for the initial parameters.

    **Call:** `x` of shape (H, W, in_channels) and the parameters' dtype, one example. Returns
    (ceil(H / stride), ceil(W / stride), out_channels) in the same dtype. `jax.vmap` merges the
    examples into one convolution whose kernel cotangent is one sum, in float32 or wider.

    **Cost:** on a CPU, 3 x 3 at stride 1 with at least 32 channels and 8 pixels per side, in
    float32 or wider, is computed by minimal filtering (Winograd), in 0.4 to 0.9 of the time of the
    direct sums, with ten more copies of x. The rounding of minimal filtering is relative to the
    largest entry of the result, and no larger than that of the direct sums; in the kernel's
    cotangent it is up to three times as large. Under `jax.default_matmul_precision("highest")`, as
    in every certificate, the direct sums are used. Any other convolution costs the same as the
    stock one forward; the image cotangent at stride 2 is computed at the input's resolution: four
    times the necessary products.
    On accelerators the stock rules are lowered.

    **When not to use it:** for one kernel per example (correct, but as slow as the stock grouped
    convolution), for channels first, dilation or groups (use `equinox.nn.Conv2d`). The policies of
    `jax.checkpoint` that save products do not know this one;
    `policy=lambda p, *_, **__: p.name.startswith("deqjax_")` does.

    **Raises:** `ValueError` for an even kernel, another stride, another layout or dtype of x.
    """

    kernel: Float[Array, "k k i o"]
    bias: Float[Array, " o"] | None
    stride: int = eqx.field(static=True)
    compute_dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: Literal[1, 2] = 1,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_kernel_size(kernel_size)
        if stride not in (1, 2):
            raise ValueError(f"Conv2d expects stride 1 or 2, got {stride}; compose two of them.")
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        kernel_key, bias_key = jax.random.split(key)
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = jax.random.uniform(kernel_key, shape, dtype, -bound, bound)
        bias = jax.random.uniform(bias_key, (out_channels,), dtype, -bound, bound)
        self.bias = bias if use_bias else None
        self.stride = stride
        self.compute_dtype = compute_dtype

    def __call__(self, x: Float[Array, "h w i"]) -> Float[Array, "h2 w2 o"]:
        """Applies the convolution to one image."""
        kernel, images = self.kernel, x[None]
        check_images(images, kernel)
        if self.compute_dtype is not None:
            kernel, images = (a.astype(self.compute_dtype) for a in (kernel, images))
        y = conv2d(images, kernel, self.stride)[0].astype(x.dtype)
        return y if self.bias is None else y + self.bias.reshape(1, 1, -1)

"""Channels-last convolutions as layers."""

import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._checks import check_size
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
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel, self.bias = _initial(shape, use_bias, dtype, key)
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


class Conv1d(eqx.Module):
    """Channels-last convolution of sequences, centred or causal, as fast inside a loop as outside.

        y[i] = sum_a x[i + a - p] kernel[a] + bias

    with p = kernel_size // 2; if `causal`, p = kernel_size - 1: y[i] depends on x[0] to x[i]. x is
    zero out of bounds, so that the length is kept. The initial kernel and bias are uniform on
    +-1/sqrt(in_channels * kernel_size).

    **Arguments:**

    - `in_channels`, `out_channels`: lengths of the last axis before and after.
    - `kernel_size`: in positions; odd unless `causal`.
    - `causal`: whether a position sees no later one.
    - `use_bias`, `dtype`, `compute_dtype`, `key`: as in `nn.Conv2d`.

    **Call:** `x` of shape (L, in_channels) and the parameters' dtype, one example. Returns
    (L, out_channels) in the same dtype. `jax.vmap` merges the examples as in `nn.Conv2d`.

    **Cost:** `kernel_size` matrix products of x (one more for an even kernel), and as many for each
    cotangent.

    **When not to use it:** as `nn.Conv2d`; for strides, compose it with a slice.

    **Raises:** `ValueError` for an even kernel that is centred, another layout or dtype of x.
    """

    kernel: Float[Array, "k i o"]
    bias: Float[Array, " o"] | None
    causal: bool = eqx.field(static=True)
    compute_dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        causal: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        if causal:
            check_size("kernel_size", kernel_size)
        else:
            check_kernel_size(kernel_size)
        shape = (kernel_size, in_channels, out_channels)
        self.kernel, self.bias = _initial(shape, use_bias, dtype, key)
        self.causal = causal
        self.compute_dtype = compute_dtype

    def __call__(self, x: Float[Array, "l i"]) -> Float[Array, "l o"]:
        """Applies the convolution to one sequence."""
        _check_sequence(x, self.kernel)
        kernel, length = self.kernel, x.shape[0]
        if self.causal:
            # The centred convolution of x moved right by half a kernel, an even one with a 0 first.
            kernel = jnp.pad(kernel, ((1 - kernel.shape[0] % 2, 0), (0, 0), (0, 0)))
            x = jnp.pad(x, ((kernel.shape[0] // 2, 0), (0, 0)))
        dtype = x.dtype if self.compute_dtype is None else self.compute_dtype
        y = conv2d(x[None, :, None].astype(dtype), kernel[:, None].astype(dtype))
        y = y[0, :length, 0].astype(x.dtype)
        return y if self.bias is None else y + self.bias[None]


def _initial(
    shape: tuple[int, ...], use_bias: bool, dtype: DTypeLike | None, key: PRNGKeyArray
) -> tuple[Array, Array | None]:
    """A kernel and a bias, uniform on +-1/sqrt(inputs of one output)."""
    for size, name in zip(shape[-2:], ("in_channels", "out_channels"), strict=True):
        check_size(name, size)
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    kernel_key, bias_key = jax.random.split(key)
    kernel = jax.random.uniform(kernel_key, shape, dtype, -bound, bound)
    bias = jax.random.uniform(bias_key, shape[-1:], dtype, -bound, bound)
    return kernel, bias if use_bias else None


def _check_sequence(x: Array, kernel: Array) -> None:
    """Raises `ValueError` unless x is one sequence for the kernel."""
    if x.ndim != 2 or x.shape[-1] != kernel.shape[1] or x.dtype != kernel.dtype:
        raise ValueError(
            f"Conv1d expects one sequence (length, {kernel.shape[1]} channels) of dtype "
            f"{kernel.dtype}, got {x.shape} of {x.dtype}; move the channels to the last axis, use "
            "jax.vmap for a batch, or cast one of the two."
        )

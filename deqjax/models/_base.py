"""Parts of the models: their interface, batch normalisation outside the solve, pooling."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox import AbstractVar
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._solution import Solution
from ..nn import DEQ, Conv2d


class Solve(NamedTuple):
    """The solve of one equilibrium layer, which `layer.batch(x)` repeats."""

    x: Float[Array, "b ..."]
    solution: Solution


class Classified(NamedTuple):
    """The output of a classifier."""

    logits: Float[Array, "b classes"]
    state: eqx.nn.State
    solves: tuple[Solve, ...]  # one per equilibrium layer, in the order of `deqs`


class Predicted(NamedTuple):
    """The output of a language model."""

    logits: Float[Array, "b l v"]
    solves: tuple[Solve, ...]  # one per equilibrium layer, in the order of `deqs`


class AbstractClassifier(eqx.Module):
    """An image classifier of stages, each with one equilibrium layer."""

    stages: AbstractVar[tuple[Any, ...]]

    @property
    def deqs(self) -> tuple[DEQ, ...]:
        """The equilibrium layers, in the order of `solves`."""
        return tuple(stage.deq for stage in self.stages)


ImageShape = tuple[int, int, int]
Lifted: TypeAlias = tuple[Float[Array, "b h2 w2 o"], eqx.nn.State]


def check_image_shape(image_shape: ImageShape) -> None:
    """Raises `ValueError` unless this is (height, width, channels)."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"The model expects image_shape=(height, width, channels), all at least 1, got "
            f"{image_shape}; pass for instance (28, 28, 1), as a grey image has one channel."
        )


def check_images(images: Float[Array, "b h w c"], image_shape: ImageShape) -> None:
    """Raises `ValueError` unless `images` is a batch of floating-point images of that shape."""
    if images.shape[1:] != tuple(image_shape) or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"The model expects a batch of floating-point images of shape (batch, "
            f"{', '.join(map(str, image_shape))}), channels last, got {images.shape} of "
            f"{images.dtype}; add the batch axis, scale integers to [0, 1], or build the model for "
            "this image_shape."
        )


def make_batch_norm(channels: int, dtype: DTypeLike | None) -> eqx.nn.BatchNorm:
    """Batch normalisation for `batch_norm`; momentum 0.9 as in the references."""
    return eqx.nn.BatchNorm(channels, "batch", momentum=0.9, mode="batch", dtype=dtype)


def batch_norm(
    norm: eqx.nn.BatchNorm, x: Float[Array, "b ... c"], state: eqx.nn.State
) -> tuple[Float[Array, "b ... c"], eqx.nn.State]:
    """Normalises a channels-last batch.

    Used only outside a solve: inside, it would couple the examples of a batch.
    """
    # Equinox expects the channels of one example first.
    normalise = jax.vmap(norm, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    y, state = normalise(jnp.moveaxis(x, -1, 1), state)
    return jnp.moveaxis(y, 1, -1), state


class Layers(NamedTuple):
    """Makes the layers of a block in the dtypes of its model."""

    conv: Callable[..., Conv2d]
    norm: Callable[[int], eqx.nn.BatchNorm]


def layers(dtype: DTypeLike | None, compute_dtype: DTypeLike | None) -> Layers:
    """`nn.Conv2d` without a bias, and batch normalisation."""
    # As in the references: a norm with its own shift follows each convolution.
    conv = partial(Conv2d, use_bias=False, dtype=dtype, compute_dtype=compute_dtype)
    return Layers(conv, partial(make_batch_norm, dtype=dtype))


class Stem(eqx.Module):
    """`relu(BN(conv x))` of a batch, 3 x 3."""

    conv: Conv2d
    norm: eqx.nn.BatchNorm

    def __init__(self, make: Layers, before: int, after: int, *, key: PRNGKeyArray):
        self.conv = make.conv(before, after, key=key)
        self.norm = make.norm(after)

    def __call__(self, x: Float[Array, "b h w i"], state: eqx.nn.State) -> Lifted:
        """Lifts a batch of images."""
        x, state = batch_norm(self.norm, jax.vmap(self.conv)(x), state)
        return jax.nn.relu(x), state


class Downsample(eqx.Module):
    """Half the resolution: `conv(relu(BN(conv y))) + shortcut(y)` with `y = relu(BN x)`.

    A pre-activation residual block; the first 3 x 3 convolution and the 1 x 1 shortcut have
    stride 2.

    Reference: He et al., Identity mappings in deep residual networks, ECCV 2016.
    """

    norm1: eqx.nn.BatchNorm
    conv1: Conv2d
    norm2: eqx.nn.BatchNorm
    conv2: Conv2d
    shortcut: Conv2d

    def __init__(self, make: Layers, before: int, after: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.norm1, self.norm2 = make.norm(before), make.norm(after)
        self.conv1 = make.conv(before, after, 3, 2, key=keys[0])
        self.conv2 = make.conv(after, after, key=keys[1])
        self.shortcut = make.conv(before, after, 1, 2, key=keys[2])

    def __call__(self, x: Float[Array, "b h w i"], state: eqx.nn.State) -> Lifted:
        """Downsamples a batch."""
        x, state = batch_norm(self.norm1, x, state)
        x = jax.nn.relu(x)
        y, state = batch_norm(self.norm2, jax.vmap(self.conv1)(x), state)
        return jax.vmap(self.conv2)(jax.nn.relu(y)) + jax.vmap(self.shortcut)(x), state


def max_pool(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """The maximum over 3 x 3 neighbourhoods, cut off at the border."""
    # Not lax.reduce_window: on a CPU its derivative, a select-and-scatter, takes ten times as long,
    # as long as a whole solve. If two entries tie, each gets half of the cotangent.
    for axis in (0, 1):
        n = x.shape[axis]
        width = [(1, 1) if i == axis else (0, 0) for i in range(3)]
        x = jnp.pad(x, width, constant_values=-jnp.inf)
        before, here, after = (lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(3))
        x = jnp.maximum(jnp.maximum(before, here), after)
    return x


def average_pool(x: Float[Array, "h w c"], window: int) -> Float[Array, "i j c"]:
    """Means of whole, disjoint windows; a window is never larger than the image."""
    a, b = (min(window, n) for n in x.shape[:2])
    rows, columns = x.shape[0] // a, x.shape[1] // b
    x = x[: rows * a, : columns * b]
    return jnp.mean(x.reshape(rows, a, columns, b, -1), (1, 3))


def adaptive_average_pool(x: Float[Array, "h w c"], size: int) -> Float[Array, "i j c"]:
    """Means of at most `size` x `size` windows that cover the image, fewer if it is smaller."""
    rows, columns = (jnp.asarray(_bins(n, min(size, n)), x.dtype) for n in x.shape[:2])
    return jnp.einsum("ih,jw,hwc->ijc", rows, columns, x, precision="highest")


def _bins(n: int, size: int) -> np.ndarray:
    # PyTorch's windows, from floor(i n / size) to ceil((i + 1) n / size). They overlap if n is not
    # a multiple of size.
    i, pixel = np.arange(size)[:, None], np.arange(n)[None]
    inside = (pixel >= i * n // size) & (pixel < -(-(i + 1) * n // size))
    return inside / inside.sum(1, keepdims=True)

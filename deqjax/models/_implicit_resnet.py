"""The implicit ResNet of the reversible DEQ paper, single scale."""

from functools import partial

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._check import OptimistixSolver
from ..adjoints import AbstractAdjoint, ReversibleAdjoint
from ..nn import DEQ, Conv2d, GroupNorm
from ..solvers import Reversible
from ._base import (
    ImageShape,
    Output,
    adaptive_average_pool,
    batch_norm,
    check_image_shape,
    check_images,
    make_batch_norm,
)


class ResidualCell(eqx.Module):
    """The cell `f(z, x) = GN(relu(z + GN(x + conv(relu(GN(conv z))))))`, 3 x 3 convolutions.

    **Arguments:**

    - `channels`: of z and x.
    - `width`: the inner convolution has `width * channels` channels.
    - `groups`: of the group norms; divides `channels`.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial kernels.

    **Call:** `cell(z, x)`, both of shape (H, W, channels); returns the same shape.

    **Cost:** two convolutions.

    **When not to use it:** where the fixed point itself matters: nothing makes this cell contract.

    **Raises:** `ValueError` if `groups` does not divide `channels`.
    """

    conv1: Conv2d
    conv2: Conv2d
    norm1: GroupNorm
    norm2: GroupNorm
    norm3: GroupNorm

    def __init__(
        self,
        channels: int,
        width: int,
        groups: int,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        key1, key2 = jax.random.split(key)
        inner = width * channels
        # No biases, as in the reference: a norm with a shift of its own follows each convolution.
        self.conv1 = Conv2d(channels, inner, use_bias=False, dtype=dtype, key=key1)
        self.conv2 = Conv2d(inner, channels, use_bias=False, dtype=dtype, key=key2)
        self.norm1 = GroupNorm(groups, inner, dtype=dtype)
        self.norm2 = GroupNorm(groups, channels, dtype=dtype)
        self.norm3 = GroupNorm(groups, channels, dtype=dtype)

    def __call__(self, z: Float[Array, "h w c"], x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Evaluate the cell on one example."""
        inner = jax.nn.relu(self.norm1(self.conv1(z)))
        return self.norm3(jax.nn.relu(z + self.norm2(x + self.conv2(inner))))


class ImplicitResNet(eqx.Module):
    """An image classifier: convolution, one equilibrium layer with a skip, linear head.

        x = relu(BN(conv(images)));   logits = linear(pool(x + DEQ(x)))

    with the cell `ResidualCell` and average pooling to 4 x 4 (less if the image is smaller). 24,682
    parameters with the defaults, on 32 x 32 x 3 images of 10 classes.

    **Arguments:**

    - `image_shape`: (height, width, channels) of one image.
    - `num_classes`: length of the logits.
    - `channels`, `width`, `groups`: see `ResidualCell`.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`. The default, like the paper's,
        takes two reversible pairs, that is four steps, whatever the residual.
    - `dtype`: of parameters, images and compute; default: JAX's default float.
    - `key`: for the initial parameters.

    Make it with its batch-norm state: `eqx.nn.make_with_state(ImplicitResNet)(...)`.

    **Call:** `logits, state, solves = model(images, state)` with images (B, H, W, C). logits has
    shape (B, num_classes); solves is `((x, sol),)`, and `model.deqs[0].batch(x)` repeats the solve.

    **Cost:** one batched solve; four evaluations of the cell with the defaults.

    **When not to use it:** on one example at a time without `equinox.nn.inference_mode`: batch norm
    needs a batch. For a guaranteed fixed point: `PositiveConcaveNet`.

    **Raises:** `ValueError` for images of another shape or of integers.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the single-scale image model.
    """

    stem: Conv2d
    norm: eqx.nn.BatchNorm
    deq: DEQ
    head: eqx.nn.Linear
    image_shape: ImageShape = eqx.field(static=True)

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        channels: int = 32,
        width: int = 1,
        groups: int = 8,
        solver: OptimistixSolver = Reversible(beta=0.8, rtol=0.0, atol=0.0),
        adjoint: AbstractAdjoint = ReversibleAdjoint(),
        max_steps: int = 4,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_image_shape(image_shape)
        stem_key, cell_key, head_key = jax.random.split(key, 3)
        height, width_pixels, depth = image_shape
        features = min(4, height) * min(4, width_pixels) * channels
        cell = ResidualCell(channels, width, groups, dtype=dtype, key=cell_key)
        self.stem = Conv2d(depth, channels, use_bias=False, dtype=dtype, key=stem_key)
        self.norm = make_batch_norm(channels, dtype)
        self.deq = DEQ(cell, solver, adjoint, max_steps=max_steps)
        self.head = eqx.nn.Linear(features, num_classes, dtype=dtype, key=head_key)
        self.image_shape = image_shape

    @property
    def deqs(self) -> tuple[DEQ, ...]:
        """The equilibrium layers, in the order of `solves`."""
        return (self.deq,)

    def __call__(self, images: Float[Array, "b h w c"], state: eqx.nn.State) -> Output:
        """Classify a batch."""
        check_images(images, self.image_shape)
        x, state = batch_norm(self.norm, jax.vmap(self.stem)(images), state)
        x = jax.nn.relu(x)
        z, sol = self.deq.batch(x)
        pooled = jax.vmap(partial(adaptive_average_pool, size=4))(x + z)
        logits = jax.vmap(self.head)(pooled.reshape(len(pooled), -1))
        return logits, state, ((x, sol),)

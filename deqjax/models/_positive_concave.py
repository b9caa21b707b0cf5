"""The image classifiers of the positive concave DEQ paper."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._problem import OptimistixSolver
from ..adjoints import AbstractAdjoint, ImplicitAdjoint
from ..nn import DEQ, Conv2d, PositiveConcaveConv2d, PositiveConcaveLinear
from ..solvers import FixedPointIteration
from ._base import (
    AbstractClassifier,
    Classified,
    ImageShape,
    Solve,
    average_pool,
    batch_norm,
    check_image_shape,
    check_images,
    make_batch_norm,
    max_pool,
)

Activation = Callable[[Array], Array]
Nonnegative = Callable[[Array], Array] | None


class Stage(eqx.Module):
    """One layer: lift, batch norm, equilibrium, `after` of each example, batch norm."""

    lift: Callable[[Array], Array]
    norm_before: eqx.nn.BatchNorm
    deq: DEQ
    after: Callable[[Array], Array]
    norm_after: eqx.nn.BatchNorm

    def __call__(
        self, y: Float[Array, "b ..."], state: eqx.nn.State
    ) -> tuple[Float[Array, "b ..."], eqx.nn.State, Solve]:
        """Applies the stage to a batch; the last value is the solve, `(x, sol)`."""
        x, state = batch_norm(self.norm_before, jax.vmap(self.lift)(y), state)
        z, sol = self.deq.batch(x)
        y, state = batch_norm(self.norm_after, jax.vmap(self.after)(z), state)
        return y, state, Solve(x, sol)


class PositiveConcaveNet(AbstractClassifier):
    """An image classifier whose equilibrium layers have exactly one fixed point each.

        linear   flatten, linear(size), BN, DEQ, BN, linear
        single   conv3x3(channels), BN, DEQ, max-pool 3, BN, average-pool 8, linear
        multi    (conv3x3(c), BN, DEQ, BN) for c in channels, the second and later convolutions of
                 stride 2; global average pool, linear

    with the cells `nn.PositiveConcaveLinear` or, 3 x 3, `nn.PositiveConcaveConv2d`. A pooling
    window is cut to the image if the image is smaller. With the defaults, 28 x 28 x 1 images and 10
    classes, the three have 70,330, 69,054 and 41,194 parameters: those of the reference less its
    weight-norm gains, one per unit or channel.

    Make one with its batch-norm state, for instance
    `eqx.nn.make_with_state(PositiveConcaveNet.single)((28, 28, 1), 10, key=key)`.

    **Arguments** of `PositiveConcaveNet.linear`, `.single` and `.multi`:

    - `image_shape`: (height, width, channels) of one image.
    - `num_classes`: length of the logits.
    - `size` (linear), `channels` (single: one number; multi: one for each layer): widths.
    - `activation`, `nonnegative`: as in `nn.PositiveConcaveLinear`.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`, for every layer.
    - `dtype`: of parameters, images and compute; default: JAX's default float.
    - `key`: for the initial parameters.

    **Call:** `logits, state, solves = model(images, state)` with images (B, H, W, C). logits has
    shape (B, num_classes); solves has one `(x, sol)` for each layer of `model.deqs`, in order, and
    `layer.batch(x)` repeats the solve.

    **Cost:** one batched solve per layer: about 8 evaluations with sigmoid; more with other
    activations as the spectral radius at the fixed point grows.

    **When not to use it:** on one example at a time without `equinox.nn.inference_mode`, as batch
    norm needs a batch.

    **Raises:** `ValueError` for an activation that does not qualify, or images of another shape or
    of integers.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029, and its authors' code.
    """

    stages: tuple[Stage, ...]
    pool: Callable[[Array], Array]
    head: eqx.nn.Linear
    image_shape: ImageShape = eqx.field(static=True)

    @classmethod
    def linear(
        cls,
        image_shape: ImageShape,
        num_classes: int,
        *,
        size: int = 80,
        activation: Activation = jnp.tanh,
        nonnegative: Nonnegative = jnp.square,
        solver: OptimistixSolver = FixedPointIteration(),
        adjoint: AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 256,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "PositiveConcaveNet":
        """One dense equilibrium layer."""
        check_image_shape(image_shape)
        lift_key, cell_key, head_key = jax.random.split(key, 3)
        dense = eqx.nn.Linear(math.prod(image_shape), size, dtype=dtype, key=lift_key)
        cell = PositiveConcaveLinear(
            size, activation, nonnegative=nonnegative, dtype=dtype, key=cell_key
        )
        stage = Stage(
            lift=eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), dense]),
            norm_before=make_batch_norm(size, dtype),
            deq=DEQ(cell, solver, adjoint, max_steps=max_steps),
            after=eqx.nn.Identity(),
            norm_after=make_batch_norm(size, dtype),
        )
        head = eqx.nn.Linear(size, num_classes, dtype=dtype, key=head_key)
        return cls((stage,), eqx.nn.Identity(), head, image_shape)

    @classmethod
    def single(
        cls,
        image_shape: ImageShape,
        num_classes: int,
        *,
        channels: int = 82,
        activation: Activation = jnp.tanh,
        nonnegative: Nonnegative = jnp.square,
        solver: OptimistixSolver = FixedPointIteration(),
        adjoint: AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 256,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "PositiveConcaveNet":
        """One convolutional equilibrium layer at the image's resolution."""
        layer = partial(DEQ, solver=solver, adjoint=adjoint, max_steps=max_steps)
        cell = partial(PositiveConcaveConv2d, activation=activation, nonnegative=nonnegative)
        make = partial(cls._convolutional, image_shape, num_classes, (channels,), cell, layer)
        return make(after=max_pool, window=8, dtype=dtype, key=key)

    @classmethod
    def multi(
        cls,
        image_shape: ImageShape,
        num_classes: int,
        *,
        channels: Sequence[int] = (12, 24, 48),
        activation: Activation = jnp.tanh,
        nonnegative: Nonnegative = jnp.square,
        solver: OptimistixSolver = FixedPointIteration(),
        adjoint: AbstractAdjoint = ImplicitAdjoint(),
        max_steps: int = 256,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "PositiveConcaveNet":
        """Convolutional equilibrium layers, each at half the resolution of the previous one."""
        layer = partial(DEQ, solver=solver, adjoint=adjoint, max_steps=max_steps)
        cell = partial(PositiveConcaveConv2d, activation=activation, nonnegative=nonnegative)
        make = partial(cls._convolutional, image_shape, num_classes, channels, cell, layer)
        return make(after=eqx.nn.Identity(), window=None, dtype=dtype, key=key)

    @classmethod
    def _convolutional(
        cls,
        image_shape: ImageShape,
        num_classes: int,
        channels: Sequence[int],
        make_cell: Callable[..., PositiveConcaveConv2d],
        layer: Callable[[Any], DEQ],
        *,
        after: Callable[[Array], Array],
        window: int | None,  # None: the whole image
        dtype: DTypeLike | None,
        key: PRNGKeyArray,
    ) -> "PositiveConcaveNet":
        check_image_shape(image_shape)
        head_key, *keys = jax.random.split(key, 2 * len(channels) + 1)
        height, width, depth = image_shape
        # The stages, each after the first at half the resolution.
        stages = []
        for i, (before, here) in enumerate(pairwise((depth, *channels))):
            stride = 1 if i == 0 else 2
            height, width = -(-height // stride), -(-width // stride)
            cell = make_cell(here, dtype=dtype, key=keys[2 * i + 1])
            stage = Stage(
                lift=Conv2d(before, here, 3, stride, dtype=dtype, key=keys[2 * i]),
                norm_before=make_batch_norm(here, dtype),
                deq=layer(cell),
                after=after,
                norm_after=make_batch_norm(here, dtype),
            )
            stages.append(stage)
        # The pooling and the head.
        window = max(height, width) if window is None else window
        rows, columns = (n // min(window, n) for n in (height, width))
        features = rows * columns * channels[-1]
        head = eqx.nn.Linear(features, num_classes, dtype=dtype, key=head_key)
        # Not functools.partial, which compares by identity: each new model would compile again.
        pool = eqx.Partial(average_pool, window=window)
        return cls(tuple(stages), pool, head, image_shape)

    def __call__(self, images: Float[Array, "b h w c"], state: eqx.nn.State) -> Classified:
        """Classifies a batch."""
        check_images(images, self.image_shape)
        y, solves = images, []
        for stage in self.stages:
            y, state, solve = stage(y, state)
            solves.append(solve)
        y = jax.vmap(self.pool)(y)
        logits = jax.vmap(self.head)(y.reshape(len(y), -1))
        return Classified(logits, state, tuple(solves))

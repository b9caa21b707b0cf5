"""The implicit ResNets of the reversible DEQ paper, single and multi scale."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._problem import OptimistixSolver
from ..adjoints import AbstractAdjoint, ReversibleAdjoint
from ..nn import DEQ, Conv2d, GroupNorm
from ..solvers import Reversible
from ._base import (
    AbstractClassifier,
    Classified,
    Downsample,
    ImageShape,
    Solve,
    Stem,
    adaptive_average_pool,
    check_image_shape,
    check_images,
    layers,
)

_FIXED_DEPTH = Reversible(beta=0.8, rtol=0.0, atol=0.0)
_POOLED = 4  # pixels per side that the head sees


class ResidualCell(eqx.Module):
    """The cell `f(z, x) = GN(relu(z + GN(x + conv(relu(GN(conv z))))))`, 3 x 3 convolutions.

    **Arguments:**

    - `channels`: of z and x.
    - `width`: the inner convolution has `width * channels` channels.
    - `groups`: of the group norms; divides `channels`.
    - `dtype`: of the parameters; default: JAX's default float.
    - `compute_dtype`: of the convolutions, as in `nn.Conv2d`; norms and sums have the dtype of z.
    - `key`: for the initial kernels.

    **Call:** `cell(z, x)`, both of shape (H, W, channels); returns the same shape, of size at most
    `sqrt(H * W * channels / groups)` while the last norm's scale is 1 and its shift 0.

    **Cost:** two convolutions.

    **When not to use it:** if the fixed point itself matters: nothing makes this cell contract.

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
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        key1, key2 = jax.random.split(key)
        inner = width * channels
        conv = layers(dtype, compute_dtype).conv
        self.conv1 = conv(channels, inner, key=key1)
        self.conv2 = conv(inner, channels, key=key2)
        self.norm1 = GroupNorm(groups, inner, dtype=dtype)
        self.norm2 = GroupNorm(groups, channels, dtype=dtype)
        self.norm3 = GroupNorm(groups, channels, dtype=dtype)

    def __call__(self, z: Float[Array, "h w c"], x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """Evaluates the cell on one example."""
        inner = jax.nn.relu(self.norm1(self.conv1(z)))
        return self.norm3(jax.nn.relu(z + self.norm2(x + self.conv2(inner))))


class Stage(eqx.Module):
    """One scale: x is `lift` of the previous output, and `x + DEQ(x)` is the next."""

    lift: Stem | Downsample
    deq: DEQ


class ImplicitResNet(AbstractClassifier):
    """An image classifier: at each scale one equilibrium layer with a skip; linear head.

        x[1] = relu(BN(conv(images)));   x[i+1] = downsample(x[i] + DEQ_i(x[i]))
        logits = linear(pool(x[n] + DEQ_n(x[n])))

    with cells `ResidualCell`, downsampling to half the resolution by a pre-activation residual
    block, and average pooling to 4 x 4 (less if the image is smaller). The defaults are the paper's
    single-scale model, 24,682 parameters on 32 x 32 x 3 images of 10 classes;
    `ImplicitResNet.multi` has the defaults of its four scales, 10,338,954 parameters.

    **Arguments** of both:

    - `image_shape`: (height, width, channels) of one image.
    - `num_classes`: length of the logits.
    - `channels`, `width`: as in `ResidualCell`; one number for one scale, or one for each scale.
        One width may serve several scales.
    - `groups`: as in `ResidualCell`; the same at all scales.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`, for every scale. By default a
        solve takes `max_steps` steps, two reversible pairs or in `multi` four, whatever the
        residual. The paper stops at 1e-6, which so few steps do not reach. The state fits the
        integers of the solver's exact mode, because the cell ends in a norm (see `ResidualCell`).
    - `dtype`: of parameters and images, and of the state of a solve; default: JAX's default float.
    - `compute_dtype`: of the convolutions only, as in `nn.Conv2d`; default: `dtype`.
    - `key`: for the initial parameters.

    Make it with its batch-norm state: `eqx.nn.make_with_state(ImplicitResNet)(...)`.

    **Call:** `logits, state, solves = model(images, state)` with images (B, H, W, C). logits has
    shape (B, num_classes); solves has one `(x, sol)` for each layer of `model.deqs`, in order, and
    `layer.batch(x)` repeats the solve.

    **Cost:** one batched solve per scale; four evaluations of the cell, in `multi` eight of each.

    **When not to use it:** on one example at a time without `equinox.nn.inference_mode`, as batch
    norm needs a batch; for a guaranteed fixed point (use `PositiveConcaveNet`).

    **Raises:** `ValueError` for another number of widths than of channels, or images of another
    shape or of integers.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the image models. The layers of
    its downsampling are those that give its 10.3 M parameters.
    """

    stages: tuple[Stage, ...]
    head: eqx.nn.Linear
    image_shape: ImageShape = eqx.field(static=True)

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int,
        *,
        channels: int | Sequence[int] = 32,
        width: int | Sequence[int] = 1,
        groups: int = 8,
        solver: OptimistixSolver = _FIXED_DEPTH,
        adjoint: AbstractAdjoint = ReversibleAdjoint(),
        max_steps: int = 4,
        dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_image_shape(image_shape)
        channels = (channels,) if isinstance(channels, int) else tuple(channels)
        widths = (width,) * len(channels) if isinstance(width, int) else tuple(width)
        if len(widths) != len(channels) or not channels:
            raise ValueError(
                f"ImplicitResNet expects one width for each of its scales, got channels={channels}"
                f" and width={width}; give as many of both, or one width for all."
            )
        types = {"dtype": dtype, "compute_dtype": compute_dtype}
        make = layers(**types)
        *keys, head_key = jax.random.split(key, 2 * len(channels) + 1)
        rows, columns, depth = image_shape
        stages = []
        for i, (before, here) in enumerate(pairwise((depth, *channels))):
            lift = (Downsample if i else Stem)(make, before, here, key=keys[2 * i])
            cell = ResidualCell(here, widths[i], groups, **types, key=keys[2 * i + 1])
            stages.append(Stage(lift, DEQ(cell, solver, adjoint, max_steps=max_steps)))
            if i:
                rows, columns = -(-rows // 2), -(-columns // 2)
        features = min(_POOLED, rows) * min(_POOLED, columns) * channels[-1]
        self.stages = tuple(stages)
        self.head = eqx.nn.Linear(features, num_classes, dtype=dtype, key=head_key)
        self.image_shape = image_shape

    @classmethod
    def multi(
        cls,
        image_shape: ImageShape,
        num_classes: int,
        *,
        channels: Sequence[int] = (128, 256, 256, 128),
        width: int | Sequence[int] = (1, 3, 3, 1),
        groups: int = 8,
        solver: OptimistixSolver = _FIXED_DEPTH,
        adjoint: AbstractAdjoint = ReversibleAdjoint(),
        max_steps: int = 8,
        dtype: DTypeLike | None = None,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "ImplicitResNet":
        """The paper's multi-scale model: four scales, each at half the resolution of the last."""
        return cls(
            image_shape,
            num_classes,
            channels=channels,
            width=width,
            groups=groups,
            solver=solver,
            adjoint=adjoint,
            max_steps=max_steps,
            dtype=dtype,
            compute_dtype=compute_dtype,
            key=key,
        )

    def __call__(self, images: Float[Array, "b h w c"], state: eqx.nn.State) -> Classified:
        """Classifies a batch."""
        check_images(images, self.image_shape)
        y, solves = images, []
        for stage in self.stages:
            x, state = stage.lift(y, state)
            z, sol = stage.deq.batch(x)
            y = x + z
            solves.append(Solve(x, sol))
        pooled = jax.vmap(partial(adaptive_average_pool, size=_POOLED))(y)
        logits = jax.vmap(self.head)(pooled.reshape(len(pooled), -1))
        return Classified(logits, state, tuple(solves))

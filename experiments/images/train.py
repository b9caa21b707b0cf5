"""The parts of training and evaluating an image classifier: preparation, loss, evaluation.

Networks are called on batches, `logits, norms, solves = model(images, norms)`, where `norms` is
the Equinox state of the batch normalisation and `solves` holds (input, solution) of each DEQ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from deqjax.nn import shard_solves

from images.data import Split
from training.devices import local, place
from training.fit import TrainState
from training.solves import forward_evaluations, solve_metrics

Images = UInt8[Array, "n h w c"]
Labels = Int[Array, " n"]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """uint8 images to normalised float32 ones, shifted and mirrored at random when training."""

    mean: np.ndarray
    std: np.ndarray
    shift: int  # pixels
    mirror: bool

    def __call__(self, images: Images) -> Float[Array, "n h w c"]:
        return (images.astype(jnp.float32) - self.mean) / self.std

    def augment(self, images: Images, key: PRNGKeyArray) -> Images:
        n, *shape = images.shape
        shift_key, mirror_key = jax.random.split(key)
        if self.shift:
            width = ((0, 0), (self.shift,) * 2, (self.shift,) * 2, (0, 0))
            padded = jnp.pad(images, width)
            corner = jax.random.randint(shift_key, (n, 2), 0, 2 * self.shift + 1)
            crop = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), shape)
            images = jax.vmap(crop)(padded, corner)
        if self.mirror:
            side = jax.random.bernoulli(mirror_key, 0.5, (n, 1, 1, 1))
            images = jnp.where(side, images[:, :, ::-1], images)
        return images


def check_shift(shift: int, image_shape: tuple[int, ...]) -> None:
    """Refuses to shift images out of themselves."""
    side = min(image_shape[:2])
    if shift >= side:
        raise SystemExit(
            f"Expected --shift below the {side} pixels of a side of the images, got {shift}. "
            "Pass a smaller one."
        )


def make_loss(static: PyTree, prepare: Preparation, batch, label_smoothing: float) -> Callable:
    """Cross-entropy of the network on a batch, augmented: for `training.fit.make_step`."""

    def loss_fn(params, norms, key, images: Images, labels: Labels):
        images = prepare(prepare.augment(images, key))
        logits, norms, solves = shard_solves(eqx.combine(params, static), batch)(images, norms)
        if label_smoothing:
            targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
            targets = optax.smooth_labels(targets, label_smoothing)
            losses = optax.softmax_cross_entropy(logits, targets)
        else:  # other roundings, with which the results on record came about
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        metrics = {"accuracy": accuracy, **solve_metrics(solves, len(images))}
        return jnp.mean(losses), (norms, metrics)

    return loss_fn


def make_forward(static: PyTree, prepare: Preparation, batch, replicated):
    """Compiles `(params, norms, images) -> (logits, solves)` of the network at rest.

    The images are NumPy's, the same in every process; the results are each process's own copy.
    """

    def forward(params, norms, images):
        model = shard_solves(eqx.nn.inference_mode(eqx.combine(params, static)), batch)
        logits, _, solves = model(prepare(images), norms)
        return logits, solves

    compiled = jax.jit(forward, out_shardings=replicated)

    def run(params, norms, images: np.ndarray) -> tuple[Array, Any]:
        return local(compiled(params, norms, *place([images], batch)))

    return run


def evaluate(forward: Callable, state: TrainState, split: Split, size: int) -> dict[str, float]:
    """Means over a split of loss, accuracy and evaluations of f, in batches of `size`."""
    losses, correct, evaluations = [], [], []
    for images, labels in split.padded(size):
        n = len(labels)
        logits, solves = forward(state.params, state.norms, images)
        logits = np.asarray(logits, np.float64)[:n]
        peak = logits.max(1, keepdims=True)
        total = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
        losses.extend(total - logits[np.arange(n), labels])
        correct.extend(logits.argmax(1) == labels)
        evaluations.extend(np.asarray(forward_evaluations(solves, size))[:n])
    means = {"loss": losses, "accuracy": correct, "evaluations": evaluations}
    return {f"eval_{name}": float(np.mean(values)) for name, values in means.items()}

"""The jitted parts: a training step, an evaluation, and two measurements of a trained solve.

Networks are called on batches, `logits, norms, solves = model(images, norms)`, where `norms` is
the Equinox state of the batch normalisation and `solves` holds (input, solution) of each DEQ.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
from _data import Split
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

import deqjax

Images = UInt8[Array, "n h w c"]
Labels = Int[Array, " n"]
CODES = {
    "successful": deqjax.RESULTS.successful,
    "max_steps": deqjax.RESULTS.nonlinear_max_steps_reached,
    "divergence": deqjax.RESULTS.nonlinear_divergence,
    "nonfinite": deqjax.RESULTS.nonfinite,
}


class TrainState(NamedTuple):
    """All that a step changes, arrays only: what is donated, checkpointed and resumed."""

    params: PyTree
    norms: eqx.nn.State
    optimizer: PyTree
    key: PRNGKeyArray  # of the augmentation
    step: Int[Array, ""]  # also the position in the data, which is a function of it


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


def mesh() -> tuple[NamedSharding, NamedSharding]:
    """Two shardings over all devices: the batch axis split, and everything on each."""
    axis_types = (jax.sharding.AxisType.Auto,)
    devices: Mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=axis_types)
    return NamedSharding(devices, P("data")), NamedSharding(devices, P())


def make_step(
    static: PyTree,
    optimizer: optax.GradientTransformation,
    prepare: Preparation,
    batch,
    replicated,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Images, Labels], tuple[TrainState, dict[str, Array]]]:
    """Compile one update; the old state's buffers are donated to the new one.

    The gradient is taken of the mean over the whole, sharded batch: XLA adds up the devices'
    shares, and the batch normalisation sees the whole batch too, whatever the number of devices.
    """

    def loss_fn(params, norms, images, labels):
        logits, norms, solves = eqx.combine(params, static)(images, norms)
        if label_smoothing:
            targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
            targets = optax.smooth_labels(targets, label_smoothing)
            losses = optax.softmax_cross_entropy(logits, targets)
        else:  # other roundings, with which the results on record came about
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        return jnp.mean(losses), (norms, accuracy, solves)

    def step(state: TrainState, images: Images, labels: Labels):
        key, augment_key = jax.random.split(state.key)
        images = prepare(prepare.augment(images, augment_key))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (norms, accuracy, solves)), grads = grad_fn(
            state.params, state.norms, images, labels
        )
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.tree.norm(grads),
            "evaluations": jnp.mean(forward_evaluations(solves, images.shape[0])),
            "results": _count(solves),
        }
        return TrainState(params, norms, optimizer_state, key, state.step + 1), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(replicated, batch, batch),
        out_shardings=(replicated, replicated),
    )


def make_forward(static: PyTree, prepare: Preparation, batch, replicated):
    """Compile `(params, norms, images) -> (logits, solves)` of the network at rest."""

    def forward(params, norms, images):
        model = eqx.nn.inference_mode(eqx.combine(params, static))
        logits, _, solves = model(prepare(images), norms)
        return logits, solves

    return jax.jit(forward, in_shardings=(replicated, replicated, batch), out_shardings=replicated)


def evaluate(forward: Callable, state: TrainState, split: Split, size: int) -> dict[str, float]:
    """Means over a split of loss, accuracy and evaluations of f, in batches of `size`."""
    losses, correct, evaluations = [], [], []
    for i in range(0, len(split.labels), size):
        images, labels = split.images[i : i + size], split.labels[i : i + size]
        n = len(labels)
        # One compilation: the last batch is filled up with examples that are cut off again.
        images = np.pad(images, ((0, size - n), (0, 0), (0, 0), (0, 0)))
        logits, solves = forward(state.params, state.norms, images)
        logits = np.asarray(logits, np.float64)[:n]
        peak = logits.max(1, keepdims=True)
        total = np.log(np.exp(logits - peak).sum(1)) + peak[:, 0]
        losses.extend(total - logits[np.arange(n), labels])
        correct.extend(logits.argmax(1) == labels)
        evaluations.extend(np.asarray(forward_evaluations(solves, size))[:n])
    means = {"loss": losses, "accuracy": correct, "evaluations": evaluations}
    return {f"eval_{name}": float(np.mean(values)) for name, values in means.items()}


def forward_evaluations(solves, n: int) -> Float[Array, " n"]:
    """Evaluations of f each example costs in a forward pass, summed over the solves.

    A network without solves applies its cells once each, which counts as 1.
    """
    if not solves:
        return jnp.ones(n)
    counts = jnp.stack([sol.stats["num_fn_evals"] for _, sol in solves])
    return jnp.sum(counts, 0, dtype=jnp.float32)


def backward_evaluations(model: PyTree, solves, key: PRNGKeyArray) -> float:
    """Evaluations of f with its VJP that an example costs in a backward pass, over the solves.

    `ReversibleAdjoint` takes one for each step of the forward solve, num_steps, and in the exact
    mode evaluates f alone once more. `ImplicitAdjoint` solves (I - J^T) y = g by the VJPs of an
    iteration: their mean number over the batch is measured with `deqjax.implicit_vjp`, at the
    solution the model found and with a cotangent g drawn from the unit normal distribution; one
    more VJP finds that the tolerance is met, and another carries y to the parameters. A network
    without solves applies the VJPs of its cells once each, which counts as 1.
    """
    if not model.deqs:
        return 1.0
    total = 0.0
    for deq, (x, sol) in zip(model.deqs, solves, strict=True):
        if isinstance(deq.adjoint, deqjax.ReversibleAdjoint):
            total += float(jnp.mean(sol.stats["num_steps"]))
            continue
        cell = paramax.unwrap(deq.cell)
        inject = getattr(cell, "inject", None)
        x = x if inject is None else jax.vmap(inject)(x)
        cotangent = jax.random.normal(key, sol.value.shape, sol.value.dtype)
        _, stats = deqjax.implicit_vjp(
            jax.vmap(cell),
            sol.value,
            x,
            cotangent,
            adjoint=deq.adjoint,
            max_steps=deq.max_steps,
            batched=True,
        )
        total += float(jnp.mean(stats["num_steps"])) + 2.0
    return total


def residual_curves(model: PyTree, solves, max_steps: int) -> list[np.ndarray]:
    """||f(z_k) - z_k|| / ||f(z_k)|| of k = 0 .. max_steps, (steps, examples), for each solve.

    Each k is a solve of its own from the start, its number of steps traced: one compilation.
    """
    curves = []
    for deq, (x, _) in zip(model.deqs, solves, strict=True):
        solver = dataclasses.replace(deq.solver, rtol=0.0, atol=0.0)  # never stops early
        deq = dataclasses.replace(deq, solver=solver, max_steps=max_steps)
        x = x[:16]  # each of them costs max_steps^2 / 2 evaluations
        residual = lambda k, deq=deq, x=x: deq.batch(x, steps=k)[1].stats["residual"]
        curves.append(np.asarray(jax.lax.map(residual, jnp.arange(max_steps + 1))))
    return curves


def _count(solves) -> dict[str, Array]:
    """How many solves ended with each result code."""
    codes = [sol.result for _, sol in solves]
    return {
        name: sum((jnp.sum(code == c) for c in codes), jnp.zeros((), int))
        for name, code in CODES.items()
    }

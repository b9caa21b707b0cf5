"""The training loop of all experiments: one step, sharded over devices, and a long run of them."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from training.devices import is_main, place
from training.options import Session
from training.run import RunFolder


class TrainState(NamedTuple):
    """All that a step changes, arrays only: what is donated, checkpointed and resumed."""

    params: PyTree
    norms: PyTree  # the Equinox state of batch normalisations; None without
    optimizer: PyTree
    key: PRNGKeyArray  # of the augmentation, of dropout
    step: Int[Array, ""]  # also the position in the data, which is a function of it


def make_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    batch: NamedSharding,
    replicated: NamedSharding,
    *,
    accumulate: int = 1,
) -> Any:
    """Compiles one update, `step(state, *examples) -> (state, metrics)`.

    `loss_fn(params, norms, key, *examples) -> (loss, (norms, metrics))` gives means over examples,
    but for the counts under "results" and what is called "..._peak", the largest of them. The
    gradient is taken of the mean over the whole, sharded batch: XLA adds up the devices' shares,
    and a batch normalisation sees the whole batch too, whatever the number of devices. The old
    state's buffers are donated.

    With `accumulate` the batch is taken in so many parts, one after another, each with a gradient
    of its own; a batch normalisation then sees one part at a time.
    """
    differentiate = jax.value_and_grad(loss_fn, has_aux=True)

    def gradient(params, norms, key, examples):
        (loss, (norms, metrics)), grads = differentiate(params, norms, key, *examples)
        return grads, norms, {"loss": loss, **metrics}

    def accumulated(params, norms, key, examples):
        # Row i of device d's share goes into part i % accumulate, so that no row travels.
        parts = lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        split = NamedSharding(batch.mesh, jax.P(None, *batch.spec))
        examples = jax.lax.with_sharding_constraint(jax.tree.map(parts, examples), split)
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))

        def one(carry, part):
            total, norms = carry
            grads, norms, metrics = gradient(params, norms, *part)
            return (jax.tree.map(lambda t, g: t + wide(g), total, grads), norms), metrics

        zeros = jax.tree.map(lambda x: jnp.zeros_like(wide(x)), params)
        carry, metrics = (zeros, norms), (jax.random.split(key, accumulate), examples)
        (total, norms), metrics = jax.lax.scan(one, carry, metrics)
        grads = jax.tree.map(lambda t, x: (t / accumulate).astype(x.dtype), total, params)
        results = jax.tree.map(lambda x: jnp.sum(x, 0), metrics.pop("results", {}))
        peak = lambda name, x: jnp.max(x, 0) if name.endswith("_peak") else jnp.mean(x, 0)
        metrics = {name: peak(name, x) for name, x in metrics.items()}
        return grads, norms, metrics | ({"results": results} if results else {})

    def step(state: TrainState, *examples: Array) -> tuple[TrainState, dict[str, Any]]:
        examples = jax.lax.with_sharding_constraint(examples, batch)
        key, step_key = jax.random.split(state.key)
        whole = gradient if accumulate == 1 else accumulated
        grads, norms, metrics = whole(state.params, state.norms, step_key, examples)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(params, norms, optimizer_state, key, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=replicated)


def fit(
    folder: RunFolder,
    step_fn: Callable,
    state: TrainState,
    batch_of: Callable[[int], tuple[np.ndarray, ...]],
    sharding: NamedSharding,
    *,
    session: Session,
    total: int,
    assess: Callable[[TrainState], dict[str, Any]],
    assess_every: int,
    per_step: int,
    unit: str,
) -> tuple[TrainState, dict[str, Any]]:
    """Takes the steps from `state.step` to `total`; returns the state and an assessment.

    The session says where to stop before that, and how often to log and to save. `batch_of(step)`
    is the global batch, the same in every process; `assess(state)` is the line of an evaluation,
    every `assess_every` steps unless the session has its own number, of whose "eval_loss" the
    lowest marks the best checkpoint. `per_step` are the images or tokens, `unit`, of a step.

    On SIGTERM the step is finished and the state saved; the exit status is 0, since a run that
    stops when it is told to, and loses nothing, has not failed.
    """
    stop = total if session.stop_after is None else min(total, session.stop_after)
    assess_every = session.assess_every or assess_every
    step, pending, last, clock = int(state.step), [], {}, time.perf_counter()
    bar = tqdm(total=stop, initial=step, desc=folder.path.name, unit="step", disable=not is_main())
    try:
        with bar, _termination() as asked_to_stop:
            while step < stop:
                state, metrics = step_fn(state, *place(batch_of(step), sharding))
                step += 1
                pending.append(metrics)
                leave = asked_to_stop(step)
                saving = leave or step == stop or step % session.checkpoint_every == 0
                assessing = step == total or step % assess_every == 0
                if not (saving or assessing or step % session.log_every == 0):
                    continue
                # Reading is what waits for the device, so all these steps are read at once.
                lines = [jax.tree.map(lambda x: x.item(), x) for x in jax.device_get(pending)]
                speed = len(lines) * per_step / (time.perf_counter() - clock)
                first = step - len(lines) + 1
                lines = [
                    {"step": i, **line, f"{unit}_per_second": round(speed, 1)}
                    for i, line in enumerate(lines, first)
                ]
                folder.log(*lines)
                stop_if_not_finite(lines, folder)
                shown = ("loss", "accuracy", "evaluations")
                shown = {k: f"{lines[-1][k]:.3g}" for k in shown if k in lines[-1]}
                bar.set_postfix(shown | {f"{unit}/s": f"{speed:.0f}"}, refresh=False)
                bar.update(len(lines))
                improved = False
                if assessing:
                    last = {"step": step, **assess(state)}
                    folder.log(last)
                    improved = folder.improves(last["eval_loss"])
                if saving or improved:
                    folder.save(step, state, last["eval_loss"] if assessing else None)
                if leave:
                    folder.wait()
                    if is_main():
                        bar.write(f"Stopped at step {step} of {folder.path}; --resume goes on.")
                    raise SystemExit(0)
                pending, clock = [], time.perf_counter()
    finally:
        folder.wait()
    if last.get("step") != step:
        last = {"step": step, **assess(state)}
    return state, last


def stop_if_not_finite(lines: list[dict[str, Any]], folder: RunFolder) -> None:
    for line in lines:
        for name in ("loss", "gradient_norm"):
            if math.isfinite(line[name]):
                continue
            counts = line.get("results", {})
            results = ", ".join(f"{n} {code}" for code, n in counts.items() if n)
            raise SystemExit(
                f"Stopped: expected a finite {name.replace('_', ' ')}, got {line[name]} at step "
                f"{line['step']} of {folder.path}, where the solves of the batch ended so: "
                f"{results or 'no solves'}. Start a new run with a lower --learning-rate."
            )


@contextmanager
def _termination() -> Iterator[Callable[[int], bool]]:
    """Tells whether SIGTERM asks to stop after a step: the same step in all processes."""
    if jax.process_count() > 1:
        # JAX takes the signal itself, in whichever process it comes, and has them agree on a step.
        yield multihost_utils.reached_preemption_sync_point
        return
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)

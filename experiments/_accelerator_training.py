"""Training on this machine: a language model on bytes, then the CIFAR-10 preset on random images.

Operations of a step are those of the products of forward, reconstruction and VJP: of n evaluations,
each by exact reversal twice more f and f with its VJP, and of the head. Their share is of the
measured rate of bfloat16 products.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _accelerator_run import Program, Run, Size, compiled, good
from _throughput_blocks import Language
from _ways import EXTRA
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

import deqjax
from deqjax.models import ImplicitResNet, ReversibleTransformer

BYTES = 256
_VJP_FLOP = 3  # of those of f


@dataclasses.dataclass(frozen=True)
class Text:
    """A model of bytes; the width is the paper's preset for small text."""

    block: Language
    batch: int
    steps: int = 8
    learning_rate: float = 2e-3
    warmup: int = 50


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The CIFAR-10 preset of `image_classification.py`, and smaller ones."""

    channels: tuple[int, ...]
    widths: tuple[int, ...]
    pixels: int
    batch: int
    updates: int = 20
    steps: int = 8
    learning_rate: float = 3e-4


TEXT: dict[Size, Text] = {
    "smoke": Text(Language(8, 2, (8,), 8, BYTES), 4, steps=2, learning_rate=0.05, warmup=1),
    "reduced": Text(Language(128, 4, (512,), 128, BYTES), 8),
    "full": Text(Language(256, 4, (1024,), 256, BYTES), 128),
}
PICTURES: dict[Size, Pictures] = {
    "smoke": Pictures((8,), (1,), 8, 4, updates=3, steps=2, learning_rate=1e-2),
    "reduced": Pictures((16, 32, 32, 16), (1, 1, 1, 1), 32, 8, updates=10, steps=4),
    "full": Pictures((128, 256, 256, 128), (1, 3, 3, 1), 32, 64),
}


def corpus(path: Path | None) -> np.ndarray:
    """Bytes of a file, or of the language reference that comes with Python."""
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    whole = text.encode() if path is None else path.read_bytes()
    return np.frombuffer(whole, np.uint8)


def updated(loss: Callable[..., Array], optimiser: Any) -> Callable[..., Any]:
    """A step of training, of `(params, state, *data)`."""

    def fn(params, state, *data):
        value, gradient = jax.value_and_grad(loss)(params, *data)
        updates, state = optimiser.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    return fn


def text_step(size: Size, key: PRNGKeyArray, dtype: Any) -> Program:
    t = TEXT[size]
    b = t.block
    how: Any = {"width": b.width, "heads": b.heads, "hidden": b.hidden, "compute_dtype": dtype}
    model = ReversibleTransformer(BYTES, b.length, **how, max_steps=t.steps, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    rate = optax.linear_schedule(0.0, t.learning_rate, t.warmup)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))

    def loss(params: PyTree, tokens: Int[Array, "b l"]) -> Array:
        logits, _ = eqx.combine(params, static)(tokens[:, :-1])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(entropy)

    tokens = jnp.zeros((t.batch, b.length + 1), jnp.int32)
    return updated(loss, optimiser), (params, optimiser.init(params), tokens)


def image_step(size: Size, key: PRNGKeyArray, dtype: Any) -> Program:
    p = PICTURES[size]
    solver = deqjax.Reversible(beta=0.8, rtol=0.0, atol=0.0)
    how: Any = {"channels": p.channels, "width": p.widths, "compute_dtype": dtype}
    how |= {"solver": solver, "max_steps": p.steps, "key": key}
    shape = (p.pixels, p.pixels, 3)
    net, norms = eqx.nn.make_with_state(ImplicitResNet)(shape, 10, **how)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    optimiser = optax.adamw(p.learning_rate, weight_decay=1e-2)

    def loss(params: PyTree, norms: Any, images: Array, labels: Array) -> Array:
        logits, _, _ = eqx.combine(params, static)(images, norms)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(entropy)

    images = jax.random.normal(key, (p.batch, *shape))
    labels = jax.random.randint(key, (p.batch,), 0, 10)
    return updated(loss, optimiser), (params, optimiser.init(params), norms, images, labels)


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    for dtype in (None, jnp.bfloat16):
        yield f"text, {dtype}", text_step(size, key, dtype)
        yield f"images, {dtype}", image_step(size, key, dtype)


def training(run: Run) -> None:
    # A CPU emulates bfloat16.
    dtype = jnp.bfloat16 if run.size == "full" else None
    made: dict[str, Any] = {}

    def text() -> None:
        steps = {"text": text_step(run.size, run.key, dtype)}
        steps["images"] = image_step(run.size, run.key, dtype)
        made.update(compiled(steps))
        train_text(run, good(made["text"]))

    def images() -> None:
        train_images(run, good(made["images"]))

    run.cases({"text": text, "images": images})


def train_text(run: Run, program: Any) -> None:
    t = TEXT[run.size]
    data, rng = corpus(run.text), np.random.default_rng(run.seed)
    params, state, _ = program.inputs
    rows = np.arange(t.block.length + 1)
    # A fifth is left to the images.
    start, end = time.time(), time.time() + 0.8 * run.left
    pending: list[Any] = []
    losses: list[float] = []
    spoken, least = start, 6
    while len(losses) + len(pending) < least or time.time() < end:
        at = rng.integers(0, len(data) - t.block.length - 1, (t.batch, 1))
        tokens = jnp.asarray(data[at + rows.reshape(1, -1)], jnp.int32)
        loss, params, state = program.program(params, state, tokens)
        pending.append(loss)
        # A few steps ahead of the device, and no more, so that the clock is its own.
        if len(pending) == 4:
            losses.append(float(pending.pop(0)))
        if time.time() - spoken > 10:
            spoken = time.time()
            run.write(at_second=spoken - start, step=len(losses), nats=float(losses[-1]))
        if run.size == "smoke" and len(losses) > 8:
            break
    losses += [float(x) for x in pending]
    taken = time.time() - start
    tenth = max(len(losses) // 10, 3)
    first, last = losses[0], float(np.mean(losses[-tenth:]))
    n, tokens = len(losses), t.batch * t.block.length
    head = 3 * 2 * t.block.width * BYTES * tokens
    flop = t.steps * (EXTRA["exact"] + _VJP_FLOP) * sum(t.block.flop(t.batch)) + head
    rate = run.known("rates").get("bfloat16", math.nan)
    said = f"{first:.3f} nats, {last:.3f} after {n} steps and {taken:.0f} s; "
    said += f"{n * tokens / taken:.4g} tokens/s, {n * flop / taken / rate:.1%} of the bfloat16 rate"
    ok = bool(np.all(np.isfinite(losses))) and last < first
    numbers = {
        "seconds": taken,
        "steps": n,
        "nats": [round(x, 4) for x in losses[:: max(n // 200, 1)]],
    }
    run.add(f"text, {t.block}", said, limit="falls", ok=ok, **numbers)


def train_images(run: Run, program: Any) -> None:
    p = PICTURES[run.size]
    params, state, *data = program.inputs
    losses: list[float] = []
    times = []
    for _ in range(p.updates):
        start = time.perf_counter()
        loss, params, state = program.program(params, state, *data)
        losses.append(float(loss))
        times.append(time.perf_counter() - start)
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    said = f"{losses[0]:.3f} nats, {losses[-1]:.3f} after {p.updates} steps on the same images; "
    said += f"{p.batch / float(np.median(times)):.4g} images/s, {program.bytes / 2**20:.4g} MiB"
    said += f", held at most {peak / 2**20:.4g} MiB" if peak else ""
    ok = bool(np.all(np.isfinite(losses))) and losses[-1] < losses[0]
    run.add(f"images, channels {p.channels}, batch {p.batch}", said, limit="falls", ok=ok)

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
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

import deqjax
from deqjax.models import ImplicitResNet, ReversibleTransformer

from bench.accelerator.run import Compiled, Program, Run, Size, compiled, good, mebibytes
from bench.throughput.blocks import Language
from bench.ways import VJP_FLOP, needed_flop

BYTES = 256


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


def entropy(logits: Array, labels: Array) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def updated(loss: Callable[..., Array], optimiser: Any) -> Callable[..., Any]:
    """A step of training, of `(params, state, *data)`."""

    def fn(params, state, *data):
        value, gradient = jax.value_and_grad(loss)(params, *data)
        with jax.numpy_dtype_promotion("standard"):  # Optax itself is not strict.
            updates, state = optimiser.update(gradient, state, params)
        return value, optax.apply_updates(params, updates), state

    return fn


def text_programs(size: Size, key: PRNGKeyArray, dtype: Any) -> tuple[Program, Program]:
    """A step of training, of `(params, state, tokens)`; and the loss, of `(params, tokens)`."""
    t = TEXT[size]
    b = t.block
    how: Any = {"width": b.width, "heads": b.heads, "hidden": b.hidden, "compute_dtype": dtype}
    model = ReversibleTransformer(BYTES, b.length, **how, max_steps=t.steps, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    rate = optax.linear_schedule(0.0, t.learning_rate, t.warmup)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))

    def loss(params: PyTree, tokens: Int[Array, "b l"]) -> Array:
        return entropy(eqx.combine(params, static)(tokens[:, :-1])[0], tokens[:, 1:])

    tokens = jnp.zeros((t.batch, b.length + 1), jnp.int32)
    step = updated(loss, optimiser), (params, optimiser.init(params), tokens)
    return step, (loss, (params, tokens))


def image_step(size: Size, key: PRNGKeyArray) -> Program:
    p = PICTURES[size]
    solver, shape = deqjax.Reversible(beta=0.8, rtol=0.0, atol=0.0), (p.pixels, p.pixels, 3)
    how: Any = {"channels": p.channels, "width": p.widths, "solver": solver, "key": key}
    how["max_steps"] = p.steps
    net, norms = eqx.nn.make_with_state(ImplicitResNet)(shape, 10, **how)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    optimiser = optax.adamw(p.learning_rate, weight_decay=1e-2)

    def loss(params: PyTree, norms: Any, images: Array, labels: Array) -> Array:
        return entropy(eqx.combine(params, static)(images, norms)[0], labels)

    images = jax.random.normal(key, (p.batch, *shape))
    labels = jax.random.randint(key, (p.batch,), 0, 10)
    return updated(loss, optimiser), (params, optimiser.init(params), norms, images, labels)


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    for dtype in (None, jnp.bfloat16):
        step, loss = text_programs(size, key, dtype)
        yield from ((f"text, {dtype}", step), (f"held out, {dtype}", loss))
    yield "images", image_step(size, key)


def training(run: Run) -> None:
    def text() -> None:
        # A CPU emulates bfloat16.
        dtype = jnp.bfloat16 if run.size == "full" else None
        step, loss = text_programs(run.size, run.key, dtype)
        end = time.time() + run.left / 2  # half is left to the images, which take long to compile
        made = compiled({"step": step, "loss": loss})
        train_text(run, good(made["step"]), good(made["loss"]), end)

    def images() -> None:
        train_images(run, good(compiled({"": image_step(run.size, run.key)})[""]))

    run.cases({"text": text, "images": images})


def train_text(run: Run, step: Compiled, loss: Compiled, end: float) -> None:
    t, rng = TEXT[run.size], np.random.default_rng(run.seed)
    length, data = t.block.length, corpus(run.text)
    cut = len(data) * 9 // 10
    params, state, _ = step.inputs

    def batch(some: np.ndarray) -> Array:
        at = rng.integers(0, len(some) - length - 1, (t.batch, 1))
        return jnp.asarray(some[at + np.arange(length + 1).reshape(1, -1)], jnp.int32)

    held_out = [batch(data[cut:]) for _ in range(4)]
    test = lambda: float(np.mean([loss.program(params, x) for x in held_out]))
    spoken = start = time.time()
    losses: list[float] = []
    pending: list[Array] = []
    tested = 0.0  # seconds
    least, most = (9, 9) if run.size == "smoke" else (6, math.inf)
    while len(losses) < least or (len(losses) < most and time.time() < end):
        value, params, state = step.program(params, state, batch(data[:cut]))
        pending.append(value)
        # A few steps ahead of the device and no more, so that the clock is its own.
        if len(pending) == 4:
            losses.append(float(pending.pop(0)))
        if time.time() - spoken > 10:
            losses += [float(x) for x in pending]
            pending, spoken = [], time.time()
            run.write(second=spoken - start, step=len(losses), nats=losses[-1], held_out=test())
            tested += time.time() - spoken
    losses += [float(x) for x in pending]
    taken, n, other = time.time() - start - tested, len(losses), test()

    last = float(np.mean(losses[-max(n // 10, 3) :]))
    tokens = t.batch * length
    head = VJP_FLOP * 2 * t.block.width * BYTES * tokens
    flop = needed_flop("exact", t.steps, sum(t.block.flop(t.batch))) + head
    rate = run.known("rates").get("bfloat16", math.nan)
    said = f"{losses[0]:.3f} nats, {last:.3f} after {n} steps and {taken:.0f} s ({other:.3f} on "
    said += f"text held out); {n * tokens / taken:.4g} tokens/s, "
    said += f"{n * flop / taken / rate:.1%} of the bfloat16 rate"
    ok = bool(np.all(np.isfinite(losses))) and last < losses[0]
    run.add(f"text, {t.block}", said, limit="falls", ok=ok, seconds=taken, steps=n)


def train_images(run: Run, program: Compiled) -> None:
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
    said += f"{p.batch / float(np.median(times)):.4g} images/s, {mebibytes(program.bytes)}"
    said += f", held at most {peak / 2**20:.4g} MiB" if peak else ""
    ok = bool(np.all(np.isfinite(losses))) and losses[-1] < losses[0]
    run.add(f"images, channels {p.channels}, batch {p.batch}", said, limit="falls", ok=ok)

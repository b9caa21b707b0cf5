"""Memory maps, memory and compilations that eager calls leave, a new lambda each time."""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import deqjax

from bench.rows import Row
from bench.soundness.work import work

N = 64
_WARM = 3  # calls before anything is counted
# A process dies at 65,530 maps: this one stops before.
_MOST_MAPS = 40_000
_compilations: list[str] = []


def programs(count: int, seconds: float, seed: int, workers: int) -> list[Row]:
    """`count` calls of each entry point, or as many as it makes in `seconds`."""
    parts = [list(ENTRIES)[i :: max(workers, 1)] for i in range(max(workers, 1))]
    tasks = [(part, count, seconds, seed) for part in parts]
    return [row for rows in work(_entries, tasks, workers) for row in rows]


def _entries(names: list[str], count: int, seconds: float, seed: int) -> list[Row]:
    jax.monitoring.register_event_duration_secs_listener(_listen)
    return [_measured(name, count, seconds, seed) for name in names]


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


def _measured(name: str, count: int, seconds: float, seed: int) -> Row:
    """Arrays of a closure are new at every call too."""
    weights = jax.random.uniform(jax.random.key(seed), (8, N, N), maxval=1 / N)
    x, (sigma, call) = jnp.full(N, 0.1), ENTRIES[name]

    def once(w):
        jax.block_until_ready(call(lambda z, a: sigma(w @ z + a), x))

    for i in range(_WARM):
        once(weights[i % 8])
    maps, resident, compiled = _maps(), _resident(), len(_compilations)
    times, start = [], time.perf_counter()
    while len(times) < count and time.perf_counter() - start < seconds and _maps() < _MOST_MAPS:
        w = weights[len(times) % 8]
        before = time.process_time()  # which other processes do not lengthen
        once(w)
        times.append(time.process_time() - before)
    return {
        "entry": name,
        "calls": len(times),
        "asked": count,
        "maps": _maps() - maps,
        "MiB": _resident() - resident,
        "compilations": len(_compilations) - compiled,
        "ms": 1e3 * statistics.median(times),
    }


def _maps() -> int:
    """Counts the maps of this process; 0 where the system does not say."""
    file = Path("/proc/self/maps")
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _resident() -> float:
    """MiB now; the most so far where the system does not say."""
    file = Path("/proc/self/statm")
    if file.exists():
        return int(file.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# --- an entry point is called with a function that closes over an array, and with x

_PICARD = deqjax.FixedPointIteration()


def _solved(f, x, solver: deqjax.AbstractSolver = _PICARD):
    sol = deqjax.fixed_point(f, solver, x, x, max_steps=32)
    return sol.value, sol.stats["residual"]


def _gradient(f, x):
    value = lambda a: deqjax.fixed_point(f, _PICARD, x, a, max_steps=32).value
    return jax.grad(lambda a: jnp.sum(value(a)))(x)


def _path(f, x):
    sols = deqjax.fixed_point_path(f, _PICARD, x, x, indices=(4,), max_steps=16)
    return [(sol.value, sol.stats["residual"]) for sol in sols]


def _deq(cell):
    return deqjax.nn.DEQ(cell, _PICARD, deqjax.ImplicitAdjoint(), 32)


def _layer_certified(f, x):
    """Certifies a batch by a layer that is the same every time but for its arrays."""
    return tuple(_deq(deqjax.nn.PositiveConcave(f)).certify(x[None], x[None], batched=True))


def _radius(f, x):
    return tuple(deqjax.spectral_radius(f, x, x, key=jax.random.key(0), max_steps=8))


def _hypotheses(f, x):
    return deqjax.positive.check_hypotheses(f, x, key=jax.random.key(0), samples=4).holds


# The activation of the function, and the call.
ENTRIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "fixed_point": (jnp.tanh, _solved),
    "its gradient": (jnp.tanh, _gradient),
    "implicit_vjp": (jnp.tanh, lambda f, x: deqjax.implicit_vjp(f, x, x, x, max_steps=32)[0]),
    "reversible_vjp": (jnp.tanh, lambda f, x: deqjax.reversible_vjp(
        f, deqjax.Reversible(), x, x, x, max_steps=16)[0]),
    "spectral_radius": (jnp.tanh, _radius),
    "jacobian_frobenius": (jnp.tanh, lambda f, x: deqjax.jacobian_frobenius(
        f, x, x, key=jax.random.key(0))),
    "certify": (jnp.tanh, lambda f, x: tuple(deqjax.certify(f, x, x))),
    "check_hypotheses": (jnp.tanh, _hypotheses),
    "fixed_point_path": (jnp.tanh, _path),
    "nn.DEQ": (jnp.tanh, lambda f, x: _deq(f)(x)[0]),
    "nn.DEQ.batch": (jnp.tanh, lambda f, x: _deq(f).batch(x[None])[0]),
    "nn.DEQ.certify, batched": (jnp.tanh, _layer_certified),
    "Bracketing": (jnp.tanh, lambda f, x: _solved(f, x, deqjax.Bracketing(upper=1.0))),
    # relu6 has a derivative rule, which is compared too.
    "a cell with a rule": (jax.nn.relu6, _solved),
}  # fmt: skip

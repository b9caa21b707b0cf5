"""What eager calls leave behind: memory maps, memory and compilations, a new lambda each time."""

import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import deqjax

from bench.report import Row
from bench.soundness.work import work

N = 64
_WARM = 3  # calls before anything is counted
# A process dies at 65,530 maps: this one stops before.
_MOST_MAPS = 40_000
_compilations: list[str] = []


def programs(count: int, seconds: float, seed: int, workers: int) -> list[Row]:
    """`count` calls of each entry point, or as many as it makes in `seconds`."""
    names = list(ENTRIES)
    parts = [names[i :: max(workers, 1)] for i in range(max(workers, 1))]
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
    key = jax.random.key(seed)
    weights = jax.random.uniform(key, (8, N, N), maxval=1 / N)
    x, call = jnp.full(N, 0.1), ENTRIES[name]
    for i in range(_WARM):
        jax.block_until_ready(call(weights[i % 8], x))
    maps, resident, compiled = _maps(), _resident(), len(_compilations)
    times, start, done = [], time.perf_counter(), 0
    while done < count and time.perf_counter() - start < seconds and _maps() < _MOST_MAPS:
        w = weights[done % 8]
        before = time.process_time()  # which other processes do not lengthen
        jax.block_until_ready(call(w, x))
        times.append(time.process_time() - before)
        done += 1
    return {
        "entry": name,
        "calls": done,
        "asked": count,
        "maps": _maps() - maps,
        "MiB": _resident() - resident,
        "compilations": len(_compilations) - compiled,
        "ms": 1e3 * statistics.median(times),
    }


def _maps() -> int:
    """Of this process; 0 where the system does not say."""
    file = Path("/proc/self/maps")
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _resident() -> float:
    """MiB now; the most so far where the system does not say."""
    file = Path("/proc/self/statm")
    if file.exists():
        return int(file.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# Each makes a new function that closes over w, and calls one entry point with it.


def _arrays(sol: Any) -> Any:
    return sol.value, sol.stats["residual"]


def _fixed_point(w, x):
    fn = lambda z, a: jnp.tanh(w @ z + a)
    return _arrays(deqjax.fixed_point(fn, deqjax.FixedPointIteration(), x, x, max_steps=32))


def _gradient(w, x):
    def loss(a):
        fn = lambda z, a: jnp.tanh(w @ z + a)
        return jnp.sum(
            deqjax.fixed_point(fn, deqjax.FixedPointIteration(), x, a, max_steps=32).value
        )

    return jax.grad(loss)(x)


def _implicit_vjp(w, x):
    return deqjax.implicit_vjp(lambda z, a: jnp.tanh(w @ z + a), x, x, x, max_steps=32)[0]


def _reversible_vjp(w, x):
    fn, solver = lambda z, a: jnp.tanh(w @ z + a), deqjax.Reversible()
    return deqjax.reversible_vjp(fn, solver, x, x, x, max_steps=16)[0]


def _spectral_radius(w, x):
    fn = lambda z, a: jnp.tanh(w @ z + a)
    return tuple(deqjax.spectral_radius(fn, x, x, key=jax.random.key(0), max_steps=8))


def _frobenius(w, x):
    return deqjax.jacobian_frobenius(lambda z, a: jnp.tanh(w @ z + a), x, x, key=jax.random.key(0))


def _certify(w, x):
    return tuple(deqjax.certify(lambda z, a: jnp.tanh(w @ z + a), x, x))


def _hypotheses(w, x):
    cell = lambda z, a: jnp.tanh(w @ z + a)
    found = deqjax.positive.check_hypotheses(cell, x, key=jax.random.key(0), samples=4)
    return found.holds


def _path(w, x):
    fn, solver = lambda z, a: jnp.tanh(w @ z + a), deqjax.FixedPointIteration()
    sols = deqjax.fixed_point_path(fn, solver, x, x, indices=(4,), max_steps=16)
    return [_arrays(sol) for sol in sols]


def _deq(cell):
    return deqjax.nn.DEQ(cell, deqjax.FixedPointIteration(), deqjax.ImplicitAdjoint(), 32)


def _layer(w, x):
    cell = lambda z, a: jnp.tanh(w @ z + a)
    return _deq(cell)(x)[0]


def _rule(w, x):
    """relu6 has a derivative rule, which is compared too."""
    fn = lambda z, a: jax.nn.relu6(w @ z + a)
    return _arrays(deqjax.fixed_point(fn, deqjax.FixedPointIteration(), x, x, max_steps=32))


def _certified(w, x):
    fn = lambda z, a: jnp.tanh(w @ z + a)
    return _arrays(deqjax.fixed_point(fn, deqjax.Bracketing(upper=1.0), x, x, max_steps=32))


def _layer_certified(w, x):
    """A batch, of a layer that is the same every time but for its arrays."""
    cell = deqjax.nn.PositiveConcave(lambda z, a: jnp.tanh(w @ z + a))
    return tuple(_deq(cell).certify(x[None], x[None], batched=True))


def _layer_batch(w, x):
    cell = lambda z, a: jnp.tanh(w @ z + a)
    return _deq(cell).batch(x[None])[0]


ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "fixed_point": _fixed_point,
    "its gradient": _gradient,
    "implicit_vjp": _implicit_vjp,
    "reversible_vjp": _reversible_vjp,
    "spectral_radius": _spectral_radius,
    "jacobian_frobenius": _frobenius,
    "certify": _certify,
    "check_hypotheses": _hypotheses,
    "fixed_point_path": _path,
    "nn.DEQ": _layer,
    "nn.DEQ.batch": _layer_batch,
    "nn.DEQ.certify, batched": _layer_certified,
    "Bracketing": _certified,
    "a cell with a rule": _rule,
}

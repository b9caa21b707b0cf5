"""The memory of a gradient of the automaton, by the number of evaluations."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import deqjax

from puzzles.config import resolved
from puzzles.networks import make_model
from puzzles.options import Config
from puzzles.tasks import load
from puzzles.train import start

SIDE = 64
DEPTHS = (16, 32, 64, 128, 256)


def measure(side: int = SIDE, depths: tuple[int, ...] = DEPTHS) -> dict[str, list[float]]:
    """MiB of temporary memory of a compiled gradient: exact, with guard digits and without,
    checkpointed, and stored, which is the same recursion as a scan that JAX differentiates."""
    found: dict[str, Any] = {"evaluations": list(depths)}
    for name in ("exact", "exact, no guard", "checkpointed", "stored"):
        found[name] = [_mib(name, side, n) for n in depths]
    return found


def _mib(name: str, side: int, evaluations: int) -> float:
    adjoint: Any = "checkpointed" if name == "checkpointed" else "exact"
    guard = 0 if name == "exact, no guard" else None
    config = resolved(
        Config(task="growth", size=side, evaluations=evaluations, adjoint=adjoint, guard_bits=guard)
    )
    task = load(config)
    model = make_model(config, task, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    solve = _scanned if name == "stored" else lambda model, x: model.batch(x)[0]

    def loss(params, given, wanted):
        out = solve(eqx.combine(params, static), (given, None))
        return jnp.mean(task.loss(out, wanted))

    compiled = jax.jit(jax.grad(loss)).lower(params, *task.train).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def _scanned(model: deqjax.nn.DEQ, x: Any) -> Any:
    cell: Any = model.cell
    z0, x = start(model, x), jax.vmap(cell.inject)(x)
    f: Callable = lambda z: jax.vmap(cell)(z, x)
    step = lambda pair, _: ((pair[1], (pair[0] + f(pair[1])) / 2), None)
    (_, z), _ = jax.lax.scan(step, (z0, z0), length=model.max_steps)
    return jax.vmap(cell.readout)(z)

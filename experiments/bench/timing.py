"""Compiled programs, what they allocate, and times of them in interleaved rounds."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

Calls = dict[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


def compiled(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn` compiled for these arguments, which may be shapes only."""
    return jax.jit(fn).lower(*args).compile()


def ready(fn: Callable[..., Any], *args: Any) -> functools.partial:
    """A call without arguments of `fn`, compiled for `args`; its program is `.func`."""
    return functools.partial(compiled(fn, *args), *args)


def by_steps(fn: Callable[..., Any], *args: Any, steps: tuple[int, ...]) -> dict[int, Any]:
    """Calls of one program, whose last argument is the number of steps, for each of these."""
    program = compiled(fn, *args, jnp.asarray(steps[0]))
    return {n: functools.partial(program, *args, jnp.asarray(n)) for n in steps}


def temporary_bytes(program: Any) -> int:
    """Bytes that the program, or a call of one, allocates beside its inputs and outputs."""
    program = program.func if isinstance(program, functools.partial) else program
    return program.memory_analysis().temp_size_in_bytes


def interleaved(calls: Calls, rounds: int, repeats: dict[str, int] | None = None) -> Seconds:
    """Seconds of each call in each round, so that a slow minute of the machine falls on all."""
    seconds: Seconds = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, call in calls.items():
            each = []
            for _ in range((repeats or {}).get(name, 1)):
                start = time.perf_counter()
                jax.block_until_ready(call())
                each.append(time.perf_counter() - start)
            seconds[name].append(statistics.median(each))
    return seconds


def floors(seconds: Seconds, evaluations: int, products: int, where: str = "") -> list[float]:
    """Seconds per round that value and gradient cannot do without, at the price of the pieces.

    The evaluations of f and one more, for the linearisation at the solution; the VJPs in z; the
    last one, in the parameters. `where` is behind the names of the pieces.
    """
    pieces = [seconds[name] for name in (f"f{where}", f"VJP{where}", "last VJP")]
    parts = zip(*pieces, strict=True)
    return [(evaluations + 1) * f + products * vjp + last for f, vjp, last in parts]


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(x) for name, x in seconds.items()}


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b: what slows down one slows down the other."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))

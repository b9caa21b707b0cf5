"""Tasks in processes of their own: each core has one, and programs die with their process."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from bench.rows import Row

NOTHING: Row = dict(tried=0, held=0, unknown=0, false=0, worst=[])


def asked(about: Row, ask: Callable[[], Row], **nothing: Any) -> Row:
    """Adds what was found; a refusal in words is no certificate."""
    try:
        return about | {"refused": ""} | ask()
    except ValueError as error:
        return about | NOTHING | nothing | {"refused": str(error).split(";")[0]}
    finally:
        jax.clear_caches()  # a program holds maps of memory, of which a process has 65,530


# A compiled program holds some hundred of the 65,530 memory maps that a process may have.
_TASKS_OF_A_PROCESS = 20


def work(fn: Callable[..., Any], tasks: Sequence[tuple], workers: int) -> list[Any]:
    """`fn(*task)` of each, in order; `workers=0` in this process."""
    if workers == 0:
        return [fn(*task) for task in tasks]
    found, many = [], _TASKS_OF_A_PROCESS * workers
    # A pool for so many tasks: one that replaces its own processes may wait for ever.
    for i in range(0, len(tasks), many):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            found += pool.map(fn, *zip(*tasks[i : i + many], strict=True))
    return found

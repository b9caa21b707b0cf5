"""Tasks in processes of their own: each core has one, and programs die with their process."""

import functools
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

# A compiled program holds some hundred of the 65,530 memory maps that a process may have.
_TASKS_OF_A_PROCESS = 20


def work(fn: Callable[..., Any], tasks: Sequence[tuple], workers: int) -> list[Any]:
    """`fn(*task)` of each, in order; `workers=0` in this process."""
    if workers == 0:
        return [fn(*task) for task in tasks]
    pool = functools.partial(ProcessPoolExecutor, workers, multiprocessing.get_context("spawn"))
    with pool(max_tasks_per_child=_TASKS_OF_A_PROCESS) as processes:
        return [f.result() for f in [processes.submit(fn, *task) for task in tasks]]

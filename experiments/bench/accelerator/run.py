"""The record of one section of `accelerator.py`: its cases, its programs, its times."""

import dataclasses
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from bench.accelerator.report import RED, begun, read, write

Size = Literal["smoke", "reduced", "full"]
# A function and its inputs, which are arrays: what is compiled here, and exported by the tests.
Program = tuple[Callable[..., Any], tuple[Any, ...]]

_WORKERS = 8  # programs that are compiled at once, where there are as many cores


def size_of(smoke: bool) -> Size:
    """The sizes for this machine."""
    if smoke:
        return "smoke"
    return "reduced" if jax.default_backend() == "cpu" else "full"


@dataclasses.dataclass(frozen=True)
class Run:
    """Writes each result at once; starts no case after `until`."""

    out: Path
    section: str
    size: Size
    seed: int = 0
    until: float = math.inf
    text: Path | None = None

    @property
    def path(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    @property
    def left(self) -> float:
        """Seconds until then."""
        return self.until - time.time()

    def pick(self, smoke: Any, reduced: Any, full: Any) -> Any:
        """Picks one of three, by the size of this run."""
        return {"smoke": smoke, "reduced": reduced, "full": full}[self.size]

    def write(self, **line: Any) -> None:
        write(self.path, {"section": self.section, "at": round(time.time(), 2), **line})

    def add(
        self,
        case: str,
        value: str,
        *,
        limit: str = "",
        ok: bool | None = None,
        note: str = "",
        **numbers: Any,
    ) -> None:
        """Adds a row to the table; with `ok=None` nothing is asked of it."""
        verdict = note or {None: "", True: "ok", False: RED}[ok]
        self.write(case=case, value=value, limit=limit, verdict=verdict, **numbers)
        print(f"{self.section}: {case}: {value} {limit} {verdict}".rstrip(), flush=True)

    def known(self, name: str) -> dict[str, Any]:
        """All that the sections left under this name so far."""
        found = [line.get(name, {}) for line in read(self.path)]
        return {name: value for each in found for name, value in each.items()}

    def cases(self, cases: dict[str, Callable[[], None]]) -> None:
        """Runs them in order while there is time; one that fails is a red row, and loses nothing.

        Those that an earlier process began are left out: it may have died of them.
        """
        before = begun(read(self.path), self.section)
        self.write(plan=list(cases))
        for name, case in cases.items():
            if self.left <= 0:
                return
            if name in before:
                continue
            self.write(start=name)
            try:
                case()
            except Exception as error:
                traceback.print_exc()
                text = "".join(traceback.format_exception_only(error)).strip()
                self.add(name, text.splitlines()[0][:300], ok=False)
            self.write(done=name)


class Compiled(NamedTuple):
    """A program, with the inputs that it was made for and the bytes that it allocates."""

    program: Callable[..., Any]
    inputs: tuple[Any, ...]
    bytes: int | None  # None: the platform does not tell

    def call(self) -> Any:
        return self.program(*self.inputs)


def compiled(programs: dict[Any, Program]) -> dict[Any, Compiled | Exception]:
    """Compiles all of them, several at once: a short run spends its time on compilation.

    In the place of one that cannot be compiled, or has no room on the device, is the exception.
    """
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)

    def compile(lowered: Any, inputs: tuple[Any, ...]) -> Compiled:
        program = lowered.compile()
        analysis = program.memory_analysis()
        size = analysis.temp_size_in_bytes if analysis else None
        if size is not None and size > limit:
            raise MemoryError(f"does not fit: {size / 2**30:.1f} GiB of temporary memory")
        return Compiled(program, inputs, size)

    found: dict[Any, Any] = {}
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        for name, (fn, inputs) in programs.items():
            try:
                found[name] = pool.submit(compile, jax.jit(fn).lower(*inputs), inputs)
            except Exception as error:
                found[name] = error
        for name, task in found.items():
            if not isinstance(task, Exception):
                found[name] = task.exception() or task.result()
    return found


def good(found: Compiled | Exception) -> Compiled:
    if isinstance(found, Exception):
        raise found
    return found


def seconds(calls: dict[Any, Callable[[], Any]], rounds: int, limit: float) -> dict[Any, float]:
    """Medians over interleaved rounds, after one that warms up; over fewer where these take longer
    than `limit` seconds."""
    for call in calls.values():
        jax.block_until_ready(call())
    taken: dict[Any, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + limit
    for i in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken[name].append(time.perf_counter() - start)
        if i and time.perf_counter() > end:
            break
    return {name: statistics.median(each) for name, each in taken.items()}


def milliseconds(s: float) -> str:
    return f"{s * 1e3:.3g} ms"


def mebibytes(n: float | None) -> str:
    return "unknown MiB" if n is None else f"{n / 2**20:.4g} MiB"

"""Speed and memory of the paper's models, forwards and backwards.

Shown: tokens or images a second of value and gradient; their ratio to the floor, the evaluations
of the block and their VJPs that the gradient cannot do without; memory that does not grow with
depth. The language block and the multi-scale blocks of the reversible DEQ paper, exact and float
state, against checkpointed autodiff and an explicit model of as many distinct blocks.

    python experiments/throughput.py                           # reduced on a CPU, full on a GPU
    python experiments/throughput.py --sections language --batches 4
    python experiments/throughput.py --smoke                   # the same, tiny

Writes results.json (all numbers), table.md and throughput.png into runs/throughput/, over those of
an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared AMD EPYC, JAX 0.10.2, seed 0; 11 minutes, most of them compilation.
On a GPU: not measured. As printed (all of it: results/throughput.md):

    language: exact state, time / floor, worst of 2 batches                   1.04
    language: exact state, time / that of the float state, worst              1.01
    language: exact state, temporary bytes at 32 / at 4                       1.12
    multiscale: exact state, time / floor, worst of 2 batches                 0.85
    multiscale: exact state, time / that of the float state, worst            1.06
    multiscale: exact state, temporary bytes at 32 / at 4                     1.31
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from bench.options import Measurement
from bench.ways import EXTRA, DType, Variant
from training.flags import Count, read

Section = Literal["language", "multiscale"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Measures throughput and memory of value and gradient."""

    sections: tuple[Section, ...] = get_args(Section)
    """Blocks to measure."""
    full: bool | None = None
    """Takes the paper's sizes; None: on anything but a CPU."""
    batches: tuple[Count, ...] | None = None
    """Batch sizes, the first one being that of all depths; None: 4 and 16, or the paper's."""
    variants: tuple[Variant, ...] = tuple(EXTRA)
    """Ways of taking the gradient; exact is always one of them."""
    dtypes: tuple[DType, ...] = get_args(DType)
    """Dtypes of products; on a CPU bfloat16, which is emulated, at one size only."""
    evaluations: Count = 8
    """Evaluations of the block, the paper's number."""
    depths: tuple[Count, ...] = (4, 8, 16, 32)
    """Evaluations between which memory and time are compared."""
    unrolled: Count = 8
    """The deepest explicit model: compiling one takes as long as it is deep."""
    rounds: Count = 5
    """Interleaved rounds of timing; the median is reported."""


SMOKE = dict(full=False, batches=(1,), variants=("exact",), dtypes=("float32",))
SMOKE |= dict(evaluations=2, depths=(2, 4), rounds=1)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

import math
import os
import platform

import jax

from bench.gradients import ADJOINTS
from bench.record import Parts, record
from bench.throughput.blocks import Images, Language
from bench.throughput.plot import plot_depths
from bench.throughput.report import claims, tables
from bench.throughput.time import Case, block_rows, device_memory, load, model_rows

SIZES: dict[tuple[str, str], Language | Images] = {
    ("language", "full"): Language(768, 12, (3072, 3072), 448, 50_304),
    ("language", "reduced"): Language(192, 3, (768, 768), 64, 2048),
    ("language", "smoke"): Language(16, 2, (16,), 4, 32),
    ("multiscale", "full"): Images((128, 256, 256, 128), (1, 3, 3, 1), 32),
    ("multiscale", "reduced"): Images((32, 64, 64, 32), (1, 3, 3, 1), 32),
    ("multiscale", "smoke"): Images((8,), (1,), 4),
}
BATCHES = {"language": (32, 8), "multiscale": (64, 256)}  # of the full sizes, the paper's first


def measure(section: Section, config: Config) -> Parts:
    cpu = jax.default_backend() == "cpu"
    full = not cpu if config.full is None else config.full
    size = SIZES[section, "smoke" if config.smoke else "full" if full else "reduced"]
    first, *more = config.batches or (BATCHES[section] if full else (4, 16))
    n, options = config.evaluations, {"rounds": config.rounds, "key": jax.random.key(config.seed)}
    loads = [load()]
    blocks, models = [], []
    for dtype in config.dtypes:
        once = cases(config, (n,))
        if dtype == "bfloat16" and cpu:
            once = [case for case in once if case[0] in ("exact", "isolated", "float")]
            blocks += block_rows(size, first, dtype, once, looped=False, **options)
        else:
            every = cases(config, tuple(sorted({*config.depths, n})))
            blocks += block_rows(size, first, dtype, every, looped=True, **options)
            solves = [case for case in once if case[0] in ADJOINTS]
            for batch in more:
                blocks += block_rows(size, batch, dtype, solves, looped=False, **options)
        whole = [case for case in once if "," not in case[0] or not cpu]
        models += model_rows(size, first, dtype, whole, **options)
    for row in (*blocks, *models):
        row["units"] = size.units(row["batch"])
    found = {
        "size": str(size),
        "unit": size.unit,
        "platform": jax.default_backend(),
        "evaluations": n,
        "load": [*loads, load()],
        "device peak bytes": device_memory(),
        "blocks": blocks,
        "models": models,
    }
    return Parts({section: found, "machine": machine()})


def cases(config: Config, depths: tuple[int, ...]) -> list[Case]:
    """The cases that are measured at these numbers of evaluations.

    The float state is at one of them, since it costs as much at any; explicit models, which take
    as long to compile as they are deep, are not at the largest.
    """
    most = {"exact": math.inf, "checkpointed": math.inf, "explicit": config.unrolled}
    asked = lambda variant, n: n == config.evaluations or n <= most.get(variant, 0)
    variants = dict.fromkeys(("exact", *config.variants))
    return [(variant, n) for variant in variants for n in depths if asked(variant, n)]


def machine() -> str:
    """The line above the tables."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    said = f"{os.cpu_count()} cores, {name}, JAX {jax.__version__}. On a GPU: "
    kind = jax.devices()[0].device_kind
    return said + ("not measured." if jax.default_backend() == "cpu" else f"{kind}.")


MEASURES: dict[Section, Callable[[Config], Any]] = {
    "language": lambda c: measure("language", c),
    "multiscale": lambda c: measure("multiscale", c),
}


def main(config: Config) -> None:
    if "float32" not in config.dtypes and not config.smoke:
        raise SystemExit(
            f"Expected float32 among --dtypes, whose floor is what must hold; got {config.dtypes}. "
            "Add it."
        )
    out, results = record("throughput", config, SMOKE, MEASURES, claims, tables)
    plot_depths(results, out / "throughput.png")


if __name__ == "__main__":
    main(read(Config))

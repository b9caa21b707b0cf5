"""How right a gradient by reversal is, and what it costs, beside the other ways of taking one.

Shown: the integer state of `deqjax.Reversible` runs backwards without an error at any depth, where
a floating point state is lost after some tens of evaluations, in float64 too; at what price in
memory and in time. Blocks: a perceptron, convolutions with group norm, causal attention, each
normalised by `x / jnp.sqrt(v)`, which XLA does not round alike in two programs.

    python experiments/gradient_fidelity.py                     # everything
    python experiments/gradient_fidelity.py --sections errors --dtypes float32
    python experiments/gradient_fidelity.py --smoke             # the same, tiny

Writes results.json (all numbers), table.md and error.png into runs/gradient_fidelity/, over those
of an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2, seed 0; 19 minutes. As
printed (all of it: results/gradient_fidelity.md):

    exact: reversal residual, worst of 120 solves                             0
    exact: gradient error / that of float32 checkpointed autodiff, worst      2.51
    exact: bytes kept per state element beyond 8 + whole words of digits      0
    float: temporary memory at 512 evaluations / at 8 - 1, worst block        0
    exact: time per evaluation / (floor + one f)                              0.78
    float: time per evaluation / floor                                        0.80
    jax.vmap / batched=True, exact: seconds, bytes                            1.09, 1.00
"""

# ruff: noqa: E402
import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from bench.ways import TITLES, Method
from training.flags import Count, Inverse, Range, Seed, read

Section = Literal["errors", "memory", "time", "vmap"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure gradients: their error, memory and time."""

    sections: tuple[Section, ...] = ("errors", "memory", "time", "vmap")
    """What to measure; residuals kept go with memory."""
    cells: tuple[Literal["MLP", "convolution", "attention"], ...] = (
        "MLP",
        "convolution",
        "attention",
    )
    """The blocks of errors and memory."""
    depths: tuple[Count, ...] = (4, 16, 64, 256, 1024)
    """Evaluations of the block, two of them being one step of the paper's."""
    inverses: tuple[Inverse, ...] = (2, 5, 10, -5)
    """The d of 1 - beta = 1/d."""
    costed: tuple[Method, ...] = tuple(TITLES)
    """Whose memory and time are measured; of the errors, all are."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of state, parameters and computation."""
    memory_depths: tuple[Count, Count] = (8, 512)
    """Evaluations between which memory is compared."""
    d: Inverse = 5
    """1 - beta = 1/d where only one is measured: memory, time and vmap. The paper's is 5."""
    evaluations: Annotated[int, Range(2, 2**30, multiple=2)] = 16
    """Of the block whose time is measured, and of the solves under vmap; even."""
    rounds: Count = 9
    """Of time measurements, interleaved; the median is reported."""
    seed: Seed = 0
    """Of parameters, input, initial iterate and cotangent."""
    out: Path | None = None
    """The folder of the results; None: runs/gradient_fidelity, smoke runs beside it."""
    smoke: bool = False
    """Tiny blocks, few depths: everything is run through, nothing is shown by it."""


# These are forced: a smoke run is quick whatever else is asked for.
SMOKE: dict[str, Any] = {
    "cells": ("MLP",),
    "depths": (4, 16),
    "inverses": (5,),
    "costed": ("exact", "float"),
    "dtypes": ("float32",),
    "memory_depths": (8, 32),
    "evaluations": 4,
    "rounds": 2,
}

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

import math

import jax

from bench.blocks import Cell, make_attention, make_conv, make_mlp, make_tanh
from bench.fidelity.errors import errors
from bench.fidelity.memory import memory, residuals
from bench.fidelity.plot import plot_errors
from bench.fidelity.report import (
    claims,
    error_table,
    fraction,
    memory_table,
    residual_table,
    summary_table,
    time_table,
    vmap_table,
)
from bench.fidelity.time import timing, vmapped
from bench.record import record
from bench.report import claims_table, pick


def small_cells(config: Config) -> list[Cell]:
    """Blocks for the errors: compiling them is what takes the time, whatever their size."""
    key = jax.random.key(config.seed)
    if config.smoke:
        return [make_mlp(4, 16, key)]
    made = (
        make_mlp(8, 64, key),
        make_conv(4, 8, 8, key),
        make_attention(2, 16, 32, 2, key),
    )
    return [cell for cell in made if cell.name in config.cells]


def large_cells(config: Config) -> list[Cell]:
    """Blocks for the memory, whose size makes that of counters and constants negligible."""
    key = jax.random.key(config.seed)
    if config.smoke:
        return [make_mlp(32, 32, key)]
    made = (make_mlp(128, 512, key), make_conv(16, 16, 32, key), benchmark_cell(config))
    return [cell for cell in made if cell.name in config.cells]


HEADS = 8


def benchmark_cell(config: Config) -> Cell:
    batch, length, width = (2, 16, 32) if config.smoke else (8, 128, 256)
    return make_attention(batch, length, width, HEADS, jax.random.key(config.seed))


def measure(section: Section, config: Config) -> dict[str, Any]:
    n, rounds, d, key = config.evaluations, config.rounds, config.d, jax.random.key(config.seed)
    match section:
        case "errors":
            cells = small_cells(config)
            return {"errors": errors(cells, config.inverses, config.dtypes, config.depths)}
        case "memory":
            cells, (few, many) = large_cells(config), config.memory_depths
            kept = residuals(cells, config.inverses, (few, math.isqrt(few * many), many))
            return {"memory": memory(cells, (few, many), d, config.costed), "residuals": kept}
        case "time":
            return {"time": timing(benchmark_cell(config), HEADS, d, n, rounds, config.costed)}
        case "vmap":
            cell = make_tanh(*((4, 16) if config.smoke else (32, 1024)), key)
            return {"vmap": vmapped(cell, d, n, rounds, ("float", "exact"))}


def tables(results: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    parts = [claims_table(results["claims"])]
    if {"errors", "memory", "time"} <= results.keys():
        parts += ["## In short", summary_table(results)]
    rows = results.get("errors", [])
    for dtype, d in dict.fromkeys((row["dtype"], row["d"]) for row in rows):
        title = f"## {dtype}, 1 - beta = {fraction(d)}, worst block"
        parts += [title, error_table(pick(rows, dtype=dtype, d=d))]
    for name, table in TABLES.items():
        if name in results:
            parts += [f"## {name.capitalize()}", table(results[name])]
    return "\n\n".join([*parts, NOTE]) + "\n"


TABLES = {
    "memory": memory_table,
    "residuals": residual_table,
    "time": time_table,
    "vmap": vmap_table,
}
NOTE = (
    "Error: relative, over parameters and input together, against float64 autodiff of the same "
    "steps.\n\\* Gradients of the fixed point and not of the steps, against the same reference: "
    "they differ by design.\nReversal residual: the largest difference of a state that is known, "
    "exact: as such, float: relative.\nFloor: one f, and one f with its VJP, each compiled alone."
)


def main(config: Config) -> None:
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long
    out, results = record("gradient_fidelity", config, measure, claims, tables)
    if "errors" in results:
        plot_errors(results["errors"], results["errors"][0]["dtype"], out / "error.png")


if __name__ == "__main__":
    main(read(Config))

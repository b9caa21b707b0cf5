"""Error and cost of a gradient by reversal, beside the other ways of taking one.

Shown: the integer state of `deqjax.Reversible` runs backwards without an error at any depth, also
with a relaxation per channel and with an f that is rounded differently at every evaluation, where
a floating point state is lost after some tens of evaluations, in float64 too; at what price in
memory and in time. Blocks: a perceptron, convolutions with group norm, causal attention, each
normalised by `x / jnp.sqrt(v)`, which XLA does not round alike in two programs.

    python experiments/gradient_fidelity.py                     # everything
    python experiments/gradient_fidelity.py --sections errors --dtypes float32
    python experiments/gradient_fidelity.py --smoke             # the same, tiny

Writes results.json (all numbers), table.md and error.png into runs/gradient_fidelity/, over those
of an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2, seed 0; 14 minutes. As
printed (all of it: results/gradient_fidelity.md):

    exact: reversal residual, worst of 150 solves                             0
    exact: share of the guard used in float32, worst                          0.156
    exact: gradient error / that of float32 checkpointed autodiff, worst      2.84
    exact: bytes kept per state element beyond 8 + whole words of digits      0
    float: temporary memory at 512 evaluations / at 8 - 1, worst block        0
    exact: time / that of the float state                                     0.99
    isolated: time per evaluation / (floor + one f)                           0.85
    float: time per evaluation / floor                                        0.83
    jax.vmap / batched=True, exact: seconds, bytes                            0.99, 1.00
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from bench.options import Measurement
from bench.ways import TITLES, DType, Method
from training.flags import Count, Inverse, Range, read

Section = Literal["errors", "rounded", "memory", "time", "vmap"]
Block = Literal["MLP", "convolution", "attention"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Measures gradients: their error, memory and time."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the measurement; residuals kept go with memory."""
    cells: tuple[Block, ...] = get_args(Block)
    """The blocks of errors and memory."""
    depths: tuple[Count, ...] = (4, 16, 64, 256, 1024)
    """Evaluations of the block, two of them being one step of the paper's."""
    inverses: tuple[Inverse, ...] = (2, 5, 10, -5)
    """The d of 1 - beta = 1/d."""
    channels: bool = True
    """Also a 1 - beta per channel, from 1/64 to 63/64."""
    costed: tuple[Method, ...] = tuple(TITLES)
    """Methods whose memory and time are measured; errors are measured of all."""
    dtypes: tuple[DType, ...] = get_args(DType)
    """Dtypes of state, parameters and computation."""
    memory_depths: tuple[Count, Count] = (8, 512)
    """Evaluations between which memory is compared."""
    d: Inverse = 5
    """1 - beta = 1/d where only one is measured: memory, time and vmap. The paper's is 5."""
    evaluations: Annotated[int, Range(2, 2**30, multiple=2)] = 16
    """Evaluations of the block whose time is measured, and of the solves under vmap; even."""
    rounds: Count = 9
    """Interleaved rounds of timing; the median is reported."""


SMOKE = dict(cells=("MLP",), depths=(4, 16), inverses=(5,), costed=("exact", "isolated", "float"))
SMOKE |= dict(dtypes=("float32",), memory_depths=(8, 32), evaluations=4, rounds=2)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

import math

import jax

from bench.blocks import Cell, make_attention, make_conv, make_mlp, make_tanh
from bench.fidelity.errors import errors
from bench.fidelity.memory import memory, residuals
from bench.fidelity.plot import plot_errors
from bench.fidelity.report import claims, tables
from bench.fidelity.rounded import rounded
from bench.fidelity.time import timing, vmapped
from bench.record import Parts, record

HEADS = 8


def chosen(config: Config, *cells: Cell) -> list[Cell]:
    return [cell for cell in cells if cell.name in config.cells]


def small_cells(config: Config) -> list[Cell]:
    """Blocks for the errors: compiling them is what takes the time, whatever their size."""
    key = jax.random.key(config.seed)
    if config.smoke:
        return [make_mlp(4, 16, key)]
    attention = make_attention(2, 16, 32, 2, key)
    return chosen(config, make_mlp(8, 64, key), make_conv(4, 8, 8, key), attention)


def large_cells(config: Config) -> list[Cell]:
    """Blocks for the memory, whose size makes that of counters and constants negligible."""
    key = jax.random.key(config.seed)
    if config.smoke:
        return [make_mlp(32, 32, key)]
    attention = benchmark_cell(config)
    return chosen(config, make_mlp(128, 512, key), make_conv(16, 16, 32, key), attention)


def benchmark_cell(config: Config) -> Cell:
    batch, length, width = (2, 16, 32) if config.smoke else (8, 128, 256)
    return make_attention(batch, length, width, HEADS, jax.random.key(config.seed))


def kept(config: Config) -> Parts:
    cells, (few, many) = large_cells(config), config.memory_depths
    counted = residuals(cells, config.inverses, (few, math.isqrt(few * many), many))
    return Parts(memory=memory(cells, (few, many), config.d, config.costed), residuals=counted)


def mapped(config: Config) -> Any:
    size = (4, 16) if config.smoke else (32, 1024)
    cell = make_tanh(*size, jax.random.key(config.seed))
    return vmapped(
        cell, config.d, config.evaluations, config.rounds, ("float", "exact", "isolated")
    )


MEASURES: dict[Section, Callable[[Config], Any]] = {
    "errors": lambda c: errors(small_cells(c), c.inverses, c.dtypes, c.depths, channels=c.channels),
    "rounded": lambda c: rounded(c.depths, c.d, c.seed),
    "memory": kept,
    "time": lambda c: timing(benchmark_cell(c), HEADS, c.d, c.evaluations, c.rounds, c.costed),
    "vmap": mapped,
}


def main(config: Config) -> None:
    out, results = record("gradient_fidelity", config, SMOKE, MEASURES, claims, tables)
    if "errors" in results:
        plot_errors(results["errors"], results["errors"][0]["dtype"], out / "error.png")


if __name__ == "__main__":
    main(read(Config))

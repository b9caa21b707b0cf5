"""Solvers beside each other, and beside jaxopt's: evaluations of f, time, and what a step costs.

Shown: how many evaluations each solver needs on problems of known difficulty; that each example of
a batch stops by itself; that a step of the secant methods costs what its history takes to move, and
that a solve with its gradient costs its evaluations and VJPs. jaxopt's `FixedPointIteration` and
`AndersonAcceleration` run in the same rounds, with their defaults but for tolerance and ceiling,
if it is installed: `pip install -e '.[bench]'`.

    python experiments/compare_solvers.py                       # everything
    python experiments/compare_solvers.py --sections overhead floor
    python experiments/compare_solvers.py --smoke               # the same, tiny

Writes results.json (all numbers), table.md and residuals.png into runs/compare_solvers/, over those
of an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2, jaxopt 0.8.5, seed 0;
11 minutes. As printed (all of it: results/compare_solvers.md); what does not hold is marked so:

    evaluations on tanh, rho(J) 0.996: Anderson, Broyden                      26, 20
    evaluations - max(1.2 Picard, Picard + 2), worst of 19: both              -4
    evaluations, Anderson / jaxopt's, worst of 17                             0.47
    seconds, Picard / jaxopt's, Anderson / jaxopt's, worst of 17 (f of 2 us)  1.27, 1.65
    dense tanh, value and gradient: time / floor, batched                     0.90, 0.96
    attention, solve and gradient: Picard / jaxopt's, Anderson / jaxopt's     0.24, 0.19
    time beyond f / time its history takes to move: Anderson; Broyden         3.5-3.6; 1.8

The last line moves with the minute, and with what else uses the memory: a run before, when a step
had the same code but for its bound, printed 1.15-1.35 and 1.4-1.5.
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from bench.options import Measurement
from training.flags import Count, Tolerance, read

Section = Literal["evaluations", "overhead", "floor", "blocks"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Compares solvers: evaluations, time, and what they cost beside f."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the comparison; the mixed batch goes with evaluations."""
    tol: Tolerance = 1e-8
    """Relative residual of section evaluations, in float64."""
    ceiling: Count = 30_000
    """Most evaluations there: Picard at rho 0.999 needs 11,507, its damped form twice that."""
    scale: Count = 8
    """Unknowns there, in units of 8 to 80: f then costs more than the bookkeeping of any loop."""
    history: Count = 300
    """Evaluations whose residuals are drawn."""
    easy: Count = 31
    """Easy examples of the mixed batch, beside a hard one."""
    size: Count = 1_000_000
    """Entries of the state in section overhead, float32."""
    steps: Count = 40
    """Steps there, with a full window."""
    width: Count = 512
    """Width of the dense tanh map in section floor."""
    batch: Count = 64
    """Examples there."""
    gradient_tol: Tolerance = 1e-5
    """Relative residual of the solves whose gradients are taken, in float32."""
    rounds: Count = 9
    """Interleaved rounds of timing; medians of ratios of the same round are reported."""


SMOKE = dict(ceiling=5000, scale=1, history=100, easy=3, size=1000, steps=4, width=16)
SMOKE |= dict(batch=4, rounds=2)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

import jax
import jax.numpy as jnp

from bench.compare.evaluations import evaluations, mixed_batch
from bench.compare.methods import as_problem, attention_block, convolution_block, inject
from bench.compare.plot import plot_residuals
from bench.compare.report import claims, tables
from bench.compare.time import blocks, floor, overhead
from bench.problems import Problem, linear, slow_tanh, suite
from bench.record import Parts, record


def problems(config: Config) -> list[Problem]:
    """Problems in float64."""
    if config.smoke:
        return [p.astype(jnp.float64) for p in (linear(0.5, n=4), slow_tanh())]
    cells = attention_block(2, 16, 32, 2, config.seed), convolution_block(2, 8, 8, config.seed)
    wide = [as_problem(cell.astype(jnp.float64)) for cell in cells]
    return [*(p.astype(jnp.float64) for p in suite(config.scale)), *wide]


def counted(c: Config) -> Parts:
    with jax.enable_x64(True):
        rows = evaluations(problems(c), c.tol, c.ceiling, c.history, c.rounds)
        return Parts(evaluations=rows, mixed=mixed_batch(c.easy, c.tol, c.ceiling, c.seed))


def whole(c: Config) -> list[dict[str, Any]]:
    if c.smoke:
        return blocks([attention_block(1, 4, 8, 2, c.seed)], 1e-4, c.rounds)
    attention = attention_block(8, 64, 128, 4, c.seed)
    cells = [attention, inject(attention, 3.0), convolution_block(8, 16, 16, c.seed)]
    return blocks(cells, c.gradient_tol, c.rounds)


MEASURES: dict[Section, Callable[[Config], Any]] = {
    "evaluations": counted,
    "overhead": lambda c: overhead(c.size, c.steps, c.rounds),
    "floor": lambda c: floor(c.width, c.batch, c.gradient_tol, c.rounds, c.seed),
    "blocks": whole,
}


def main(config: Config) -> None:
    out, results = record("compare_solvers", config, SMOKE, MEASURES, claims, tables)
    if "evaluations" in results:
        tol = results["runs"]["evaluations"]["config"]["tol"]
        plot_residuals(results["evaluations"], tol, out / "residuals.png")


if __name__ == "__main__":
    main(read(Config))

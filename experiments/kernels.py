"""The layers' own matrix products and convolutions on a CPU, beside the stock ones.

Shown: the convolution by minimal filtering, value and both cotangents in a loop, over the stock
rules; reversal of an attention block with products of two matrices, over a loop written by hand;
value and gradient of a positive concave convolution, over PyTorch, if that is installed; what a
step of Anderson's method costs in evaluations of that cell.

    python experiments/kernels.py                              # everything, on two cores
    python experiments/kernels.py --sections convolution
    python experiments/kernels.py --smoke                      # the same, tiny

Writes results.json (all numbers) and table.md into runs/kernels/, over those of an earlier run; a
section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU, JAX 0.10.2, PyTorch 2.14, seed 0; 4 minutes. As printed
(all of it: results/kernels.md):

    convolution by minimal filtering: value, with cotangents, worst / the sums'   0.74, 0.74
    attention: float, exact, time / that of a loop by hand                        0.78, 0.94
    concave convolution: value and gradient, time / PyTorch's, best               0.77
    a step of Anderson, batched, one problem, in evaluations (1.3 asked for)      1.75, 2.74
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from bench.options import Measurement
from training.flags import Count, read

Section = Literal["convolution", "attention", "concave"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Measures the kernels."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the measurement."""
    rounds: Count = 7
    """Interleaved rounds; every ratio is the median of theirs."""
    loop: Count = 8
    """Evaluations in a loop."""


if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

import jax

from bench.kernels.attention import attention
from bench.kernels.concave import concave
from bench.kernels.convolution import convolution
from bench.kernels.report import claims, tables
from bench.record import record


def by(measure: Callable[..., Any]) -> Callable[[Config], Any]:
    return lambda c: measure(jax.random.key(c.seed), rounds=c.rounds, loop=c.loop, smoke=c.smoke)


SMOKE = dict(rounds=2, loop=2)
MEASURES: dict[Section, Callable[[Config], Any]] = {
    "convolution": by(convolution),
    "attention": by(attention),
    "concave": by(concave),
}


def main(config: Config) -> None:
    record("kernels", config, SMOKE, MEASURES, claims, tables, optimised=True)


if __name__ == "__main__":
    main(read(Config))

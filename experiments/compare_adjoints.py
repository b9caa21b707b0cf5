"""Every gradient of a fixed point beside the exact one: its error, memory and time.

Shown: which gradient when. On `z = A z + b` with rho(A) up to 0.999, on an attention block and on a
convolution block: how far each adjoint is from the exact implicit gradient (float64), what it keeps
and how long it takes; that the default backward pass keeps a fixed number of copies of z, and is
right or NaN, never a wrong number. jaxopt's implicit_diff has a row if it is installed.

    python experiments/compare_adjoints.py                     # everything
    python experiments/compare_adjoints.py --sections guarantee memory
    python experiments/compare_adjoints.py --smoke             # the same, tiny

Writes results.json (all numbers), table.md and gradients.png into runs/compare_adjoints/, over
those of an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU, JAX 0.10.2, jaxopt 0.8.5, seed 0; 2 minutes. As printed
(all of it: results/compare_adjoints.md):

    implicit backward at state size 32,768: temporary MiB                     6.00
    bytes at twice the size / at the size                                     2.00
    default gradient: error / (10 tol / (1 - rho)), rho 0.5, 0.9, 0.99, 0.999 0.06, 0.06, 0.07, 0.01
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from bench.options import Measurement
from training.flags import Count, Range, read

Section = Literal["guarantee", "memory", "adjoints"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Compares gradients: error, memory and time."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the comparison."""
    rhos: tuple[Annotated[float, Range(0, 1, but=(1,))], ...] = (0.5, 0.9, 0.99, 0.999)
    """Spectral radii of the linear family."""
    n: Count = 64
    """Unknowns of the linear family; the exact gradient is dense."""
    size: Annotated[int, Range(2, 2**30)] = 32_768
    """Size of the state whose backward pass's memory is measured; and half and twice of it."""
    steps: Count = 256
    """Evaluations of the adjoints that differentiate steps."""
    rounds: Count = 5
    """Interleaved rounds of timing; the median is reported."""


SMOKE = dict(rhos=(0.5, 0.9), n=6, size=512, steps=8, rounds=1)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

from bench.compare.adjoints import backward_memory, block_cases, compare, guarantee, linear_cases
from bench.compare.methods import attention_block, convolution_block
from bench.compare.plot import plot_gradients
from bench.compare.which import claims, tables
from bench.record import record
from bench.rows import Row, pick


def adjoints(c: Config) -> list[Row]:
    blocks = attention_block(2, 32, 64, 2, c.seed), convolution_block(2, 16, 8, c.seed)
    cases = [*linear_cases(c.rhos, c.n), *block_cases(() if c.smoke else blocks)]
    return compare(cases, c.steps, c.rounds)


MEASURES: dict[Section, Callable[[Config], Any]] = {
    "guarantee": lambda c: guarantee(c.rhos, c.n),
    "memory": lambda c: backward_memory((c.size // 2, c.size, 2 * c.size)),
    "adjoints": adjoints,
}


def main(config: Config) -> None:
    out, results = record("compare_adjoints", config, SMOKE, MEASURES, claims, tables)
    if "adjoints" in results:
        plot_gradients(pick(results["adjoints"], problem="linear"), out / "gradients.png")


if __name__ == "__main__":
    main(read(Config))

"""A search for wrong numbers: certificates, gradients and what eager calls leave behind.

Shown: how many of some ten thousand random bounds of maps that are not this library's are false,
with arrays of both signs in f too; how many cells are outside their enclosures; how many gradients
are lost in random programs of exact reversal; how many finite implicit gradients are further off
than ten times what is estimated; what 2,000 eager calls of each entry point leave of programs. The
references are in long double between two points that prove them, or in loops of their own in
float64: nothing is judged by the library itself.

    python experiments/soundness.py                            # everything, in two processes
    python experiments/soundness.py --sections reversal programs
    python experiments/soundness.py --smoke                    # the same in seconds, tiny

Writes results.json (all numbers) and table.md into runs/soundness/, over those of an earlier run; a
section that isn't asked for is kept from there. Each counterexample is written with the seed that
draws it again. All options: --help. Ends with status 1 if anything is false or lost.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2, seed 0; 21 minutes of
CPU time. As printed (all of it: results/soundness.md):

    certify, arrays of at least 0: false of 5,040, of which 5,027 held        0
    certify, arrays of both signs: false of 7,440, of which 0 held            0
    certified solvers: false of 4,160, of which 1,566 held                    0
    normalised cells outside the enclosure, of 504, of which 504 held         0
    other cells outside the enclosure, of 320, of which 320 held              0
    gradients lost in 300 programs of exact reversal                          0
    finite implicit gradients off by over 10 times the estimate, of 204       0
    compilations for new lambdas of the same body, 14 entry points            0
    CPU ms of an eager solve of 64 units with a new lambda                    3.63
"""

# ruff: noqa: E402
import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal, get_args

from bench.options import Measurement
from training.flags import Count, Positive, Whole, read

Section = Literal["certificates", "layers", "reversal", "implicit", "programs"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Looks for false bounds, lost gradients and programs that stay."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the search."""
    certificates: Count = 120
    """Certificates per family and dtype: 54 families, two dtypes."""
    solves: Count = 40
    """Certified solves of each, by each of two solvers."""
    normalised: Count = 504
    """Cells that divide by their largest entry."""
    others: Count = 40
    """Cells of each other kind with a theorem of its own."""
    programs: Count = 300
    """Programs of exact reversal."""
    jacobians: Count = 204
    """J whose implicit gradient is taken, of six kinds."""
    calls: Count = 2_000
    """Eager calls per entry point."""
    seconds: Positive = 60.0
    """Seconds after which the calls of an entry point end."""
    some: Count | None = None
    """Number of families, cells and kinds that are tried, in float32 alone; None: all, in both."""
    workers: Whole = 2
    """Processes; 0: this one does it all."""


SMOKE = dict(certificates=8, solves=4, normalised=8, others=4, programs=6)
SMOKE |= dict(jacobians=12, calls=3, some=2, workers=0)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

# For programs on two devices; where it is set already there may be more of them.
if "device_count" not in os.environ.get("XLA_FLAGS", ""):
    devices = "--xla_force_host_platform_device_count=2"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"

from bench.record import record
from bench.soundness.certificates import certificates
from bench.soundness.implicit import implicit
from bench.soundness.layers import layers
from bench.soundness.programs import programs
from bench.soundness.report import claims, tables
from bench.soundness.reversal import reversal

MEASURES: dict[Section, Callable[[Config], Any]] = {
    "certificates": lambda c: certificates(c.certificates, c.solves, c.some, c.seed, c.workers),
    "layers": lambda c: layers(c.normalised, c.others, c.some, c.seed, c.workers),
    "reversal": lambda c: reversal(c.programs, c.some, c.seed, c.workers),
    "implicit": lambda c: implicit(c.jacobians, c.seed, c.workers),
    "programs": lambda c: programs(c.calls, c.seconds, c.seed, c.workers),
}


def main(config: Config) -> None:
    _, results = record("soundness", config, SMOKE, MEASURES, claims, tables)
    failed = [line["claim"] for line in results["claims"] if line["holds"] is False]
    if failed and not config.smoke:
        raise SystemExit(f"{len(failed)} claims do not hold, the first: {failed[0]}.")


if __name__ == "__main__":
    main(read(Config))

"""Certificates and certified solvers: whether what they prove is true, how tight, how expensive.

Shown: certified against true error of positive concave cells, dense and convolutional, from easy to
nearly critical; hard problems to a certified tolerance; violations of every bound over random
problems, against solutions in long double; what refuses maps without the theorem; the time of a
certificate and of a convolutional cell's gradient; that batch-mates change not a bit.

    python experiments/certificates.py                        # everything
    python experiments/certificates.py --sections time mates
    python experiments/certificates.py --smoke                # the same, tiny

Writes results.json (all numbers), table.md and certificates.png into runs/certificates/, over those
of an earlier run; a section that isn't asked for is kept from there. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2, seed 0; 11 minutes. As
printed (all of it: results/certificates.md; what does not hold is marked there):

    bound / true error, float32: tanh, relu6, sigmoid (at most 1.5)     1.21, 1.20, 1.45
    JVPs of a certificate, worst example (at most 3)                    3, 7, 3
    hard problems: evaluations and JVPs in all, the most (at most 60)   40
    violations in 20,072 random problems, 10,036 solves                 0
    convolution, value and gradient / floor (at most 1.15)              1.16
    the same, by the series alone; both, pieces in a loop               1.04; 1.40 and 1.29
"""

# ruff: noqa: E402
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from bench.options import Measurement
from training.flags import Count, read

Section = Literal["tightness", "hard", "coverage", "refused", "time", "mates"]


@dataclasses.dataclass(frozen=True)
class Config(Measurement):
    """Certificates: true, tight, and at what cost."""

    sections: tuple[Section, ...] = get_args(Section)
    """Parts of the measurement."""
    n: Count = 80
    """Unknowns of a dense problem: the width of the reference's linear network."""
    batch: Count = 64
    """Examples, as in the reference's training; the small convolution has 8."""
    size: Count = 6
    """Pixels of a side of the small convolution's images: its matrix is written out."""
    channels: Count = 4
    """Channels of the small convolution."""
    problems: Count = 10_000
    """Random problems per dtype, at least."""
    each: Count | None = None
    """Problems of an activation and size, of two activations only; None: as many as it takes."""
    time_size: Count = 28
    """Pixels of a side of the images of the timed convolution."""
    time_channels: Count = 82
    """Channels of it: the reference's single-convolution network on 28 x 28 images."""
    rounds: Count = 15
    """Interleaved rounds of timing; four times it for the dense problems, which are quick."""


SMOKE = dict(n=6, batch=6, size=3, channels=2, each=12, time_size=4, time_channels=3, rounds=1)

if __name__ == "__main__":  # before the rest, which takes seconds to import
    read(Config)

from bench.certificates.coverage import coverage
from bench.certificates.mates import mates
from bench.certificates.plot import plot_tightness
from bench.certificates.refused import refused
from bench.certificates.report import claims, tables
from bench.certificates.tight import hard, tightness
from bench.certificates.time import time
from bench.record import record

MEASURES: dict[Section, Callable[[Config], Any]] = {
    "tightness": lambda c: tightness(c.batch, c.n, c.size, c.channels, c.seed, c.smoke),
    "hard": lambda c: hard(c.batch, c.n, c.seed, c.smoke),
    "coverage": lambda c: coverage(c.problems, c.each, c.seed),
    "refused": lambda c: refused(c.seed, c.smoke),
    "time": lambda c: time(c.batch, c.n, c.time_channels, c.time_size, c.rounds, c.seed),
    "mates": lambda c: mates(min(c.batch, 16), c.n, c.seed),
}


def main(config: Config) -> None:
    out, results = record("certificates", config, SMOKE, MEASURES, claims, tables)
    if "tightness" in results:
        plot_tightness(results["tightness"], out / "certificates.png")


if __name__ == "__main__":
    main(read(Config))

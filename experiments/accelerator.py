"""Correctness and cost on an accelerator, in eight minutes and one command.

Shown, in order of worth: the machine and its rates; whether exact reversal is exact, with the
ordinary and with the deterministic algorithms; what a solve and its gradient cost over what they
cannot do without; the rules that were measured on a CPU, against the stock ones; whether the bounds
of rounding hold that certificates are made of; training, in nats and tokens a second.

    python experiments/accelerator.py                       # on a CPU: reduced sizes
    python experiments/accelerator.py --minutes 4 --sections exactness certificates
    python experiments/accelerator.py --smoke               # tiny: everything is run through

Needs deqjax with what it depends on and NumPy, and nothing of the `experiments` extra. Each section
is a process of its own with a share of the minutes, and what it leaves of that the next ones have.
Each result is a line of results.jsonl in `--out` at once, and a row of table.md there. What is red
is a fault: the run then ends with status 1. What there was no time for is "not reached".

On an accelerator: not measured. Reduced, on two cores of a shared x86 CPU with a load of 5 by other
work, JAX 0.10.2, seed 0, two runs of eight minutes: 0 red in both, 48 and 55 ok, 22 and 18 not
reached (of which only the multi-scale blocks in neither). As printed, among others:

    exactness, 32 cases: residual 0 (6 do not tell it); gradients off by 3e-07, bfloat16 6e-02
    language block, float32: exact: 2.58 ms an evaluation, 1.00 of the floor
    memory at 4, 16, 64, 256 evaluations, exact: 1.603 1.603 1.631 1.603 MiB beside the digits
    convolution, 128 channels, flipped: ours / stock: VJP 1.57 ms / 20.1 ms = 0.08
    certificates: 1,600, 0 violations; no function misses by more than its entry (expm1 6.50 of 8)
"""

import argparse
import faulthandler
import importlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.accelerator.report import (
    LATE,
    RED,
    begun,
    forget,
    read,
    row,
    rows,
    running,
    table,
    write,
)


class Section(NamedTuple):
    """A process of its own: module, share of the time beside the others, and what it needs set."""

    module: str
    weight: float
    flags: str = ""


DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
SECTIONS: dict[str, Section] = {
    "machine": Section("machine", 6),
    "exactness": Section("exactness", 24),
    "exactness, deterministic": Section("exactness", 10, DETERMINISTIC),
    "cost": Section("cost", 24),
    "rules": Section("rules", 14),
    "certificates": Section("certificates", 10),
    "training": Section("training", 16),
}
NAMES = list(dict.fromkeys(section.module for section in SECTIONS.values()))
SOFT = 0.85  # of its time, after which a section starts nothing new; at its end it is ended
HANGS = 90.0  # seconds that no case needs on a machine that works


def number(kind: type, name: str, low: float, high: float) -> Callable[[str], float]:
    """Reads an option that is a number in a range."""

    def read(text: str) -> float:
        value = kind(text)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"expected {name} from {low} to {high}, got {text}")

    return read


def options() -> argparse.ArgumentParser:
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    minutes, seed = number(float, "--minutes", 0.1, 1e4), number(int, "--seed", 0, 2**32 - 1)
    add("--minutes", type=minutes, default=8.0, help="of the whole run (default: %(default)s)")
    add("--sections", nargs="+", choices=NAMES, default=NAMES, help="default: all")
    add("--out", type=Path, default=Path("runs/accelerator"), help="default: %(default)s")
    add("--smoke", action="store_true", help="tiny sizes, in one process")
    add("--seed", type=seed, default=0)
    add("--text", type=Path, help="a text file to train on; default: Python's own documentation")
    add("--child", nargs="+", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)
    return parser


def child(config: argparse.Namespace) -> None:
    """Runs the sections `config.child` in this process."""
    # Where a case dies or hangs is then told in log.txt.
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(config.until - time.time(), 1.0))
    if importlib.util.find_spec("deqjax") is None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import jax

    from bench.accelerator.run import Run, size_of

    if config.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long
    for name in config.child:
        module = SECTIONS[name].module
        size = size_of(config.smoke)
        run = Run(config.out, name, size, config.seed, config.until, config.text)
        getattr(importlib.import_module(f"bench.accelerator.{module}"), module)(run)
    faulthandler.cancel_dump_traceback_later()


class Parent:
    """Starts the sections one after the other, and never an accelerator itself."""

    def __init__(self, config: argparse.Namespace):
        self.config, self.path = config, config.out / "results.jsonl"
        self.wanted = [n for n, s in SECTIONS.items() if s.module in config.sections]
        self.end, self.heard = time.time() + 60 * config.minutes, 0

    def run(self) -> None:
        self.config.out.mkdir(parents=True, exist_ok=True)
        forget(self.path, self.wanted)
        (self.config.out / "log.txt").write_text("")
        if self.config.smoke:
            self.wanted = [name for name in self.wanted if not SECTIONS[name].flags]
            return self.section(self.wanted, self.end - time.time(), DETERMINISTIC)
        for i, name in enumerate(self.wanted):
            weights = [SECTIONS[each].weight for each in self.wanted[i:]]
            share = (self.end - time.time()) * weights[0] / sum(weights)
            self.section([name], share, SECTIONS[name].flags)
            self.report()

    def section(self, names: list[str], share: float, flags: str) -> None:
        """Runs a section; again after a crash, from the case after the one that crashed."""
        start = time.time()
        while (left := start + share - time.time()) > 1:
            before = self.begun(names)
            code = self.process(names, start + SOFT * share, left, flags)
            if code == 0:
                return
            lines = read(self.path)
            at = [(name, case) for name in names if (case := running(lines, name))]
            name, case = at[-1] if at else (names[0], "the section")
            if code is None:
                # A case that hangs is a fault; one that was started too late is not, nor one that
                # has to share its cores.
                at = [x["at"] for x in lines if x["section"] == name and x.get("start") == case]
                taken = time.time() - max(at, default=start)
                hangs = taken > HANGS and self.about().get("platform") != "cpu"
                verdict = RED if hangs else LATE
                write(self.path, row(name, case, f"cut off after {taken:.0f} s", verdict=verdict))
                return
            write(self.path, row(name, case, self.last_words(code), verdict=RED))
            if self.begun(names) == before:
                return

    def process(self, names: list[str], until: float, limit: float, flags: str) -> int | None:
        """Waits for a process; its exit status, None if it had to be ended."""
        c = self.config
        command = [sys.executable, *(f"-W{w}" for w in sys.warnoptions), __file__]
        command += ["--child", *names, "--until", str(until), "--out", str(c.out)]
        command += ["--seed", str(c.seed)] + ["--smoke"] * c.smoke
        command += ["--text", str(c.text)] if c.text else []
        environment = dict(os.environ)
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
        with (c.out / "log.txt").open("a") as log:
            self.heard = log.tell()
            running = subprocess.Popen(command, stderr=log, env=environment)
            try:
                return running.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                running.terminate()
                try:
                    running.wait(3)
                except subprocess.TimeoutExpired:
                    running.kill()
                    running.wait()

    def begun(self, names: list[str]) -> list[str]:
        return [case for name in names for case in begun(read(self.path), name)]

    def last_words(self, code: int) -> str:
        log = (self.config.out / "log.txt").read_bytes()[self.heard :]  # of the last process
        text = log.decode(errors="replace").strip().splitlines()
        return f"ended with status {code}: {text[-1][:300] if text else 'without a word'}"

    def about(self) -> dict[str, str]:
        """The machine, as its section found it."""
        found = [line.get("about", {}) for line in read(self.path)]
        return {name: value for each in found for name, value in each.items()}

    def report(self) -> list[dict[str, Any]]:
        lines, about = read(self.path), self.about()
        said = f"{about.get('device', 'unknown device')}, JAX {about.get('jax', 'unknown')}. "
        said = "A smoke run, of which the figures say nothing. " * self.config.smoke + said
        there = {line["section"] for line in lines} | set(self.wanted)
        found = rows(lines, [name for name in SECTIONS if name in there])
        (self.config.out / "table.md").write_text(table(found, said), encoding="utf-8")
        return found


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    config = options().parse_args()
    if config.child:
        return child(config)
    signal.signal(signal.SIGTERM, stop)
    parent = Parent(config)
    stopped = False
    try:
        parent.run()
    except KeyboardInterrupt:
        stopped = True
    found = parent.report()
    print(f"\n{(config.out / 'table.md').read_text(encoding='utf-8')}")
    if stopped or any(line["verdict"] == RED for line in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

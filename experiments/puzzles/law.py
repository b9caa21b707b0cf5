"""How deep a gradient has to go: every task, size and depth on record, at equal steps and time."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from puzzles.config import resolved
from puzzles.options import Config
from puzzles.train import TIMES
from training.options import RUNS, recorded

SEEDS = (0, 1, 2)


class Case(NamedTuple):
    """A task of one size, and the depths of the gradient that are compared; 0: all."""

    label: str
    options: dict[str, Any]
    depths: tuple[int, ...]
    timed: tuple[int, ...]  # depths that are also trained for as long as all evaluations take

    def config(self, depth: int, seed: int, smoke: bool) -> Config:
        """The run of a depth and a seed; of a timed one, `steps` is replaced."""
        config = resolved(Config(**self.options, last=(depth,), seed=seed, smoke=smoke))
        return _named(config, f"law-{config.name}")


def _named(config: Config, name: str, **changes: Any) -> Config:
    """The run of this name, which goes on where it was stopped."""
    return dataclasses.replace(config, name=name, resume=(RUNS / name).exists(), **changes)


CASES = (
    Case("growth 16 x 16", {"task": "growth", "size": 16}, (1, 2, 4, 8, 12, 0), (1, 8)),
    Case("maze 9 x 9", {"task": "maze", "size": 9}, (1, 2, 4, 8, 16, 0), (1,)),
    Case("Sudoku 6 x 6", {"task": "sudoku6"}, (1, 2, 4, 8, 0), (1,)),
    Case("growth 32 x 32", {"task": "growth", "size": 32}, (1, 4, 8, 16, 24, 0), (8,)),
    Case("maze 15 x 15", {"task": "maze", "size": 15}, (1, 4, 8, 16, 24, 0), (8,)),
)


def finished(config: Config) -> dict[str, Any] | None:
    """The result of a run that has come to its end; refuses one with other options."""
    folder = RUNS / str(config.name)
    if not (folder / "result.json").exists():
        return None
    before = json.loads((folder / "config.json").read_text())["config"]
    now = json.loads(json.dumps(recorded(config)))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if changed:
        raise SystemExit(
            f"--law expected {folder} to be of the table's own options, got others of {changed}. "
            f"Move the folder away."
        )
    result = json.loads((folder / "result.json").read_text())
    return result if result["steps"] == config.steps else None


def all_runs(
    train: Callable[[Config], dict[str, Any]],
    clock: Callable[[list[Config]], list[float]],
    smoke: bool,
) -> list[dict[str, Any]]:
    """Trains what is not trained yet; the results of all."""
    results, seeds, cases = [], SEEDS, CASES
    if smoke:
        few = lambda case: case._replace(depths=(1, 0), timed=case.timed[:1])
        seeds, cases = SEEDS[:1], [few(CASES[0]), few(CASES[2])]
    for seed in seeds:
        for case in cases:
            configs = {depth: case.config(depth, seed, smoke) for depth in case.depths}
            seconds = dict(zip(configs, _clocked(case, clock, [*configs.values()]), strict=True))
            runs = [(depth, config, "steps") for depth, config in configs.items()]
            for depth in case.timed:
                config = configs[depth]
                assert config.steps
                steps = max(config.steps, round(config.steps * seconds[0] / seconds[depth], -1))
                longer = _named(config, f"{config.name}-long", steps=int(steps))
                runs.append((depth, longer, "time"))
            for depth, config, equal in runs:
                result = finished(config) or train(config)
                result["seconds"] = result["steps"] * seconds[depth]
                results.append(result | {"case": case.label, "equal": equal})
    return results


def _clocked(case: Case, clock: Callable, configs: list[Config]) -> list[float]:
    """Seconds of a step of each depth, measured once: all seeds take as many steps."""
    path = RUNS / "law" / f"seconds of {case.label}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(clock(configs)))
    return json.loads(path.read_text())


def rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The table: a line a case, a depth and what is equal; mean and range over the seeds."""
    lines = []
    for case in dict.fromkeys(r["case"] for r in results):
        for equal in ("steps", "time"):
            some = [r for r in results if (r["case"], r["equal"]) == (case, equal)]
            for depth in sorted({r["last"] or r["evaluations"] for r in some}):
                runs = [r for r in some if (r["last"] or r["evaluations"]) == depth]
                lines.append(_row(case, equal, depth, runs))
    return lines


def _row(case: str, equal: str, depth: int, runs: list[dict[str, Any]]) -> dict[str, str]:
    n, growth = runs[0]["evaluations"], runs[0]["task"] == "growth"
    row = {"task": case, "equal": equal, "last": f"{depth} of {n}", "seeds": str(len(runs))}
    for t in TIMES:
        solved = [100 * r["solved"][str(t * n)] for r in runs]
        row[f"x{t}"] = _span(solved, "{:.1f}")
    if growth:
        row["error / variance"] = _span([r["loss"][str(n)] for r in runs], "{:.3f}")
    else:
        row["error / variance"] = "-"
    row["steps"] = f"{runs[0]['steps']:,}"
    row["seconds"] = f"{runs[0]['seconds']:.0f}"
    row["MiB"] = f"{runs[0]['mib']:.0f}"
    row["residual"] = f"{np.mean([r['residual'] for r in runs]):.1e}"
    row["radius"] = f"{np.mean([r['radius'] for r in runs]):.2f}"
    return row


def _span(values: list[float], form: str) -> str:
    """The mean, and the range if there is one."""
    mean, low, high = (form.format(x) for x in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"

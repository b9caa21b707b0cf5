"""The configurations of the runs, complete and checked, from the options that are given."""

import dataclasses
from dataclasses import replace

from puzzles.options import SUDOKUS, Config, Name
from training.flags import check, check_read
from training.options import check_names, filled, recorded

_MIXED = Config(
    mixing="mlp", width=64, hidden=128, evaluations=16, puzzles=3000, held_out=500,
    steps=2400, batch_size=128, learning_rate=2e-3, weight_decay=1e-2,
)  # fmt: skip
# For two cores, twenty minutes of them at most.
TASKS: dict[Name, Config] = {
    "sudoku4": replace(_MIXED, clues=5, width=32, hidden=64, steps=800, puzzles=1000, held_out=200),
    "sudoku6": replace(_MIXED, clues=10),
    "sudoku9": replace(_MIXED, clues=30, width=96, hidden=192, puzzles=5000),
    "maze": replace(
        _MIXED, size=9, mixing="automaton", width=24, hidden=64, evaluations=24, batch_size=64,
        steps=1500,
    ),
    "parity": replace(_MIXED, size=16, mixing="attention"),
    "permutations": replace(_MIXED, size=8, mixing="attention", puzzles=50_000),
    "growth": replace(
        _MIXED, size=16, mixing="automaton", width=16, hidden=96, evaluations=24, steps=3000,
        batch_size=10, weight_decay=0.0,
    ),
}  # fmt: skip


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with everything filled in; what does not fit is refused."""
    if config.law and recorded(config) != recorded(Config(law=True, smoke=config.smoke)):
        raise SystemExit(
            "Expected --law without options of a run, which it has its own of, got some. Leave "
            "them out."
        )
    depths = config.last
    if depths is None:
        depths = (0, 1) if config.adjoint in ("exact", "checkpointed") else (0,)
    runs = [resolved(replace(config, last=(depth,)), len(depths) > 1) for depth in depths]
    check_read(config, runs)
    check_names(runs)
    return runs


def resolved(config: Config, several: bool = True) -> Config:
    """Fills in what was left at None; `several`: other runs share its name."""
    values = dataclasses.asdict(TASKS[config.task]) | {"last": (0,)}
    # In a larger grid what a cell knows has further to go, and a training step takes longer.
    side = config.size or 0
    if config.task == "growth" and side > 16:
        values |= {"evaluations": 3 * side // 2, "steps": 2000}
    if config.task == "maze" and side > 9:
        values |= {"evaluations": 8 * side // 3, "batch_size": 32}
    if config.smoke:
        small = {"width": 16, "hidden": 16, "evaluations": 4, "puzzles": 64, "held_out": 16}
        small |= {"steps": 6, "batch_size": 16, "log_every": 2}
        values |= small
    if config.name is None or several:
        name = default_name(filled(config, values))
        name = name if config.name is None else f"{config.name}-{name}"
        config = replace(config, name=name)
    config = filled(config, values)
    check(config)
    _check_fit(config)
    return config


def _check_fit(config: Config) -> None:
    task, mixing, n = config.task, config.mixing, config.evaluations
    size = config.size or 0
    assert n and config.width
    automaton = mixing == "automaton"
    if (task == "growth" and not automaton) or (automaton and task not in ("maze", "growth")):
        raise SystemExit(
            f"Expected --mixing automaton for growth, mlp or attention for sequences and Sudokus, "
            f"and any for mazes, got {mixing} for {task}. Leave --mixing out."
        )
    if task == "growth" and config.width < 11:
        raise SystemExit(
            f"Expected --width of at least 11 for growth, where the first cell names one of ten "
            f"digits, got {config.width}. Pass more."
        )
    if mixing == "attention" and config.width % 4:
        raise SystemExit(
            f"Expected --width to be a multiple of the four heads of --mixing attention, got "
            f"{config.width}. Pass such a number."
        )
    if task == "maze" and (size % 2 == 0 or size < 7):
        raise SystemExit(
            f"Expected an odd --size of at least 7 of a maze, whose rooms have walls on both sides "
            f"(those of 5 are all alike), got {size}. Pass such a number."
        )
    if config.draws and config.adjoint in ("one-step", "implicit"):
        raise SystemExit(
            f"Expected --adjoint exact or checkpointed beside --noise and --fire, which draw anew "
            f"in every evaluation, got {config.adjoint}, whose gradient is of a fixed point. Leave "
            f"them out, or choose another."
        )
    if config.segments > 1 and config.accumulate > 1:
        raise SystemExit(
            f"Expected --segments 1 beside --accumulate {config.accumulate}, whose parts would "
            f"share one carried state, got {config.segments}. Leave one of them out."
        )
    if config.depth > n:
        raise SystemExit(
            f"Expected --last of at most the {n} --evaluations, got {config.depth}. Pass fewer, "
            f"or 0 for all."
        )


def default_name(config: Config) -> str:
    size = f"-{config.size}" if config.task not in SUDOKUS else ""
    own = config.adjoint in ("exact", "checkpointed")
    how = f"-last{config.depth or config.evaluations}" if own else ""
    how += "" if config.adjoint == "exact" else f"-{config.adjoint}"
    return f"{config.task}{size}{how}-{config.seed}{'-smoke' if config.smoke else ''}"


def title(config: Config) -> str:
    """The gradient of a run, in words."""
    if config.adjoint in ("one-step", "implicit"):
        return config.adjoint
    depth = config.depth
    words = f"all {config.evaluations}" if depth in (0, config.evaluations) else f"last {depth}"
    return words + (", checkpointed" if config.adjoint == "checkpointed" else "")

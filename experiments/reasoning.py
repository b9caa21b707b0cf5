"""How deep must a gradient go? One recursion, differentiated through its last K evaluations.

Shown: a network that repeats one cell learns to solve Sudokus and mazes, to multiply permutations,
and to grow a digit from a single cell; with a gradient through the last evaluation, the last few or
all of them, which is exact and takes the memory of one. How deep the gradient has to go depends on
the task: on how far what is known has to travel.

    python experiments/reasoning.py                           # 6 x 6 Sudokus, all against the last
    python experiments/reasoning.py --task sudoku4 --last 0 1 2 4          # two minutes
    python experiments/reasoning.py --task maze --size 15 --last 0 8
    python experiments/reasoning.py --task growth --size 32 --last 0 8     # a cellular automaton
    python experiments/reasoning.py --task growth --segments 4 --fire 0.5  # that lasts, and heals
    python experiments/reasoning.py --task permutations --noise 0.1 --random-depth
    python experiments/reasoning.py --law          # every task, depth and seed on record: hours
    python experiments/reasoning.py --smoke        # the same, tiny, not learning

Tasks come from seeded generators; no test puzzle has a solution, or walls, that a training puzzle
has, nor a mirrored or renamed one. The table says how many unseen puzzles are solved after as many
evaluations as in training, and after 2, 4 and 8 times as many; the seconds of the training steps,
estimated by the 90th percentile of their speed, and the temporary memory of one; the residual and
the spectral radius of the cell at the end. Below it: whether the recursion converges, and from
other starts to the same point; how often the start with the lowest residual is right, and the
chance that a right answer has a lower residual than a wrong one; how a grown picture heals.

`--resume` with the same options goes on where a run was stopped, bit for bit. Every run has a
folder runs/<name>/ with its configuration, metrics, checkpoints and result.json; the first has the
picture. `--law` trains what is not trained yet, and writes reasoning.md, .json and .png into
runs/law/. Several GPUs, hosts or a TPU pod: see the README. All options: --help.
"""

from puzzles.config import choose
from puzzles.options import Config
from training.flags import read

if __name__ == "__main__":  # before the rest, which takes seconds to import
    choose(read(Config))

import json
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from puzzles.config import title
from puzzles.law import all_runs, rows
from puzzles.measure import damage, diagnosis, frames, progress, radius, starts
from puzzles.memory import SIDE, measure as measure_memory
from puzzles.networks import make_model
from puzzles.pictures import draw_law, draw_runs
from puzzles.tasks import Task, load
from puzzles.train import TIMES, empty, make_evaluate, make_loss, make_run
from training.devices import begin, check_batch, is_main, local, main_first, mesh, place, replicate
from training.fit import TrainState, fit, make_step
from training.options import RUNS, recorded
from training.plots import plot_curves
from training.run import RunFolder
from training.table import ending, table


class Built(NamedTuple):
    """The parts of a run before it begins: its compiled step among others."""

    static: PyTree
    state: TrainState
    step: Any
    batch: NamedSharding
    replicated: NamedSharding


def build(config: Config, task: Task) -> Built:
    """Network, optimiser and compiled step, whose memory can be read."""
    size, total, peak = config.batch_size, config.steps, config.learning_rate
    assert size and total and peak and config.weight_decay is not None
    check_batch(size, config.accumulate, 10**9, "examples")
    model_key, train_key = jax.random.split(jax.random.key(config.seed))
    model = eqx.filter_jit(make_model)(config, task, model_key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    warmup = min(config.warmup, total // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, weight_decay=config.weight_decay),
    )
    batch, replicated = mesh()
    loss = make_loss(static, task, config, batch)
    step = make_step(loss, optimizer, batch, replicated, accumulate=config.accumulate)
    zero, carry = jnp.zeros((), jnp.int32), empty(model, task, config)
    state = TrainState(params, carry, optimizer.init(params), train_key, zero)
    state = replicate(state, replicated)
    example = place(task.batch(0, size, config.seed), batch)
    return Built(static, state, step.lower(state, *example).compile(), batch, replicated)


def clock(configs: list[Config], rounds: int = 7) -> list[float]:
    """Seconds of a training step of each: the median of rounds in which they take turns."""
    task, times = load(configs[0]), [[] for _ in configs]
    built = [build(config, task) for config in configs]
    states = [b.state for b in built]
    for _ in range(rounds):
        for i, (config, b) in enumerate(zip(configs, built, strict=True)):
            examples = place(task.batch(0, config.batch_size or 1, 0), b.batch)
            began = time.perf_counter()
            states[i], _ = jax.block_until_ready(b.step(states[i], *examples))
            times[i].append(time.perf_counter() - began)
    return [float(np.median(each)) for each in times]


def train(config: Config, task: Task) -> dict[str, Any]:
    """One run, from its folder to its result."""
    size, total = config.batch_size, config.steps
    assert size and total and config.name
    static, state, step, batch, replicated = build(config, task)
    folder = RunFolder(RUNS, config.name, recorded(config), resume=config.resume, keep=config.keep)
    state = folder.restore(state)
    run = make_run(static, config, batch, replicated)
    evaluate = make_evaluate(run, task, config)
    state, _ = fit(
        folder,
        step,
        state,
        lambda step: task.batch(step, size, config.seed),
        batch,
        session=config,
        total=total,
        assess=evaluate,
        assess_every=max(1, total // 6),
        per_step=size,
        unit="examples",
    )
    result = results(config, task, folder, state, run, static)
    result["mib"] = step.memory_analysis().temp_size_in_bytes / 2**20
    if is_main():
        name = "cross-entropy, nats" if task.tokens else "squared error over variance"
        plot_curves(folder, f"{config.task}, gradient through {title(config)}", "test", name)
        with folder.writing("result.json"):
            (folder.path / "result.json").write_text(json.dumps(result, indent=1))
    folder.close()
    return result


def results(
    config: Config, task: Task, folder: RunFolder, state: TrainState, run: Any, static: Any
) -> dict[str, Any]:
    """All that is said of a run, measured at its end."""
    size, params = config.batch_size, state.params
    assert size
    model = eqx.combine(local(params), static)
    at = progress(run, params, task, config)
    _, sol = run(params, task.test[0], config.evaluations, jax.random.key(1))
    result = {name: getattr(config, name) for name in ("task", "size", "evaluations", "seed")}
    result |= {"gradient": title(config), "last": config.depth, "steps": int(state.step)}
    result |= {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    result |= {
        "solved": at["solved"],
        "loss": at["loss"],
        "residual": at["residual"][str(config.evaluations)],
    }
    result["folder"] = folder.path.name
    result["radius"] = radius(model, sol.value, task.test[0])
    every = folder.metrics()
    lines = [line for line in every if "loss" in line]
    # What else the machine did is left out; readings of a drawn depth differ by themselves.
    share = 50 if config.random_depth else 90
    speed = np.percentile([line["examples_per_second"] for line in lines], share)
    result["seconds"] = len(lines) * size / speed
    result["curve"] = [
        {k: line[k] for k in ("step", "eval_loss", "eval_accuracy")}
        for line in every if "eval_loss" in line
    ]  # fmt: skip
    # Of all processes: each of these is a computation on all devices.
    shown, save = frames(run, params, task, config), np.savez_compressed
    if is_main():
        with folder.writing("frames.npz"):
            save(folder.path / "frames.npz", **shown)  # pyright: ignore[reportArgumentType]
    result["diagnosis"] = repr(diagnosis(model, task, config))
    further = damage if config.task == "growth" else starts
    result[further.__name__] = further(run, params, task, config)
    return result


def row(result: dict[str, Any]) -> dict[str, Any]:
    n = result["evaluations"]
    line = {"task": result["task"], "gradient": result["gradient"]}
    line |= {f"solved at {t * n}": f"{100 * result['solved'][str(t * n)]:.1f} %" for t in TIMES}
    loss = "error / variance" if result["task"] == "growth" else "nats"
    line |= {loss: f"{result['loss'][str(n)]:.3f}", "seconds": f"{result['seconds']:.0f}"}
    line |= {"MiB": f"{result['mib']:.1f}", "residual": f"{result['residual']:.1e}"}
    return line | {"radius": f"{result['radius']:.2f}", "folder": f"{RUNS / result['folder']}/"}


def more(config: Config, result: dict[str, Any]) -> str:
    """Test-time compute of a puzzle, or what becomes of a damaged picture, as text."""
    if "starts" in result:
        found, share = result["starts"], lambda x: f"{100 * x:.1f} %"
        best = f"lowest residual of {config.starts}"
        lines = [
            {"evaluations": k, "one random start": share(first), best: share(chosen),
             "any of them": share(any_), "right above wrong": "-" if auc is None else f"{auc:.3f}"}
            for k, first, chosen, any_, auc in zip(*found.values(), strict=True)
        ]  # fmt: skip
        return "\n" + table(lines)
    words = [f"{name} {x:.3f}" for name, x in result.get("damage", {}).items()]
    return f"error, a quarter set to zero: {', '.join(words)}" if words else ""


def law(config: Config) -> None:
    """The table, the picture and all numbers of every task, depth and seed."""
    found = all_runs(lambda config: train(config, load(config)), clock, config.smoke)
    folder = RUNS / "law"
    folder.mkdir(exist_ok=True)
    memory = measure_memory(16, (4, 8)) if config.smoke else measure_memory()
    draw_law(found, memory, RUNS, folder / "reasoning.png")
    record = {"results": found, "memory": memory}
    (folder / "reasoning.json").write_text(json.dumps(record, indent=1) + "\n")
    about = (
        "The gradient goes through the last of the evaluations. Mean of the seeds, and range.",
        "x1, x2, ...: % solved after so many times as many evaluations as in training.",
        "seconds: of all training steps, by the median of rounds in which the depths take turns.",
    )
    text = ending(rows(found), config.smoke, *about)
    text += f"\n\nMiB of a gradient of growth, {SIDE} cells a side\n\n"
    text += table([dict(zip(memory, (f"{x:.0f}" for x in line), strict=True))
                   for line in zip(*memory.values(), strict=True)])  # fmt: skip
    (folder / "reasoning.md").write_text(f"```\n{text.strip()}\n```\n")
    print(text)


def main(configs: list[Config]) -> None:
    first = configs[0]
    begin(first)
    if first.law:
        law(first)
        return
    task = main_first(lambda: load(first))
    found = [(config, train(config, task)) for config in configs]
    if is_main():
        lines = [row(result) for _, result in found]
        path = RUNS / found[0][1]["folder"] / "picture.png"
        draw_runs([result for _, result in found], RUNS, path)
        print(ending(lines, first.smoke, task.about, f"seed {first.seed}"))
        for config, result in found:
            print(f"\nGradient through {title(config)}:\n{result.get('diagnosis', '')}")
            print(more(config, result))
        print(f"\nPicture: {path}")


if __name__ == "__main__":
    main(choose(read(Config)))

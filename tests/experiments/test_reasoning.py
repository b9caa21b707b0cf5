"""`experiments/reasoning.py`, run as a user runs it, with --smoke."""

import json
import re
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import finish, runner, start_two

from puzzles.config import resolved
from puzzles.networks import make_model
from puzzles.options import Config
from puzzles.tasks import load
from puzzles.train import Carry, empty, make_loss
from training.devices import mesh

SCRIPT = Path(__file__).parents[2] / "experiments" / "reasoning.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script in a folder, on so many simulated devices."""
    return partial(runner(SCRIPT, tmp_path_factory.mktemp("compiled")))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_without_options_two_gradients_are_compared(run, tmp_path):
    process = run(tmp_path)
    assert process.returncode == 0, process.stderr
    rows = [re.split(r" {2,}", x) for x in process.stdout.splitlines() if x.endswith("smoke/")]
    assert [row[1] for row in rows] == ["all 4", "last 1"]
    assert "Sudokus of 6 x 6 cells, 10 given" in process.stdout
    path = tmp_path / rows[0][-1]
    assert {"picture.png", "result.json", "frames.npz", "curves.png"} <= {
        x.name for x in path.iterdir()
    }
    result = json.loads((path / "result.json").read_text())
    assert result["steps"] == 6 and result["mib"] > 0 and result["solved"].keys() >= {"4", "32"}
    assert "factor per step" in process.stdout


@pytest.mark.slow
def test_resuming_is_bit_for_bit_on_eight_devices(run, tmp_path):
    """A carried state, noise, a drawn depth and a learned retention, stopped half way."""
    options = ("--task", "parity", "--last", "2", "--segments", "3", "--noise", "0.1")
    options += ("--random-depth", "--retention", "learned")
    straight = run(tmp_path, *options, "--name", "straight", devices=8)
    assert straight.returncode == 0, straight.stderr
    stop = ("--stop-after", "3", "--checkpoint-every", "2", "--name", "halves")
    assert run(tmp_path, *options, *stop, devices=8).returncode == 0
    resumed = run(tmp_path, *options, "--name", "halves", "--resume", devices=8)
    assert resumed.returncode == 0, resumed.stderr
    rate = {"examples_per_second"}
    strip = lambda name: [
        {k: v for k, v in x.items() if k not in rate} for x in lines(tmp_path / "runs" / name)
    ]
    losses = lambda name: [x for x in strip(name) if "loss" in x]
    assert losses("halves") == losses("straight")


@pytest.mark.slow
def test_two_processes_measure_together_what_one_writes(tmp_path):
    options = "--smoke --task parity --last 1 --segments 2 --name two".split()
    main, other = finish(start_two(SCRIPT, *options, cwd=tmp_path))
    assert "one random start" in main and "one random start" not in other
    result = json.loads((tmp_path / "runs" / "two" / "result.json").read_text())
    assert result["steps"] == 6 and (tmp_path / "runs" / "two" / "frames.npz").exists()


@pytest.mark.slow
def test_the_table_is_made_of_runs_that_are_not_repeated(run, tmp_path):
    process = run(tmp_path, "--law")
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "law"
    record = json.loads((folder / "reasoning.json").read_text())
    assert (folder / "reasoning.png").exists() and "equal" in (folder / "reasoning.md").read_text()
    assert {r["case"] for r in record["results"]} == {"Sudoku 6 x 6", "growth 16 x 16"}
    assert {r["equal"] for r in record["results"]} == {"steps", "time"}
    again = run(tmp_path, "--law")
    assert again.returncode == 0 and "step/s" not in again.stderr


def setting(**options):
    """Parameters, a batch and the compiled loss of a configuration."""
    config = resolved(Config(smoke=True, last=options.pop("last", (0,)), **options))
    task = load(config)
    model = make_model(config, task, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    loss = make_loss(static, task, config, mesh()[0])
    batch = tuple(map(jnp.asarray, task.batch(0, 16, 0)))
    return params, empty(model, task, config), batch, jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("last", [0, 2])
@pytest.mark.parametrize("task", ["growth", "sudoku4"])
def test_the_gradient_is_that_of_checkpoints_whatever_is_drawn(task, last):
    """Noise, cells that fire at random, a random depth: each evaluation is the same reversed."""
    drawn = {"fire": 0.5} if task == "growth" else {"retention": "learned"}
    options = dict(task=task, last=(last,), noise=0.1, random_depth=True, **drawn)
    grads = []
    for adjoint in ("exact", "checkpointed"):
        params, carry, batch, loss = setting(adjoint=adjoint, **options)
        grads.append(jax.jit(loss)(params, carry, jax.random.key(3), *batch)[1])
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads[0]))


def test_an_example_goes_on_until_it_is_old_or_solved():
    params, carry, batch, loss = setting(task="sudoku4", segments=3)
    assert isinstance(carry, Carry)
    _, (carry, _) = jax.jit(loss)(params, carry, jax.random.key(0), *batch)[0]
    assert jnp.array_equal(carry.given, batch[0]) and jnp.all(carry.age == 1)
    # The first is solved and the second too old; the others keep their puzzle and their state.
    old = carry._replace(solved=carry.solved.at[0].set(True), age=carry.age.at[1].set(3))
    other = (jnp.roll(batch[0], 1, 0), jnp.roll(batch[1], 1, 0))
    _, (new, _) = jax.jit(loss)(params, old, jax.random.key(0), *other)[0]
    assert jnp.array_equal(new.age[:3], jnp.asarray([1, 1, 2]))
    assert jnp.array_equal(new.given[:2], other[0][:2])
    assert jnp.array_equal(new.given[2:], carry.given[2:])
    _, (further, _) = jax.jit(loss)(params, carry, jax.random.key(0), *batch)[0]
    np.testing.assert_allclose(new.z[2:], further.z[2:], rtol=1e-5, atol=1e-5)
    assert jnp.max(jnp.abs(further.z - carry.z)) > 1e-3

"""The parts of training a recursion: its loss, the state that is carried on, an evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

import deqjax
from deqjax.nn import shard_solves

from puzzles.options import Config
from puzzles.tasks import Task
from training.depth import drawn_steps
from training.devices import local, place
from training.fit import TrainState
from training.solves import solve_metrics

TIMES = (1, 2, 4, 8)  # budgets of an evaluation, in those of a training step


class Carry(NamedTuple):
    """The examples of the last step and their states, with which the next one may go on."""

    z: Float[Array, "b ..."]
    given: Int[Array, "b ..."]
    wanted: Array
    age: Int[Array, " b"]
    solved: Bool[Array, " b"]


def start(model: deqjax.nn.DEQ, given: PyTree) -> Float[Array, "b ..."]:
    cell: Any = model.cell
    return jax.vmap(lambda given: cell.initial(cell.inject(given)))(given)


def keyed(given: Array, key: PRNGKeyArray, drawn: bool) -> PyTree:
    """The inputs of the layer: what is given, and a key for each example if it draws anything."""
    keys = jax.random.key_data(jax.random.split(key, len(given))) if drawn else None
    return given, keys


def empty(model: deqjax.nn.DEQ, task: Task, config: Config) -> Carry | None:
    """The carry of the first step: examples that are too old, all of them."""
    size = config.batch_size
    assert size
    if config.segments == 1:
        return None
    given, wanted = map(jnp.asarray, task.batch(0, size, 0))
    z = jax.tree.map(jnp.zeros_like, start(model, (given, None)))
    old = jnp.full(size, config.segments)
    return Carry(z, given, wanted, old, jnp.zeros(size, bool))


def make_loss(static: PyTree, task: Task, config: Config, batch) -> Callable:
    """The mean loss of a batch: for `training.fit.make_step`, whose `norms` are the `Carry`."""
    n = config.evaluations
    assert n

    def loss_fn(params, carry: Carry | None, key, given, wanted):
        model = shard_solves(eqx.combine(params, static), batch)
        key, depth_key = jax.random.split(key)
        steps = drawn_steps(depth_key, n) if config.random_depth else None
        z0, fresh = None, None
        if carry is not None:
            # A grown picture has to last; a solved puzzle makes room for another.
            done = carry.solved & bool(task.tokens)
            fresh = done | (carry.age >= config.segments)
            choose = lambda new, old: jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            given, wanted = choose(given, carry.given), choose(wanted, carry.wanted)
            z0 = choose(start(model, (given, None)), carry.z)
        x = keyed(given, key, model.indexed)
        out, sol = model.batch(x, z0, steps=steps)
        losses = task.loss(out, wanted)
        solved = jax.lax.stop_gradient(task.solved(out, wanted))
        metrics = {"accuracy": jnp.mean(solved, dtype=jnp.float32)}
        metrics |= solve_metrics([(x, sol)], len(given))
        metrics["state_peak"] = jnp.max(jnp.abs(jax.lax.stop_gradient(sol.value)))
        if carry is not None and fresh is not None:
            age = jnp.where(fresh, 1, carry.age + 1)
            carry = Carry(jax.lax.stop_gradient(sol.value), given, wanted, age, solved)
        return jnp.mean(losses), (carry, metrics)

    return loss_fn


def make_run(static: PyTree, config: Config, batch, replicated) -> Callable:
    """`run(params, given, steps, key, z0=None) -> (output, solution)`, as one program for all
    numbers of steps to `max(TIMES)` of those of training. There is no noise; which cells of an
    automaton fire is still drawn.
    """
    n = config.evaluations
    assert n

    def forward(params, given, steps, key, z0):
        model = eqx.tree_at(lambda model: model.cell.noise, eqx.combine(params, static), 0.0)
        model = shard_solves(dataclasses.replace(model, max_steps=max(TIMES) * n), batch)
        return model.batch(keyed(given, key, model.indexed), z0, steps=steps)

    compiled = jax.jit(forward, out_shardings=replicated)

    def run(params, given: np.ndarray, steps: int, key: PRNGKeyArray, z0=None):
        count = len(given)
        fill = -count % jax.device_count()
        pad = lambda x: np.pad(x, ((0, fill), *[(0, 0)] * (x.ndim - 1)))
        filled, *begin = place([pad(np.asarray(x)) for x in (given, z0) if x is not None], batch)
        found = local(compiled(params, filled, jnp.asarray(steps), key, *(begin or [None])))
        return jax.tree.map(lambda x: x[:count] if jnp.ndim(x) else x, found)

    return run


def score(run: Callable, params: PyTree, task: Task, steps: int) -> dict[str, float]:
    """The test after so many evaluations: loss, share solved, median residual."""
    given, wanted = task.test
    out, sol = run(params, given, steps, jax.random.key(1))
    solved, losses = task.solved(out, wanted), task.loss(out, wanted)
    residual = jnp.median(sol.stats["residual"])
    means = {"loss": jnp.mean(losses), "solved": jnp.mean(solved), "residual": residual}
    return {name: float(x) for name, x in means.items()}


def make_evaluate(run: Callable, task: Task, config: Config) -> Callable:
    """`evaluate(state)`: the line of an evaluation, after as many evaluations as in training and
    after four times as many."""
    n = config.evaluations
    assert n

    def evaluate(state: TrainState) -> dict[str, float]:
        once, longer = (score(run, state.params, task, t * n) for t in (1, 4))
        line = {"eval_loss": once["loss"], "eval_accuracy": once["solved"]}
        return line | {"eval_accuracy_4x": longer["solved"], "eval_residual": longer["residual"]}

    return evaluate

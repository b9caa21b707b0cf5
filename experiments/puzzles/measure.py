"""A trained recursion with more evaluations, from other starts, and after damage."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from jaxtyping import Array, PyTree
from sklearn.metrics import roc_auc_score

import deqjax

from puzzles.networks import Automaton
from puzzles.options import Config
from puzzles.tasks import Task
from puzzles.train import TIMES, score, start

FEW = 32  # examples of a Jacobian or of a diagnosis


def evaluations(config: Config) -> list[int]:
    """0, 1, 2, 4, ... up to `max(TIMES)` times those of a training step, and these."""
    n = config.evaluations
    assert n
    powers = [2**i for i in range(20)]
    return sorted({0, *(p for p in powers if p < max(TIMES) * n), *(t * n for t in TIMES)})


def progress(run: Callable, params: PyTree, task: Task, config: Config) -> dict[str, Any]:
    """The test after more and more evaluations: of each number in `score`, by their count."""
    scores = {str(k): score(run, params, task, k) for k in evaluations(config)}
    return {
        name: {k: x[name] for k, x in scores.items()} for name in ("solved", "loss", "residual")
    }


def frames(run: Callable, params: PyTree, task: Task, config: Config) -> dict[str, np.ndarray]:
    """The first examples at each number of evaluations: labels and confidence, or pictures."""
    given = task.test[0][:10]
    outs = [np.asarray(run(params, given, k, jax.random.key(1))[0]) for k in evaluations(config)]
    frames = np.stack(outs)
    if task.tokens:
        shares = np.asarray(jax.nn.softmax(frames, -1))
        frames = np.stack([shares.argmax(-1), shares.max(-1)], -1)
    return {"evaluations": np.array(evaluations(config)), "frames": frames, "given": given,
            "wanted": task.test[1][:10]}  # fmt: skip


def radius(model: deqjax.nn.DEQ, z: Array, given: np.ndarray) -> float:
    """The median spectral radius of the cell at z."""
    z, x, cell = _few(model, z, given)
    found = deqjax.spectral_radius(cell, z, x, key=jax.random.key(0), batched=True)
    return float(jnp.median(found.value))


def diagnosis(model: deqjax.nn.DEQ, task: Task, config: Config) -> deqjax.Diagnosis:
    """`deqjax.diagnose` of a few examples, with a tolerance: does it converge, and to one point?"""
    given = task.test[0]
    z0 = start(model, (jnp.asarray(given), None))
    z0, x, cell = _few(model, z0, given)
    solver = deqjax.Reversible(rtol=1e-4, atol=1e-4, beta=paramax.unwrap(model.solver).beta)
    most = max(TIMES) * (config.evaluations or 1)
    return deqjax.diagnose(cell, solver, z0, x, key=jax.random.key(2), max_steps=most, batched=True)


def _few(model: deqjax.nn.DEQ, z: Array, given: np.ndarray) -> tuple[Array, PyTree, Callable]:
    """A few states and inputs, and the cell without anything drawn: all of an automaton fires."""
    cell: Any = paramax.unwrap(model.cell)
    cell = eqx.tree_at(lambda cell: cell.noise, cell, 0.0)
    if isinstance(cell, Automaton):
        cell = eqx.tree_at(lambda cell: cell.fire, cell, 1.0)
    x = jnp.asarray(given[:FEW]), None
    return z[:FEW], jax.vmap(cell.inject)(x), lambda z, x: jax.vmap(cell)(z, x)


def starts(run: Callable, params: PyTree, task: Task, config: Config) -> dict[str, Any]:
    """Random starts, of which the one with the lowest residual is believed."""
    given, wanted = task.test[0], task.test[1]
    lines: dict[str, Any] = {"evaluations": [], "first": [], "best": [], "any": [], "auc": []}
    shape = run(params, given, 1, jax.random.key(1))[1].value.shape
    draws = [jax.random.normal(jax.random.key(i), shape) for i in range(config.starts)]
    for t in TIMES:
        steps = t * (config.evaluations or 1)
        solved, sizes = [], []
        for z0 in draws:
            out, sol = run(params, given, steps, jax.random.key(1), z0)
            solved.append(np.asarray(task.solved(out, wanted)))
            sizes.append(np.asarray(sol.stats["residual"]))
        solved, sizes = np.stack(solved), np.stack(sizes)
        best = np.take_along_axis(solved, sizes.argmin(0)[None], 0)
        lines["evaluations"].append(steps)
        for name, value in (("first", solved[0]), ("best", best), ("any", solved.any(0))):
            lines[name].append(float(np.mean(value)))
        lines["auc"].append(auc(-sizes.ravel(), solved.ravel()))
    return lines


def auc(score: np.ndarray, right: np.ndarray) -> float | None:
    """The chance that a right answer scores above a wrong one; None if all are alike."""
    return None if right.all() or not right.any() else float(roc_auc_score(right, score))


def damage(run: Callable, params: PyTree, task: Task, config: Config) -> dict[str, float]:
    """A quarter of the grown state is set to zero, and the automaton goes on from there."""
    given, wanted = task.test[0], task.test[1]
    n = config.evaluations or 1
    out, sol = run(params, given, n, jax.random.key(1))
    half = sol.value.shape[1] // 2
    z = jnp.asarray(sol.value).at[:, half:, half:].set(0)
    loss = lambda out: float(jnp.mean(task.loss(out, wanted)))
    found = {"grown": loss(out), "damaged": loss(z[..., 0])}
    for t in TIMES[:3]:
        found[f"{t * n} later"] = loss(run(params, given, t * n, jax.random.key(3), z)[0])
    return found

"""Evaluations of f, and seconds, that a solve takes to a relative residual, in float64."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from bench.compare.methods import OURS, available, distance, history, newton, solve
from bench.problems import Problem, mixed
from bench.rows import Row
from bench.timing import Calls, interleaved, median_ratio, ready


def evaluations(
    problems: Sequence[Problem], tol: float, ceiling: int, length: int, rounds: int
) -> list[Row]:
    """One row for each problem and method: history, evaluations, residual, paired time ratios.

    Residuals are relative to the size of the solution. `steps` are counted step by step where the
    history is long enough, and are the same as the front door's count.
    """
    rows: list[Row] = []
    for p in tqdm(problems, desc="problems"):
        size = float(distance(p.solution, jax.tree.map(jnp.zeros_like, p.solution)))
        residual = jax.jit(lambda z, args, fn=p.fn: distance(fn(z, args), z))
        mine: list[Row] = []
        calls: Calls = {}
        for method in available():
            run = ready(solve(method, p.fn, tol * size, ceiling), p.z0, p.args)
            z, count = run()
            seen = [x / size for x in history(method, p, length)]
            last = float(residual(z, p.args)) / size
            # The value of jaxopt's Picard iteration is one step beyond the one that was measured.
            row: Row = {"problem": p.name, "rho": p.rho, "method": method, "history": seen}
            row |= {"evaluations": int(count), "residual": last, "met": last <= 1.01 * tol}
            row["steps"] = _first(seen, tol)
            mine.append(row)
            if row["met"]:
                calls[method] = run
        repeats = {method: _repeats(call) for method, call in calls.items()}
        found = interleaved(calls, rounds, repeats)
        rows += [row | {"all_seconds": found.get(row["method"])} for row in mine]
        if sum(x.size for x in jax.tree.leaves(p.z0)) <= 1000:  # it makes a dense Jacobian
            rows.append(_newton(p, tol, size))
    return rows


def _first(residuals: list[float], tol: float) -> int | None:
    """The number of steps to the tolerance."""
    return next((i + 1 for i, x in enumerate(residuals) if x <= tol), None)


def _repeats(call: Callable[[], Any]) -> int:
    """The number of times to make a short call in a round: for some milliseconds."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return min(50, 1 + int(5e-3 / (time.perf_counter() - start)))


def _newton(p: Problem, tol: float, size: float) -> Row:
    """A step costs f and a JVP for each entry of z; counted as that many evaluations."""
    n = sum(x.size for x in jax.tree.leaves(p.z0))
    seen = [x / size for x in newton(p, 12)]
    steps = _first(seen, tol)
    return {
        "problem": p.name,
        "rho": p.rho,
        "method": "Newton",
        "history": seen,
        "every": n + 1,
        "evaluations": None if steps is None else steps * (n + 1),
        "residual": seen[-1],
        "met": steps is not None,
        "steps": steps,
        "all_seconds": None,
    }


def ratio(rows: list[Row], ours: str, theirs: str) -> float | None:
    """The ratio of the times of two methods on one problem; None unless both met the tolerance."""
    seconds = {row["method"]: row["all_seconds"] for row in rows}
    a, b = seconds.get(ours), seconds.get(theirs)
    return None if a is None or b is None else median_ratio(a, b)


def mixed_batch(easy: int, tol: float, max_steps: int, seed: int) -> list[Row]:
    """Each example by its own tolerance, in the batch and alone."""
    p = mixed(easy, seed).astype(jnp.float64)
    one = lambda z, args: z @ args[0].T + args[1]
    rows = []
    for method in OURS:
        run = jax.jit(solve(method, p.fn, tol, max_steps, batched=True))
        z, together = run(p.z0, p.args)
        alone = jax.jit(solve(method, one, tol, max_steps))
        each = [jax.tree.map(lambda x, i=i: x[i], (p.z0, p.args)) for i in range(easy + 1)]
        apart = [int(alone(*example)[1]) for example in each]
        residual = jax.vmap(distance)(p.fn(z, p.args), z)
        about = {"method": method, "tol": tol, "residuals": residual.tolist()}
        rows.append({**about, "evaluations": together.tolist(), "alone": apart})
    return rows

"""Violations of the bounds, counted over random problems and handed on in full."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import deqjax

from bench.certificates.cells import LONG, SIGMAS, Batch
from bench.certificates.random import SOURCES, points, problems, radii
from bench.rows import Row

SIZES = 40  # the largest
_EACH = 4  # sizes of an activation; 13 activations have room for all 40
SOLVERS = {"PositiveConcaveSolver": deqjax.PositiveConcaveSolver, "Bracketing": deqjax.Bracketing}


def coverage(count: int, each: int | None, seed: int) -> list[Row]:
    """`count` problems a dtype; with `each`, so many of two activations only, a smoke run."""
    rng = np.random.default_rng(seed)
    names = list(SIGMAS)[: 2 if each else None]
    more = rng.integers(2, SIZES + 1, _EACH * len(SIGMAS) - SIZES)
    sizes = rng.permutation(np.concatenate([np.arange(1, SIZES + 1), more]))
    pairs = [(names[i % len(names)], int(n)) for i, n in enumerate(sizes)]
    pairs = pairs[: len(names)] if each else pairs
    each = each or -(-count // len(pairs))
    rows = []
    for dtype in ("float64", "float32"):
        with jax.enable_x64(dtype == "float64"):
            for i, (name, n) in enumerate(tqdm(pairs, desc=f"coverage, {dtype}")):
                p = problems(name, each, n, dtype, seed + 1000 * i)
                rows.append(_certified(p, dtype, seed + 1000 * i))
                if i < len(names):  # one size of each activation
                    rows += [_solved(p, dtype, which, rng) for which in SOLVERS]
    return rows


def _certified(p: Batch, dtype: str, seed: int) -> Row:
    z, source = points(p, seed)
    c = deqjax.certify(p.fn, jnp.asarray(z), p.args, batched=True)
    low, high = radii(p)
    below, above = (np.asarray(end, float) for end in c.spectral_radius)
    false = _false_ends(p, c.lower, c.upper) | {
        "relative error": _short(p, z, c.relative_error),
        "spectral radius": (below > high) | (above < low),
    }
    holds = np.asarray(c.holds)
    held = [holds[source == k] for k in range(len(SOURCES))]
    more = {"sources": [[len(some), int(some.sum())] for some in held]}
    more |= {"radius in doubt by": float(np.max(high - low))}
    return _about(p, dtype, "certify", false, z, c._asdict()) | more


def _solved(p: Batch, dtype: str, which: str, rng: np.random.Generator) -> Row:
    """Solves to a random tolerance: is what is called successful true, and what is bounded?"""
    rtol = 10 ** rng.uniform(-10 if dtype == "float64" else -5, -1)
    solver = SOLVERS[which](rtol=jnp.asarray(rtol))
    sol = deqjax.fixed_point(p.fn, solver, jnp.zeros_like(p.args[1]), p.args, batched=True)
    stats, good = sol.stats, np.asarray(sol.result == deqjax.RESULTS.successful)
    doubt = np.max(p.doubt / p.solution, -1)
    false = _false_ends(p, stats["lower"], stats["upper"]) | {
        "relative error": _short(p, sol.value, stats["relative_error"]),
        "tolerance": good & (p.error(sol.value) > rtol * (1 + 1e-6) + doubt),
    }
    said = {k: stats[k] for k in ("lower", "upper", "relative_error")}
    said |= {"rtol": [rtol] * len(good)}
    row = _about(p, dtype, which, false, np.asarray(sol.value), said)
    return row | {"sources": [[len(good), int(good.sum())]]}


def _false_ends(p: Batch, lower: Any, upper: Any) -> dict[str, np.ndarray]:
    lower, upper = np.asarray(lower, LONG), np.asarray(upper, LONG)
    return {
        "lower end": np.any(~(lower <= p.solution + p.doubt), -1),
        "upper end": np.any(~(upper >= p.solution - p.doubt), -1),
    }


def _short(p: Batch, z: Any, bound: Any) -> np.ndarray:
    """Marks the examples whose error is larger than its bound."""
    most = np.asarray(bound, LONG)[:, None] + p.doubt / p.solution
    return np.any(~(np.abs(np.asarray(z, LONG) / p.solution - 1) <= most), -1)


def _about(p: Batch, dtype: str, which: str, false: dict, z: np.ndarray, said: dict) -> Row:
    """Counts, and the counterexamples: all that is needed to see each again."""
    examples = [
        {
            "what": what,
            "activation": p.name,
            "dtype": dtype,
            "by": which,
            "W": p.w[j].tolist(),
            "x": p.x[j].tolist(),
            "z": z[j].tolist(),
            "solution": [str(v) for v in p.solution[j]],
            # The examples are the last axis of the bracket of the radius.
            "said": {k: np.asarray(v)[(..., j) if k == "spectral_radius" else j].tolist()
                     for k, v in said.items()},
        }
        for what, wrong in false.items()
        for j in np.flatnonzero(wrong)
    ]  # fmt: skip
    return {
        "by": which,
        "cell": p.name,
        "n": p.x.shape[-1],
        "dtype": dtype,
        "problems": len(z),
        "false": {what: int(wrong.sum()) for what, wrong in false.items()},
        "doubt": float(np.max(p.doubt / p.solution)),
        "counterexamples": examples,
    }

"""Certificates of maps that this library has no cell for: how many hold, how many are false."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from bench.rows import Row
from bench.soundness.families import ORDINARY, Arrays, Family
from bench.soundness.mixed import MIXED
from bench.soundness.reference import LONG, Reference, solved
from bench.soundness.work import asked, work

FAMILIES = (*ORDINARY, *MIXED)
DTYPES = ("float32", "float64")
SOLVERS = {"PositiveConcaveSolver": deqjax.PositiveConcaveSolver, "Bracketing": deqjax.Bracketing}
_STEPS = 100  # of Picard iteration, at most, before a certificate
_BUDGET = 128  # steps of a certified solve
_SHOWN = 2  # counterexamples of a row


def certificates(count: int, solves: int, some: int | None, seed: int, workers: int) -> list[Row]:
    """`count` certificates of each family and dtype, and `solves` solves of each by each solver."""
    step = 1 if some is None else -(-len(FAMILIES) // some)
    picked = itertools.product(range(0, len(FAMILIES), step), DTYPES[: None if some is None else 1])
    tasks = [(i, dtype, count, solves, seed) for i, dtype in picked]
    return [row for rows in work(_family, tasks, workers) for row in rows]


def drawn(f: Family, dtype: str, count: int, seed: list[int]) -> tuple[Arrays, Reference]:
    """Arrays as they are stored, and the solutions for those."""
    rng = np.random.default_rng(seed)
    stored = lambda x: x.astype(dtype) if x.dtype.kind == "f" else x
    arrays = {k: stored(x) for k, x in f.draw(rng, count).items()}
    return arrays, solved(f.exact, arrays, f.n)


def _family(index: int, dtype: str, count: int, solves: int, seed: int) -> list[Row]:
    f, seeds = FAMILIES[index], [seed, index, DTYPES.index(dtype)]
    with jax.enable_x64(dtype == "float64"):
        arrays, truth = drawn(f, dtype, count, seeds)
        about = {"family": f.name, "mixed": f.mixed, "dtype": dtype, "seed": seeds}
        rng = np.random.default_rng([*seeds, 1])
        batched = index % 4 < 2  # one half of the families as a batch, one half under vmap
        ask = _certify(f, batched, rng, dtype, arrays, truth)
        rows = [asked(about | {"by": "certify", "asked": count}, ask)]
        for k, (name, solver) in enumerate(SOLVERS.items()):
            if (index + k + DTYPES.index(dtype)) % 2:
                continue  # each solver has each family in one dtype
            part = {key: x[:solves] for key, x in arrays.items()}
            less = Reference(*(x[:solves] for x in truth))
            ask = _solve(f, batched, rng, dtype, part, less, solver)
            rows.append(asked(about | {"by": name, "asked": solves}, ask))
    return rows


def _points(dtype: str, truth: Reference, rng: np.random.Generator):
    """The start of Picard iteration and its number of steps: from afar, or none from nearby."""
    count = len(truth.z)
    z = np.where(truth.known[:, None], truth.z, 1).astype(float)
    noise = 10 ** rng.uniform(-7, -1, (count, 1)) * rng.uniform(-1, 1, z.shape)
    units = rng.integers(-9, 10, z.shape) * float(np.finfo(dtype).eps)
    starts = np.stack([0 * z, np.ones_like(z), 8 * z, z, z * (1 + noise), z * (1 + units)])
    source = rng.integers(0, len(starts), count)
    steps = np.where(source < 3, rng.integers(0, _STEPS + 1, count), 0)
    return starts[source, np.arange(count)].astype(dtype), steps.astype(np.int32)


def _certify(f, batched, rng, dtype, arrays, truth) -> Callable[[], Row]:
    def ask(start, steps, a):
        over = jax.vmap if batched else lambda one: one
        fn, args = _asks(f, a, over)
        move = over(lambda z, new, go: jnp.where(go, new, z))
        walk = lambda k, z: move(z, fn(z, args), k < steps)
        z = jax.lax.fori_loop(0, _STEPS, walk, start)
        return z, deqjax.certify(fn, z, args, batched=batched)

    def run():
        start, steps = _points(dtype, truth, rng)
        z, c = jax.jit(ask if batched else jax.vmap(ask))(start, steps, arrays)
        held = np.asarray(c.holds)
        said = {"lower": c.lower, "upper": c.upper, "relative error": c.relative_error}
        return judged(truth, z, held, said)

    return run


def _solve(f, batched, rng, dtype, arrays, truth, solver) -> Callable[[], Row]:
    least = -5.5 if dtype == "float32" else -12

    def ask(rtol, a):
        over = jax.vmap if batched else lambda one: one
        fn, args = _asks(f, a, over)
        z0 = jnp.zeros(truth.z.shape if batched else f.n, dtype)
        options: Any = dict(batched=batched, max_steps=_BUDGET)
        return deqjax.fixed_point(fn, solver(rtol=rtol), z0, args, **options)

    def run():
        # A batch has one tolerance.
        rtol = 10 ** rng.uniform(least, -1, () if batched else len(truth.z))
        sol = jax.jit(ask if batched else jax.vmap(ask))(rtol.astype(dtype), arrays)
        held = np.asarray(sol.result == deqjax.RESULTS.successful)
        said = {k.replace("_", " "): sol.stats[k] for k in ("lower", "upper", "relative_error")}
        return judged(truth, sol.value, held, said, rtol)

    return run


def _asks(f: Family, a: Any, over: Callable) -> tuple[Callable, Any]:
    """The function and its args; or one that closes over them."""
    return (lambda z, _: over(f.fn)(z, a), None) if f.closed else (over(f.fn), a)


def judged(truth: Reference, z: Any, held: np.ndarray, said: dict[str, Any], rtol: Any = None):
    """Counts bounds that are false by more than the reference is in doubt, held to or not.

    A solver's are kept with the solution, and read whatever its result is: they are to be true
    there too, as infinity and 0 are.
    """
    solution, doubt = truth.z, truth.doubt
    error = np.abs(np.asarray(z, LONG) / solution - 1)
    error = np.where(np.isnan(error), np.inf, error)  # of which only infinity is a bound
    lower, upper = (np.asarray(said[k], LONG) for k in ("lower", "upper"))
    claim = np.asarray(said["relative error"], LONG)
    asked = held if rtol is None else np.ones_like(held)
    least = np.max(error - doubt, -1)
    wrong = {
        "lower end": asked & np.any(~(lower <= solution * (1 + doubt)), -1),
        "upper end": asked & np.any(~(upper >= solution * (1 - doubt)), -1),
        "relative error": asked & ~(least <= claim),
    }
    if rtol is not None:
        wrong["tolerance"] = held & ~(least <= np.asarray(rtol, LONG) * (1 + 1e-6))
    any_wrong = np.any(list(wrong.values()), 0) & truth.known
    furthest = np.argsort(-np.where(any_wrong, least, -1))
    worst = [
        {
            "problem": int(j),
            "what": [what for what, at in wrong.items() if at[j]],
            "claimed": float(claim[j]),
            "true error": float(error[j].max()),
            "held": bool(held[j]),
        }
        for j in furthest[: min(_SHOWN, int(any_wrong.sum()))]
    ]
    return {
        "tried": int(truth.known.sum()),
        "held": int((held & truth.known).sum()),
        "unknown": int((~truth.known).sum()),
        "false": int(any_wrong.sum()),
        "worst": worst,
    }

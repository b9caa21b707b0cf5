"""Tightness of the bounds of `deqjax.certify`, and the cost of certified hard problems."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import deqjax

from bench.certificates.cells import SIGMAS, Batch, dense, images
from bench.problems import radius
from bench.rows import Row

DTYPES = ("float32", "float64")
SUCCESS = deqjax.RESULTS.successful

# Cell, rho(W), x: the design's ordinary cases, with x such that the true errors are about its own
# (4.2e-4, 7.3e-4 and 1.7e-5) where the batch-wide step falls below 1e-4; 64 examples of 80.
ORDINARY = (("tanh", 1.0, 0.065), ("relu6", 1.0, 0.13), ("sigmoid", 1.0, 0.25))
CELLS = ("tanh", "relu6", "sigmoid", "soft_sign")
RADII = (0.5, 0.999, 1.0, 1.01, 3.0)
SCALES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
STEP, MOST = 1e-4, 20_000  # of Picard


def by_step(fn: Callable, x: jax.Array, args: Any) -> jax.Array:
    """Picard from 0 until the step of the whole batch, relative to its size, is below STEP."""

    def go(carry):
        z, fz, k = carry
        return (jnp.linalg.norm(fz - z) >= STEP * jnp.linalg.norm(fz)) & (k < MOST)

    def step(carry):
        _, fz, k = carry
        return fz, fn(fz, args), k + 1

    zero = jnp.zeros_like(x)
    return jax.lax.while_loop(go, step, (zero, fn(zero, args), jnp.asarray(1)))[1]


def by_example(fn: Callable, x: jax.Array, args: Any) -> jax.Array:
    """Picard from 0 until each example meets a relative tolerance of STEP by itself."""
    solver = deqjax.FixedPointIteration(rtol=STEP, atol=0.0)
    options: Any = {"batched": True, "max_steps": MOST}
    return deqjax.fixed_point(fn, solver, jnp.zeros_like(x), args, **options).value


STOPS = {"batch": by_step, "example": by_example}
_find = jax.jit(lambda fn, stop, x, args: STOPS[stop](fn, x, args), static_argnums=(0, 1))


def tightness(batch: int, n: int, size: int, channels: int, seed: int, smoke: bool) -> list[Row]:
    grid = itertools.product(CELLS, RADII, SCALES)
    cases = ORDINARY[:2] if smoke else [*ORDINARY, *grid]
    rows = []
    for dtype in DTYPES:
        with jax.enable_x64(dtype == "float64"):
            for i, (name, rho, x) in enumerate(tqdm(cases, desc=f"tightness, {dtype}")):
                p = dense(name, rho, x, batch, n, dtype, seed)
                about = {"cell": name, "ordinary": i < len(ORDINARY), "W": rho, "x": x}
                rows += _rows(about, p, p.fn, p.x, p.args)
            for rho, x in itertools.product((1.0,) if smoke else RADII, (1e-1, 1e-3)):
                q = images("tanh", rho, x, min(batch, 8), size, channels, dtype, seed)
                about = {"cell": "convolution, tanh", "ordinary": False, "W": rho, "x": x}
                rows += _rows(about, q.written, _convolution, q.x, (q.cell, q.x))
    return rows


def _convolution(z, args):
    cell, x = args
    return jax.vmap(cell)(z, x)


def _rows(about: Row, p: Batch, fn: Callable, x: Any, args: Any) -> list[Row]:
    true_radius = float(np.median([radius(j) for j in p.jacobian[:8]]))
    rows = []
    for stop in STOPS:
        z = _find(fn, stop, jnp.asarray(x), args)
        c = deqjax.certify(fn, z, args, batched=True)
        true = p.error(np.asarray(z).reshape(p.x.shape)).astype(float)
        bound = np.asarray(c.relative_error, float)
        low, high = (np.asarray(end, float)[:8] for end in c.spectral_radius)
        found = {
            "dtype": z.dtype.name,
            "stop": stop,
            "true": float(true.max()),
            "bound": float(bound.max()),
            "products": [int(np.median(c.steps)), int(np.max(c.steps))],
            "radius": true_radius,
            "low": float(np.median(low)),
            "high": float(np.median(high)),
            "holds": float(np.mean(np.asarray(c.holds))),
            "false": int(np.sum(bound < true)),
        }
        rows.append(about | found | _ratios(bound, true))
    return rows


def _ratios(bound: np.ndarray, true: np.ndarray) -> Row:
    """Bound / error: of the largest, worst, median; NaN where Picard found z* to the last bit."""
    some = true > 0
    each = bound[some] / true[some] if np.any(some) else np.array([math.nan])
    ratio = float(bound.max() / true.max()) if np.any(some) else math.nan
    return {
        "ratio": ratio,
        "worst ratio": float(each.max()),
        "median ratio": float(np.median(each)),
    }


# Cell, rho(W), x, dtype, rtol, and whether rounding leaves room for that.
HARD = (
    ("relu6", 1.01, 1e-3, "float64", 1e-4, True),
    ("relu6", 1.01, 1e-3, "float64", 1e-8, True),
    ("relu6", 1.01, 1e-3, "float32", 1e-4, True),
    ("tanh", 1.0, 1e-4, "float64", 1e-4, True),
    ("tanh", 1.0, 1e-4, "float64", 1e-8, True),
    ("tanh", 1.0, 1e-4, "float32", 1e-2, True),
    ("tanh", 1.0, 1e-4, "float32", 1e-4, False),
)


def hard(batch: int, n: int, seed: int, smoke: bool) -> list[Row]:
    cases = HARD[-2:] if smoke else HARD
    return [_hard(batch, n, seed, *case) for case in tqdm(cases, desc="hard")]


def _hard(batch, n, seed, name, rho, x, dtype, rtol, possible) -> Row:
    with jax.enable_x64(dtype == "float64"):
        p = dense(name, rho, x, batch, n, dtype, seed)
        z0, tol = jnp.zeros_like(jnp.asarray(p.x)), jnp.asarray(rtol)  # traced: compiled once
        met = lambda sol: float(np.mean(np.asarray(sol.result == SUCCESS)))
        count = lambda sol: int(np.max(sol.stats["num_fn_evals"]))

        def run(solver, max_steps):
            return deqjax.fixed_point(p.fn, solver, z0, p.args, batched=True, max_steps=max_steps)

        top = SIGMAS[name].supremum
        sol = run(deqjax.PositiveConcaveSolver(rtol=tol, upper=top), 256)
        blind = run(deqjax.PositiveConcaveSolver(rtol=tol), 256)
        ends = run(deqjax.Bracketing(rtol=tol, upper=top), MOST)
        c, evaluations = _counted(p, sol.value)
        return {
            "cell": name,
            "W": rho,
            "x": x,
            "dtype": dtype,
            "rtol": rtol,
            "possible": possible,
            "certified": met(sol),
            "evaluations": count(sol),
            "certificate": [evaluations, int(np.max(c.steps)) + 2],
            "unbounded": float(np.mean(~np.asarray(c.holds))),
            "without upper": count(blind) if met(blind) == 1 else None,
            "true": float(p.error(sol.value).max()),
            "bound": float(np.max(np.asarray(c.relative_error, float))),
            "own bound": float(np.max(np.asarray(sol.stats["relative_error"], float))),
            "picard": p.steps(dtype, rtol, MOST),
            "bracketing": count(ends) if met(ends) == 1 else None,
        }


def _counted(p: Batch, z: jax.Array) -> tuple[deqjax.Enclosure, int]:
    """An enclosure, and the evaluations it took, counted as they happen."""
    calls = []

    def fn(z, args):
        jax.debug.callback(lambda: calls.append(1))
        return p.fn(z, args)

    # The count of roundings sees a callback as an unknown operation: 9 more than the longest sum.
    c = deqjax.certify(fn, z, p.args, batched=True, fan_in=z.shape[-1])
    jax.block_until_ready(c)
    jax.effects_barrier()
    # The two JVPs for the radius evaluate f as well, and are counted there.
    return c, len(calls) - 2

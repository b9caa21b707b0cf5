"""A problem in the company of others in a batch, which should not change a bit of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from bench.certificates.cells import Batch, dense
from bench.rows import Row

KEPT = 4  # the examples that stay, at the front
MINE, EASY, HARD = 0.065, 10.0, 1e-4  # sizes of x, with tanh and rho(W) = 1
MOST = 50_000


def mates(batch: int, n: int, seed: int) -> list[Row]:
    """Compares all that comes back for the examples kept, with easy mates and with hard ones."""
    rows = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            made = (dense("tanh", 1.0, x, batch, n, dtype, seed) for x in (MINE, EASY, HARD))
            mine, *mates = made
            steps = [p.steps("float64", 1e-8, MOST) for p in mates]
            results = [_both(mine, p) for p in mates]
            for name, (one, other) in zip(NAMES, zip(*results, strict=True), strict=True):
                pairs = list(zip(_leaves(one), _leaves(other), strict=True))
                same = lambda a, b: np.array_equal(_bits(a[:KEPT]), _bits(b[:KEPT]))
                counts = {
                    "arrays": len(pairs),
                    "differ": sum(not same(a, b) for a, b in pairs),
                    "steps": [int(np.max(r[1][KEPT:])) for r in (one, other)],
                    "steps kept": int(np.max(one[1][:KEPT])),
                }
                rows.append({"by": name, "dtype": dtype, "picard": steps} | counts)
    return rows


NAMES = ("certify", "PositiveConcaveSolver")


def _leaves(tree: Any) -> list[jax.Array]:
    """Arrays with an entry per example; `max_steps` is a number for all."""
    return [x for x in jax.tree.leaves(tree) if jnp.ndim(x) > 0]


def _bits(x: Any) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(x).tobytes(), np.uint8)


def _both(mine: Batch, mates: Batch) -> list[tuple[Any, Any]]:
    """`(all that comes back, steps)` of each of NAMES."""
    join = lambda a, b: jnp.concatenate([jnp.asarray(a[:KEPT]), jnp.asarray(b[KEPT:])])
    args = (jnp.asarray(mine.w), join(mine.x, mates.x))
    solution = join(*(p.solution.astype(p.x.dtype) for p in (mine, mates)))
    z = solution * jnp.asarray(1 + 1e-3, solution.dtype)
    c = deqjax.certify(mine.fn, z, args, batched=True)
    # Float32 proves 1e-2 of the hard ones.
    solver = deqjax.PositiveConcaveSolver(rtol=1e-2, upper=1.0)
    sol = deqjax.fixed_point(mine.fn, solver, jnp.zeros_like(z), args, batched=True)
    everything = (sol.value, sol.stats, sol.result._value)
    return [(c, c.steps), (everything, sol.stats["num_fn_evals"])]

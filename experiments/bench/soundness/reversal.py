"""Exact reversal in random programs: is any gradient lost?

The reference takes the steps of the integers in a loop of its own, in float64, all stored:

    Z[k+1] = sign floor(Z[k-1] / d) + round(beta f(z[k]) 2^b),        z[k] = Z[k] 2^-b

with the derivative of `s[k+1] = (1 - beta) s[k-1] + beta f(s[k])` at these z.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.rows import Row
from bench.soundness.cells import CELLS, Cell, Data, data
from bench.soundness.contexts import CONTEXTS, Along, Context, tangents
from bench.soundness.problem import EXAMPLES, STEPS, Problem
from bench.soundness.work import work

# 1 - beta = sign / d.
BETAS = {0.5: (2, 1), 0.8: (5, 1), 0.9: (10, 1), 1.2: (5, -1)}
# How far two programs may differ in rounding: hundreds of times what was seen in float32 and
# float64 (9e-7, 3e-16), four times in two bytes (5.6e-2 of a block with group norms in bfloat16).
# A gradient by states that are lost is off by 0.1 and more, or refused as NaN.
TOLERANCE = {"float32": 1e-4, "float64": 1e-11, "float16": 0.02, "bfloat16": 0.2}
_FRACTION = {"float64": 56}
_SMALL = 0.03  # of all gradients: what is smaller is measured by that
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def reversal(count: int, some: int | None, seed: int, workers: int) -> list[Row]:
    """`count` pairs of a cell and a context, as evenly as can be."""
    rng = np.random.default_rng([seed, 3])
    cells = range(len(CELLS)) if some is None else range(0, len(CELLS), -(-len(CELLS) // some))
    pairs = _pairs(rng, list(cells), list(CONTEXTS), count)
    tasks = [(i, [(name, int(rng.integers(2**31))) for k, name in pairs if k == i]) for i in cells]
    return [row for rows in work(_cell, tasks, workers) for row in rows]


def _pairs(rng, cells: list[int], contexts: list[str], count: int) -> list[tuple[int, str]]:
    """Pairs without repetition: each context in turn, with the cell that has had the fewest."""
    had, pairs = dict.fromkeys(cells, 0), []
    while len(pairs) < count:
        for name in rng.permutation(contexts):
            two = CONTEXTS[name].dtype in ("float16", "bfloat16")
            free = [i for i in cells if (i, name) not in pairs and (CELLS[i].half or not two)]
            if free and len(pairs) < count:
                order = sorted(free, key=lambda i: (had[i], rng.random()))
                pairs.append((order[0], str(name)))
                had[order[0]] += 1
    return pairs


def _cell(index: int, programs: list[tuple[str, int]]) -> list[Row]:
    cell, known, rows = CELLS[index], {}, []
    for name, seed in programs:
        context = CONTEXTS[name]
        beta = list(BETAS)[seed % len(BETAS)]
        arrays = data(cell, EXAMPLES, context.dtype, [seed])
        row = {"cell": cell.name, "context": name, "beta": beta, "seed": seed}
        rows.append(row | _judged(cell, context, beta, arrays, known))
        jax.clear_caches()
    return rows


def _judged(cell: Cell, context: Context, beta: float, arrays: Data, known: dict) -> Row:
    try:
        with jax.enable_x64(context.dtype == "float64"):
            stored = jax.tree.map(lambda v: jnp.asarray(v, jnp.dtype(context.dtype)), arrays)
            p = Problem(cell.fn, beta, *stored)
            *out, steps = context.take(p)
            out = jax.tree.map(lambda v: np.asarray(v).astype(float), out)
    except Exception as error:  # whatever it is, there is no gradient
        return {"error": math.inf, "lost": True, "said": f"{type(error).__name__}: {error}"[:300]}
    with jax.enable_x64(True):
        truth = _truth(cell, beta, arrays, steps, _FRACTION.get(context.dtype, 24), known)
    if isinstance(out[0], Along):
        at = (arrays.w, arrays.x[0], arrays.z0[0])
        dots = jax.tree.map(lambda a, b: float(np.sum(np.asarray(a) * b)), tangents(at), truth)
        truth = [sum(jax.tree.leaves(d)) for d in dots]
        out = [float(v) for v in out[0].values]
    error = _error(out, truth)
    lost = not error <= TOLERANCE["bfloat16" if cell.coarse else context.dtype]
    return {"error": error, "lost": lost, "steps": np.asarray(steps).tolist(), "said": ""}


def _truth(cell: Cell, beta: float, arrays: Data, steps: np.ndarray, bits: int, known: dict):
    """Cotangents of (w, x, z0): summed over as many examples as there are steps."""
    d, sign = BETAS[beta]
    numbers = (np.int64(d), np.int64(sign), np.float64(2.0**bits))
    every = np.resize(steps, EXAMPLES).astype(np.int64)
    if not known:
        take = jax.jit(jax.vmap(_reference(cell), (None, 0, 0, 0, 0, None)))
        lowered = take.lower(*arrays, every, numbers)
        known["reference"] = lowered.compile(compiler_options=_QUICK)
    w, x, z0 = jax.tree.map(np.asarray, known["reference"](*arrays, every, numbers))
    count = len(steps)
    return jax.tree.map(lambda v: v[:count].sum(0), w), x[:count], z0[:count]


def _reference(cell: Cell):
    def value(w, x, z0, steps, numbers):
        d, sign, scale = numbers
        beta = 1 - sign / d
        integers = lambda v: jnp.round(jax.lax.stop_gradient(v) * scale).astype(jnp.int64)
        # Rounding has no derivative of its own.
        passed = lambda z, s: s + jax.lax.stop_gradient(z.astype(s.dtype) / scale - s)

        def step(state, k):
            before, now, s_before, s = state
            fs = cell.fn(s, w, x)
            after = sign * (before // d) + integers(beta * fs)
            new = (now, after, s, passed(after, (1 - beta) * s_before + beta * fs))
            return jax.tree.map(lambda a, b: jnp.where(k < steps, a, b), new, state), None

        start, s = integers(z0), passed(integers(z0), z0)
        return jax.lax.scan(step, (start, start, s, s), jnp.arange(STEPS))[0][3]

    def cotangents(w, x, z0, g, steps, numbers):
        _, pull = jax.vjp(lambda w, x, z0: value(w, x, z0, steps, numbers), w, x, z0)
        return pull(g)

    return cotangents


def _error(out: Any, truth: Any) -> float:
    """The largest of an array, relative to its size; infinite where it is not finite."""
    norm = lambda v: float(np.linalg.norm(np.asarray(v, float).ravel()))
    right = [b for mine, b in zip(out, truth, strict=True) if mine is not None]
    mine = jax.tree.leaves([a for a in out if a is not None])
    pairs = list(zip(mine, jax.tree.leaves(right), strict=True))
    total = math.sqrt(sum(norm(b) ** 2 for _, b in pairs))
    errors = [norm(a - b) / max(norm(b), _SMALL * total) for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf

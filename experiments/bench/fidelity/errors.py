"""Errors of a gradient against float64 autodiff, and what the reversal misses."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from bench.blocks import Cell
from bench.gradients import gradient
from bench.rows import Row
from bench.ways import OF_THE_FIXED_POINT, PER_CHANNEL, TITLES, Method


def errors(
    cells: Iterable[Cell],
    inverses: Sequence[int],
    dtypes: Sequence[str],
    depths: Sequence[int],
    methods: Sequence[Method] = tuple(TITLES),
    *,
    channels: bool = False,
) -> list[Row]:
    """One row for each cell, dtype, 1 - beta = 1/d, method and number of evaluations.

    `channels`: and for a 1 - beta per channel.
    """
    max_steps = max(depths)  # a traced budget below it: each method is compiled once for all
    rows: list[Row] = []
    for cell in tqdm(list(cells), desc="errors", unit="cell"):
        reference = _compile("checkpointed", cell, max_steps, wide=True)
        for dtype in dtypes:
            rounded = cell.astype(dtype)
            with jax.enable_x64(True):
                exactly = rounded.astype(float)
            # Their beta doesn't enter the gradient, and one that is traced saves compilation.
            shared = {m: _compile(m, rounded, max_steps) for m in OF_THE_FIXED_POINT}
            inside: list[Any] = [(d, d) for d in inverses]
            inside += [(PER_CHANNEL, per_channel(cell))] * channels
            for d, inverse in inside:
                truth = {n: reference(exactly, inverse, n)[0] for n in depths}
                for method in methods:
                    fixed = None if d == PER_CHANNEL else d
                    run = shared.get(method) or _compile(method, rounded, max_steps, d=fixed)
                    for n in depths:
                        found, residual, guard = run(rounded, inverse, n)
                        about = {"cell": cell.name, "dtype": dtype, "d": d, "method": method}
                        result = {"error": relative(found, truth[n]), "residual": residual}
                        result |= {"guard": guard}
                        rows.append({**about, "evaluations": n, **result})
    return rows


def per_channel(cell: Cell) -> np.ndarray:
    """1 / (1 - beta) with 1 - beta = n / 64, n spread from 1 to 63 over the channels."""
    return 64 / np.round(np.linspace(1, 63, cell.z0.shape[-1]))


def _compile(
    method: Method, like: Cell, max_steps: int, *, wide: bool = False, d: int | None = None
) -> Callable[[Cell, int, int], tuple[np.ndarray, float, float]]:
    """`(cell, d, steps) -> (gradient as one vector, residual, guard)`; d is traced if not given."""

    @jax.jit
    def run(z0, args, cotangent, inverse, steps):
        cell = like._replace(z0=z0, args=args, cotangent=cotangent)
        return gradient(method, cell, inverse if d is None else d, max_steps, steps)

    wide = wide or method == "float64 state"

    def call(cell: Cell, inverse: int, steps: int) -> tuple[np.ndarray, float, float]:
        with jax.enable_x64(wide):
            budget = jnp.asarray(steps, jnp.int32)
            traced = jnp.asarray(inverse, float)
            found, residual, guard = run(cell.z0, cell.args, cell.cotangent, traced, budget)
            return vector(found), float(residual), float(guard)

    return call


def vector(tree: PyTree) -> np.ndarray:
    """All numbers of a gradient."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def relative(found: np.ndarray, truth: np.ndarray) -> float:
    """Relative, in the Euclidean norm over parameters and input together."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))

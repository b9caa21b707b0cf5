"""Memory that a gradient takes: temporary, of the compiled program; residuals of the solve."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Literal
from tqdm import tqdm

from bench.blocks import Cell
from bench.digits import digit_bytes, guard_bytes
from bench.gradients import solve, solver, value_and_grad
from bench.rows import Row
from bench.timing import compiled, temporary_bytes
from bench.ways import Method


def shapes(cell: Cell) -> tuple[Any, Any, Any]:
    """`(z0, args, cotangent)` without their values."""
    return jax.eval_shape(lambda: (cell.z0, cell.args, cell.cotangent))


def memory(
    cells: Sequence[Cell], depths: tuple[int, int], d: int, methods: Sequence[Method]
) -> list[Row]:
    """Temporary bytes of value-and-gradient, compiled for each of two numbers of evaluations."""
    rows = []
    for cell, method in tqdm(list(itertools.product(cells, methods)), desc="memory"):
        row: Row = {"cell": cell.name, "d": d, "method": method, "evaluations": list(depths)}
        guard = [cell.z0.size * guard_bytes(solver("exact", d), cell, n) for n in depths]
        row |= {"guard": guard}
        with jax.enable_x64(method == "float64 state"):
            programs = [compiled(value_and_grad(method, cell, d, n), *shapes(cell)) for n in depths]
        row["bytes"] = [temporary_bytes(program) for program in programs]
        state_bytes = cell.z0.size * cell.z0.dtype.itemsize
        rows.append(row | {"states": [round(x / state_bytes, 2) for x in row["bytes"]]})
    return rows


def residuals(cells: Sequence[Cell], inverses: Sequence[int], depths: Sequence[int]) -> list[Row]:
    """Bytes that the exact mode keeps from the forward to the backward pass.

    Counted in the traced program: every array that `jax.vjp` of the solve hands on and that isn't
    one of its inputs. `per_element` is of arrays at least as large as the state; `other` is the
    rest, counters and constants.
    """
    rows = []
    cases = list(itertools.product(cells, inverses, depths))
    for cell, d, n in tqdm(cases, desc="residuals"):
        kept = [(x.size >= cell.z0.size, x.size * x.dtype.itemsize) for x in _kept(cell, d, n)]
        large, other = (
            sum(size for is_large, size in kept if is_large == k) for k in (True, False)
        )
        bound = 8 + digit_bytes(solver("exact", d), d, cell, n)
        about = {"cell": cell.name, "d": d, "evaluations": n}
        rows.append({**about, "per_element": large / cell.z0.size, "bound": bound, "other": other})
    return rows


def _kept(cell: Cell, d: int, max_steps: int) -> list[Any]:
    def forward(z0, args):
        value = lambda z0, args: solve("exact", cell._replace(z0=z0, args=args), d, max_steps)
        return jax.vjp(value, z0, args)[1]

    program = jax.make_jaxpr(forward)(*shapes(cell)[:2]).jaxpr
    inputs = {*program.invars, *program.constvars}
    kept = [v for v in program.outvars if not isinstance(v, Literal)]
    return [v.aval for v in dict.fromkeys(kept) if v not in inputs]  # each array once

"""Bytes of the digits that an exact reversal writes down, per entry of the state."""

import math

import jax
from jaxtyping import Array

import deqjax

from bench.blocks import Args, Cell


def digits_per_word(d: int) -> int:
    """The most base-|d| digits that 32 bits hold."""
    return max(m for m in range(1, 33) if abs(d) ** m <= 2**32)


def digit_bytes(solver: deqjax.Reversible, d: int, cell: Cell, evaluations: int) -> int:
    """Remainders of divisions by d, and guard digits."""
    remainders = 4 * math.ceil(evaluations / digits_per_word(d))
    return remainders + guard_bytes(solver, cell, evaluations)


def guard_bytes(solver: deqjax.Reversible, cell: Cell, evaluations: int) -> int:
    """Guard digits, as many as suit f: in bytes, or in two."""
    found = []

    def read(z0: Array, args: Args) -> None:
        prepared = solver.prepared(lambda z, args: (cell.fn(z, args), None), z0, args, 1)
        found.append(prepared.grid.guard)

    jax.eval_shape(read, cell.z0, cell.args)
    (bits,) = found
    return 2 * evaluations if bits > 8 else math.ceil(evaluations / (8 // bits)) if bits else 0

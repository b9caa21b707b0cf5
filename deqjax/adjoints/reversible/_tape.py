"""The record of the forward loop, from which the reversible iteration runs backwards.

Step i goes from `s[i-1], s[i]` to `s[i+1]`. A tape is a pytree like the state; its leaves have an
axis of rows after the batch axes.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..._iterate import AbstractTape
from ..._tree import max_abs, per_problem, select, widen
from ...solvers._grid import Grid


class Digits(AbstractTape):
    """The remainders that the divisions of the exact mode drop, packed in 32-bit words."""

    grid: Grid

    @property
    def isolated(self):
        return True

    def blank(self, pair, max_steps, rank):
        words = -(-max_steps // self.grid.per_word)
        return jax.tree.map(lambda x: _rows(x, words, rank, jnp.uint32), pair[0])

    def push(self, tape, i, go, pair):
        d, k = np.uint32(self.grid.d), i // self.grid.per_word

        def leaf(tape, before):
            word = _row(tape, k, go.ndim)
            new = word * d + self.grid.divide(before)[1]
            return _set_row(tape, k, select(go, new, word), go.ndim)

        return jax.tree.map(leaf, tape, pair[0])

    def words(self, tape, rank):
        return jax.tree.map(lambda x: _row(x, jnp.asarray(0), rank), tape)

    def undo(self, solver, tape, words, i, first, pair, fy, start, rank):
        d, m = np.uint32(self.grid.d), self.grid.per_word
        stored = jax.tree.map(lambda x: _row(x, i // m, rank), tape)
        # A word is read when its last digit is needed, and used up down to its first.
        words = select(first | (i % m == m - 1), stored, words)
        digits = jax.tree.map(lambda x: x % d, words)
        words = jax.tree.map(lambda x: x // d, words)
        before = per_problem(lambda *a: solver.unmix(*a), rank)(pair[1], fy, digits)
        return before, words, jnp.asarray(0, jnp.float32)

    def final_gap(self, pair, start, rank):
        return per_problem(self._gap, rank)(pair, (start, start))

    def _gap(self, a: PyTree, b: PyTree) -> Float[Array, ""]:
        """The largest difference; 0 if and only if all integers are equal."""
        unit = 2.0**-self.grid.bits
        size = lambda a, b: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)) * unit
        gap = lambda a, b: jnp.where(a == b, 0, jnp.maximum(size(a, b), unit))
        return max_abs(jax.tree.map(gap, a, b))

    def bound(self, z0):
        return 0.0


class Segments(AbstractTape):
    """Every `length`-th pair of states of the floating-point mode; `None`: only z0."""

    length: int | None = eqx.field(static=True)

    @property
    def isolated(self):
        return False

    def blank(self, pair, max_steps, rank):
        if self.length is None:
            return None
        rows = -(-max_steps // self.length)
        return jax.tree.map(lambda x: _rows(x, 2 * rows, rank, x.dtype), pair[0])

    def push(self, tape, i, go, pair):
        if self.length is None:
            return tape
        here, k = i % self.length == 0, 2 * (i // self.length)

        def leaf(tape, *pair):
            for slot, x in enumerate(pair):
                row = jnp.where(here, x, _row(tape, k + slot, go.ndim))
                tape = _set_row(tape, k + slot, row, go.ndim)
            return tape

        return jax.tree.map(leaf, tape, *pair)

    def undo(self, solver, tape, words, i, first, pair, fy, start, rank):
        del first
        raw = per_problem(lambda s, *a: s.unmix(*a), rank)(solver, pair[1], fy)
        if self.length is None:
            known, stored = i < 2, start
        else:
            first, second = i % self.length == 0, (i - 1) % self.length == 0
            k = jnp.where(first, 2 * (i // self.length), 2 * ((i - 1) // self.length) + 1)
            known = first | second
            stored = jax.tree.map(lambda x: _row(x, jnp.maximum(k, 0), rank), tape)
        gap = jnp.where(known, per_problem(_relative_gap, rank)(raw, stored, pair), 0)
        # A known state replaces the reversed one, where reversal has amplified rounding the most.
        return jax.tree.map(lambda a, b: jnp.where(known, a, b), stored, raw), words, gap

    def final_gap(self, pair, start, rank):
        return jnp.asarray(0, jnp.float32)

    def bound(self, z0):
        return math.inf if self.length is None else 10 * math.sqrt(_unit(z0))


def _relative_gap(a: PyTree, b: PyTree, scale: PyTree) -> Float[Array, ""]:
    size = max_abs(scale)
    gap = max_abs(jax.tree.map(lambda a, b: widen(a) - widen(b), a, b)).astype(size.dtype)
    return (gap / jnp.where(size == 0, 1, size)).astype(jnp.float32)


def _unit(z0: PyTree) -> float:
    """The unit roundoff of the least precise leaf."""
    return max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(z0))


def segment_length(beta: Any, z0: PyTree) -> int:
    """Steps that lose half of the digits of `z0`: `(1 / |1 - beta|)^k = u^(-1/2)`, at least 1.

    u is the unit roundoff. For an array as beta, `|1 - beta|` is assumed to be at least 1/10.
    """
    shrink = 0.1 if eqx.is_array(beta) else abs(1 - beta)
    return max(1, int(math.log(_unit(z0)) / 2 / math.log(shrink)))


def _rows(x: Array, rows: int, rank: int, dtype: Any) -> Array:
    return jnp.zeros((*x.shape[:rank], rows, *x.shape[rank:]), dtype)


def _row(x: Array, k: Int[Array, ""], rank: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, k, rank, keepdims=False)


def _set_row(x: Array, k: Int[Array, ""], row: Array, rank: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, row, k, rank)

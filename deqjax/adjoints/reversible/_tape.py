"""The record of the forward loop, from which the reversible iteration runs backwards.

Step i goes from `s[i-1], s[i]` to `s[i+1]`. A tape is a pytree like the state; its leaves have an
axis of rows after the batch axes.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..._step import AbstractTape, Mismatch
from ..._tree import max_abs, per_problem, select, widen
from ...solvers._grid import Grid
from ...solvers._retention import is_number


class _Stream(NamedTuple):
    """Numbers below `base`, one per step, packed in words."""

    base: int
    per_word: int
    dtype: Any

    def blank(self, like: PyTree, max_steps: int, rank: int) -> PyTree:
        words = -(-max_steps // self.per_word)
        return jax.tree.map(lambda x: _rows(x, words, rank, self.dtype), like)

    def push(
        self, tape: PyTree, i: Int[Array, ""], go: Bool[Array, "..."], digit: PyTree
    ) -> PyTree:
        k, rank = i // self.per_word, go.ndim

        def leaf(tape, digit):
            digit = digit.astype(self.dtype)
            if self.per_word == 1:  # a problem that does not go has no use for this row
                return _set_row(tape, k, digit, rank)
            word = _row(tape, k, rank)
            new = word * self.dtype(self.base) + digit
            return _set_row(tape, k, select(go, new, word), rank)

        return jax.tree.map(leaf, tape, digit)

    def pop(
        self, tape: PyTree, words: PyTree, i: Int[Array, ""], first: Bool[Array, "..."], rank: int
    ) -> tuple[PyTree, PyTree]:
        """The digit of step i, and the words without it."""
        stored = jax.tree.map(lambda x: _row(x, i // self.per_word, rank), tape)
        if self.per_word == 1:
            return stored, None
        # A word is read when its last digit is needed, and used up down to its first.
        words = select(first | (i % self.per_word == self.per_word - 1), stored, words)
        base = self.dtype(self.base)
        return jax.tree.map(lambda x: x % base, words), jax.tree.map(lambda x: x // base, words)


class Digits(AbstractTape):
    """The remainders that the divisions of the exact mode drop, and the guard digits."""

    grid: Grid

    @property
    def isolated(self):
        return self.grid.guard == 0

    @property
    def _streams(self) -> list[_Stream]:
        guard = self.grid.guard
        rests = _Stream(self.grid.d, self.grid.per_word, np.uint32)
        # Small words: a digit of more than 4 bits has one to itself, and is stored as it is.
        bits, dtype = (8, np.uint8) if guard <= 8 else (16, np.uint16)
        return [rests, _Stream(2**guard, bits // guard, dtype)] if guard else [rests]

    def blank(self, pair, max_steps, rank):
        return [s.blank(pair[0], max_steps, rank) for s in self._streams]

    def push(self, solver, tape, i, go, pair, after):
        digits = per_problem(lambda s, *at: s.digits(*at), go.ndim)(solver, pair[0], after[1])
        digits = digits[: len(tape)]  # without guard digits, remainders alone
        return [s.push(t, i, go, x) for s, t, x in zip(self._streams, tape, digits, strict=True)]

    def words(self, tape, rank):
        first = lambda x: _row(x, jnp.asarray(0), rank)
        # A digit that has its word for itself is read off the tape.
        carried = [s.per_word > 1 for s in self._streams]
        return [jax.tree.map(first, t) if c else None for t, c in zip(tape, carried, strict=True)]

    def undo(self, solver, tape, words, i, first, pair, fy, start, rank):
        popped = [
            s.pop(t, w, i, first, rank) for s, t, w in zip(self._streams, tape, words, strict=True)
        ]
        rest, guard = [*(digit for digit, _ in popped), None][:2]
        undo = per_problem(lambda s, *at: s.undo(*at), rank)
        before, fits, share = undo(solver, pair[1], fy, rest, guard)
        gap = jnp.where(fits, 0, jnp.inf).astype(jnp.float32)
        return before, [words for _, words in popped], Mismatch(gap, share)

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

    def push(self, solver, tape, i, go, pair, after):
        del solver, after
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
        before = jax.tree.map(lambda a, b: jnp.where(known, a, b), stored, raw)
        return before, words, Mismatch(gap, jnp.zeros_like(gap))

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
    shrink = abs(1 - beta) if is_number(beta) else 0.1
    return max(1, int(math.log(_unit(z0)) / 2 / math.log(shrink)))


def _rows(x: Array, rows: int, rank: int, dtype: Any) -> Array:
    return jnp.zeros((*x.shape[:rank], rows, *x.shape[rank:]), dtype)


def _row(x: Array, k: Int[Array, ""], rank: int) -> Array:
    return jax.lax.dynamic_index_in_dim(x, k, rank, keepdims=False)


def _set_row(x: Array, k: Int[Array, ""], row: Array, rank: int) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, row, k, rank)

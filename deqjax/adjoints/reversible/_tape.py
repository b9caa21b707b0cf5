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
from jaxtyping import Array, Float, PyTree, UInt

from ..._step import AbstractTape, Mismatch
from ..._tree import max_abs, per_problem, select, widen
from ...solvers._grid import Grid
from ...solvers._retention import is_number
from ._stream import Stream, blank_rows, get_row, set_row


class _Tape(NamedTuple):
    digits: list[PyTree]
    sums: UInt[Array, "... rows"] | None  # the checksum of the pair before each of the last steps


class Digits(AbstractTape):
    """The remainders that the divisions of the exact mode drop, and the guard digits."""

    last: int | None = eqx.field(static=True)
    grid: Grid

    @property
    def isolated(self):
        return self.grid.guard == 0

    @property
    def _streams(self) -> list[Stream]:
        guard, last = self.grid.guard, self.last
        rests = Stream(self.grid.d, self.grid.per_word, np.uint32, last)
        # Small words: a digit of more than 4 bits has one to itself, and is stored as it is.
        bits, dtype = (8, np.uint8) if guard <= 8 else (16, np.uint16)
        return [rests, Stream(2**guard, bits // guard, dtype, last)] if guard else [rests]

    @property
    def _sums(self) -> Stream:
        return Stream(2**32, 1, np.uint32, self.last)

    def blank(self, pair, max_steps, rank):
        digits = [s.blank(pair[0], max_steps, rank) for s in self._streams]
        if self.last is None:
            return _Tape(digits, None)
        return _Tape(digits, self._sums.blank(_checksums(pair, rank), max_steps, rank))

    def push(self, solver, tape, i, go, pair, after):
        digits = per_problem(lambda s, *at: s.digits(*at), go.ndim)(solver, pair[0], after[1])
        digits = digits[: len(tape.digits)]  # without guard digits, remainders alone
        streams = zip(self._streams, tape.digits, digits, strict=True)
        digits, sums = [s.push(t, i, go, x) for s, t, x in streams], tape.sums
        if sums is not None:
            sums = self._sums.push(sums, i, go, _checksums(pair, go.ndim))
        return _Tape(digits, sums)

    def words(self, tape, rank):
        first = lambda x: get_row(x, jnp.asarray(0), rank)
        # A digit that has its word for itself is read off the tape.
        both = zip(self._streams, tape.digits, strict=True)
        return [jax.tree.map(first, t) if s.per_word > 1 else None for s, t in both]

    def undo(self, solver, tape, words, i, first, pair, fy, start, rank):
        streams = zip(self._streams, tape.digits, words, strict=True)
        popped = [s.pop(t, w, i, first) for s, t, w in streams]
        rest, guard = [*(digit for digit, _ in popped), None][:2]
        undo = per_problem(lambda s, *at: s.undo(*at), rank)
        before, fits, share = undo(solver, pair[1], fy, rest, guard)
        gap = jnp.where(fits, 0, jnp.inf).astype(jnp.float32)
        return before, [words for _, words in popped], Mismatch(gap, share)

    def final_gap(self, tape, num_steps, pair, start):
        rank = num_steps.ndim
        gap = per_problem(self._gap, rank)(pair, (start, start))
        if self.last is None:
            return gap
        # The state before the last steps is known by its checksum alone.
        same = get_row(tape.sums, jnp.maximum(num_steps - self.last, 0), rank)
        same = same == _checksums(pair, rank)
        return jnp.where(num_steps > self.last, jnp.where(same, 0, jnp.inf), gap)

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

    last: int | None = eqx.field(static=True)
    length: int | None = eqx.field(static=True)

    @property
    def isolated(self):
        return False

    def blank(self, pair, max_steps, rank):
        if self.length is None:
            return None
        rows = -(-max_steps // self.length)
        if self.last is not None:
            rows = min(rows, self.last // self.length + 1)
        return jax.tree.map(lambda x: blank_rows(x, 2 * rows, rank, x.dtype), pair[0])

    def push(self, solver, tape, i, go, pair, after):
        del solver, after
        if self.length is None:
            return tape
        here, k = go & (i % self.length == 0), 2 * (i // self.length)

        def leaf(tape, *pair):
            for slot, x in enumerate(pair):
                row = select(here, x, get_row(tape, k + slot, go.ndim))
                tape = set_row(tape, k + slot, row, go.ndim)
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
            stored = jax.tree.map(lambda x: get_row(x, jnp.maximum(k, 0), rank), tape)
        gap = jnp.where(known, per_problem(_relative_gap, rank)(raw, stored, pair), 0)
        # A known state replaces the reversed one, where reversal has amplified rounding the most.
        return select(known, stored, raw), words, Mismatch(gap, jnp.zeros_like(gap))

    def final_gap(self, tape, num_steps, pair, start):
        return jnp.asarray(0, jnp.float32)

    def bound(self, z0):
        return math.inf if self.length is None else 10 * math.sqrt(_unit(z0))


def _checksums(pair: PyTree, rank: int) -> UInt[Array, "..."]:
    return per_problem(_checksum, rank)(pair)


def _checksum(pair: PyTree) -> UInt[Array, ""]:
    """A hash of the integers of one problem; another state has the same one in 1 of 2^32 cases.

    An integer sum does not depend on the order of its terms, in which devices may add. The entries
    go through the mixer of MurmurHash3 first, so that errors with a common factor do not cancel.
    """
    total, count = jnp.uint32(0), 0
    for x in jax.tree.leaves(pair):
        h = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        place = jnp.arange(count, count + h.size, dtype=jnp.uint32)
        total, count = total + jnp.sum(h * (2 * place + 1), dtype=jnp.uint32), count + h.size
    return total


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

"""Rows of a tape, each of one step or of several; a tape of the last steps writes over older rows.

The rows are an axis after the problem axes; row k lies at place `k mod rows`. Where k has an entry
per problem, each problem reads its own row.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ..._tree import per_problem, select


def blank_rows(x: Shaped[Array, "..."], rows: int, rank: int, dtype: Any) -> Shaped[Array, "..."]:
    """Rows like x, of zeros."""
    return jnp.zeros((*x.shape[:rank], rows, *x.shape[rank:]), dtype)


def get_row(x: Shaped[Array, "..."], k: Int[Array, "..."], rank: int) -> Shaped[Array, "..."]:
    """Row k of x."""
    k = k % x.shape[rank]
    if not k.ndim:
        return jax.lax.dynamic_index_in_dim(x, k, rank, keepdims=False)
    one = lambda x, k: jax.lax.dynamic_index_in_dim(x, k, 0, keepdims=False)
    return per_problem(one, rank)(x, k)


def set_row(
    x: Shaped[Array, "..."], k: Int[Array, ""], row: Shaped[Array, "..."], rank: int
) -> Shaped[Array, "..."]:
    """x with another row k."""
    return jax.lax.dynamic_update_index_in_dim(x, row, k % x.shape[rank], rank)


class Stream(NamedTuple):
    """Numbers below `base`, one per step, packed in words."""

    base: int
    per_word: int
    dtype: Any
    last: int | None  # the number of steps that it keeps at least; None: all

    def blank(self, like: PyTree, max_steps: int, rank: int) -> PyTree:
        """The stream before the first step, for numbers like those of `like`."""
        words = -(-max_steps // self.per_word)
        if self.last is not None:  # the last steps may begin and end within a word
            words = min(words, (self.last - 2) // self.per_word + 2)
        return jax.tree.map(lambda x: blank_rows(x, words, rank, self.dtype), like)

    def push(
        self, tape: PyTree, i: Int[Array, ""], go: Bool[Array, "..."], digit: PyTree
    ) -> PyTree:
        """The stream with a number for step i, of the problems that `go`."""
        k, rank = i // self.per_word, go.ndim

        def leaf(tape, digit):
            new = digit.astype(self.dtype)
            if self.per_word == 1 and self.last is None:  # a stopped problem has no use for the row
                return set_row(tape, k, new, rank)
            word = get_row(tape, k, rank)
            if self.per_word > 1:
                begun = jnp.where(i % self.per_word == 0, 0, word)  # or an older word is there
                new = begun * self.dtype(self.base) + new
            return set_row(tape, k, select(go, new, word), rank)

        return jax.tree.map(leaf, tape, digit)

    def pop(
        self, tape: PyTree, words: PyTree, i: Int[Array, "..."], first: Bool[Array, "..."]
    ) -> tuple[PyTree, PyTree]:
        """The number of step i, and the words without it."""
        stored = jax.tree.map(lambda x: get_row(x, i // self.per_word, first.ndim), tape)
        if self.per_word == 1:
            return stored, None
        # A word is read when its last digit is needed, and used up down to its first.
        words = select(first | (i % self.per_word == self.per_word - 1), stored, words)
        base = self.dtype(self.base)
        return jax.tree.map(lambda x: x % base, words), jax.tree.map(lambda x: x // base, words)

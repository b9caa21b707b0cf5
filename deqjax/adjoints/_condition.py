"""Error estimates for the solution of a linear equation: Hager and Higham's, by solves alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PyTree

from .._tree import (
    cast,
    flat,
    lincomb,
    mesh_axes,
    per_problem,
    quotient,
    select,
    unflat,
    unify,
    vary,
    widen,
)

LinearMap = Callable[[PyTree], PyTree]
# `(b, transpose) -> (y, stats)` with A y = b, or A^T y = b.
Solve = Callable[[PyTree, bool], tuple[PyTree, dict[str, Any]]]

# The columns tried after two vectors that are none; Higham's own limit is 5, usually 2 suffice.
_COLUMNS = 4
# A solve with a larger residual says nothing; the value of any other solve is measured.
_USABLE = 0.1
# The part that a solve misses may be the direction that is amplified, by up to the condition.
_TELLING = 1e-3
# Three samples of |J^T| |y|, by products with pseudo-random signs, and three of its effect.
_SEEDS = (1009, 2003, 3001)


class _Carry(NamedTuple):
    i: Array
    x: PyTree
    best: Inexact[Array, "..."]
    done: Array


def one_norm_of_inverse(
    solve: Solve, matvec: LinearMap, like: PyTree, rank: int
) -> Inexact[Array, "..."]:
    """`||A^-1||_1` of each problem: the largest `||u||_1 / ||A u||_1` over the u that are tried.

    Hager's walk from column to column of A^-1, by solves with A and its transpose. Infinite if a
    solve fails.
    """
    norm = per_problem(lambda x: jnp.sum(jnp.abs(flat(x, 0))), rank)

    def body(c: _Carry) -> _Carry:
        u, stats = solve(cast(c.x, like), False)
        value = quotient(norm(u), norm(matvec(u)))
        value = jnp.where(stats["residual"] <= _USABLE, value, jnp.inf)
        # The column in which the norm grows fastest from here.
        slope, _ = solve(jax.tree.map(lambda u: jnp.where(u < 0, -1, 1).astype(u.dtype), u), True)
        column = per_problem(_largest, rank)(slope)
        x = select(jnp.broadcast_to(c.i > 0, value.shape), column, _even(like))
        # The first two vectors are fixed; after them, stop when the norm does not grow.
        better = value > c.best
        best = jnp.where(better & ~c.done, value, c.best)
        done = c.done | ((c.i > 1) & ~better) | ~(value < jnp.inf)
        return vary(_Carry(c.i + 1, x, best, done), mesh_axes(like))

    zero = norm(jax.tree.map(lambda x: jnp.zeros_like(widen(x)), like))
    first = per_problem(_alternating, rank)(like)
    start = vary(_Carry(jnp.asarray(0), first, zero, zero > 0), mesh_axes(like))
    going = lambda c: (c.i < _COLUMNS + 2) & ~jnp.all(c.done)
    return jax.lax.while_loop(going, body, start).best


def error_estimate(
    solve: Solve, transposed: LinearMap, y: PyTree, g: PyTree, rank: int
) -> Inexact[Array, "..."]:
    """The error of y in `A^T y = g`, per problem: the worst leaf's `max |y - y*| / max |y*|`.

    With the residual `r = g - A^T y`, y misses the solution by `A^-T r`. Here, r is known up to
    rounding, about `u (|y| + |g| + |J^T| |y|)` with random signs, u half of eps. So one solve is
    for the computed r, and others are for its rounding. The estimate is infinite if a solve fails,
    or if y may be all error.
    """
    # The computed residual, and samples of its rounding.
    unit = [float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(y)]
    unit = jax.tree.unflatten(jax.tree.structure(y), unit)
    residual = jax.tree.map(lambda g, a: widen(g) - widen(a), g, transposed(y))
    noise = jax.tree.map(lambda y, g, u: u * (jnp.abs(widen(y)) + jnp.abs(widen(g))), y, g, unit)
    for seed in _SEEDS:
        v = jax.tree.map(lambda y, u, seed=seed: u * _signs(y, seed) * y, y, unit)
        image = lincomb(1, v, -1, transposed(v))
        noise = jax.tree.map(lambda n, i: jnp.maximum(n, jnp.abs(widen(i))), noise, image)
    noises = [jax.tree.map(lambda n, s=s: _signs(n, s + 1) * n, noise) for s in _SEEDS]
    sides = jax.tree.map(lambda *x: jnp.stack(x), residual, *noises)

    def sizes(x):
        return jnp.stack(unify([jnp.max(jnp.abs(widen(x)), initial=0) for x in jax.tree.leaves(x)]))

    def one(b):
        d, stats = solve(cast(b, y), True)
        size = per_problem(sizes, rank)(d)
        usable = (stats["residual"] <= _TELLING)[..., None]
        return jnp.where(jnp.broadcast_to(usable, size.shape), size, jnp.inf)

    # The errors that these cause, against the least size of the solution.
    missed = jax.lax.map(one, sides)
    missed = missed[0] + jnp.max(missed[1:], 0)
    size = per_problem(sizes, rank)(y)
    true = size - missed  # at most the size of the solution
    ratio = jnp.where(true > 0, missed / jnp.where(true > 0, true, 1), jnp.inf)
    ratio = jnp.where(missed == 0, 0, ratio)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.nan, ratio), -1)


def _signs(x: Array, seed: int) -> Array:
    """Pseudo-random signs 1 and -1."""
    bits = (jnp.arange(x.size, dtype=jnp.uint32) + jnp.uint32(seed)) * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return jnp.where(bits >> 16 & 1, 1, -1).astype(x.dtype).reshape(x.shape)


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(widen, tree)


def _largest(tree: PyTree) -> PyTree:
    """The unit vector of the largest entry."""
    sizes = jnp.abs(flat(tree, 0))
    unit = (jnp.arange(sizes.size) == jnp.argmax(sizes)).astype(sizes.dtype)
    return unflat(unit, _wide(tree))


def _even(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.ones_like(x), _wide(tree))


def _alternating(tree: PyTree) -> PyTree:
    """Higham's vector, for an A whose columns cancel in a sum: 1, ..., 2 with alternating signs."""
    n = sum(x.size for x in jax.tree.leaves(tree))
    k = jnp.arange(n)
    return unflat(jnp.where(k % 2 == 0, 1, -1) * (1 + k / max(n - 1, 1)), _wide(tree))

"""The default method for a linear equation: a series while it is fast, then GMRES."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optimistix
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Inexact, Int, PyTree

from .._step import AbstractMemory
from .._tree import dot, lincomb, quotient, select, two_norm
from ..solvers._base import AbstractSolver, Number
from ..solvers._window import combine, products

# Above this rate GMRES needs fewer products than the series, by a half and more.
_SLOW = 0.7
# A row takes two copies of y; the products that sixteen rows save at rho = 0.999 are worth them.
_DEPTH = 16
# The ridge of `deqjax.Anderson`, for a matrix with a diagonal of ones; eps if that is more.
_RIDGE = 1e-8


class Window(AbstractMemory):
    """The memory of one problem."""

    z: PyTree  # the last iterate
    f: PyTree  # f at that iterate
    y: PyTree  # differences of g = f(z) - z, in rows of unit length; 0 where there is none
    v: PyTree  # differences of f(z), in the same unit
    gram: Inexact[Array, "m m"]  # <y_i, y_j>
    turn: Int[Array, ""]  # steps taken, the same for all problems of a batch: sets the next row
    rows: Int[Array, ""]  # rows written
    size: Inexact[Array, ""]  # ||g|| / ||f(z)|| at the last iterate
    slow: Bool[Array, ""]  # whether GMRES has replaced the series

    def kept(self, moves, active, old):
        """The new window without a copy, as nothing is written at the same z."""
        # A stopped problem no longer shrinks, which is no reason to leave the series.
        size, slow = select(moves, (self.size, self.slow), (old.size, old.slow))
        return dataclasses.replace(self, size=size, slow=slow)


class Krylov(AbstractSolver):
    """Picard steps until they shrink the residual too little; then Anderson's method, 16 deep.

    As `deqjax.Anderson`, without the safeguards for a nonlinear f: on a linear f, a step that has
    made the residual worse is as informative as any other. This is GMRES, truncated to the last
    steps.
    """

    rtol: Number = 0.0
    atol: Number = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm

    def blank(self, z0: PyTree) -> Window:
        """An empty window."""
        rows = jax.tree.map(lambda x: jnp.zeros((_DEPTH, *x.shape), x.dtype), z0)
        gram = jnp.zeros((_DEPTH, _DEPTH), two_norm(z0).dtype)
        size, slow = jnp.asarray(jnp.inf, gram.dtype), jnp.asarray(False)
        zero = jnp.asarray(0, jnp.int32)
        return Window(z0, z0, rows, rows, gram, zero, zero, size, slow)

    def mix(self, z: PyTree, fz: PyTree, memory: Window) -> tuple[PyTree, Window]:
        """One step."""
        m = memory
        ahead, (y, v), gram, rows = _advanced(m.turn % _DEPTH, z, fz, m)
        size = quotient(two_norm(lincomb(1, fz, -1, z)), two_norm(fz))
        slow = m.slow | (size > _SLOW * m.size)
        return ahead, Window(z, fz, y, v, gram, m.turn + 1, rows, size, slow)


def _at(k, rows: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, 0, keepdims=False), rows)


def _put(k, rows: PyTree, row: PyTree) -> PyTree:
    put = lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, k, 0)
    return jax.tree.map(put, rows, row)


@custom_vmap
def _advanced(k, z, fz, m: Window):
    """The next iterate; and the rows with row k replaced, their Gram matrix and number.

    The window is not used before GMRES starts, since its products would cost more than a cheap f.
    The window does not pass through a branch either, which would copy it.
    """
    ahead, row, gram, rows = jax.lax.cond(m.slow, _accelerated, _plain, k, z, fz, m)
    return ahead, _put(k, (m.y, m.v), row), gram, rows


@_advanced.def_vmap
def _(size, batched, *args):
    spread = lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape))
    k, z, fz, m = jax.tree.map(spread, args, tuple(batched))
    # One k for all problems, so that no row is gathered or scattered.
    over = lambda fn: jax.vmap(fn, (None, 0, 0, 0))
    branches = over(_accelerated), over(_plain)
    ahead, row, gram, rows = jax.lax.cond(jnp.any(m.slow), *branches, k[0], z, fz, m)
    out = ahead, jax.vmap(_put, (None, 0, 0))(k[0], (m.y, m.v), row), gram, rows
    return out, jax.tree.map(lambda _: True, out)


def _plain(k, z, fz, m: Window):
    del z
    return fz, _at(k, (m.y, m.v)), m.gram, m.rows


def _accelerated(k, z, fz, m: Window):
    g, v = lincomb(1, fz, -1, z), lincomb(1, fz, -1, m.f)
    y = lincomb(1, v, -1, lincomb(1, z, -1, m.z))
    norm = two_norm(y)
    # A problem that has stopped meets the same iterate again: no new row.
    new = m.slow & (norm > 0) & jnp.isfinite(norm)
    length = jnp.where(new, norm, 1)
    unit = jax.tree.map(lambda x: x / length.astype(x.dtype), (y, v))
    y, v = row = select(new, unit, _at(k, (m.y, m.v)))

    inner = lambda x: products(m.y, x).at[k].set(dot(y, x))
    column = inner(y)
    gram = m.gram.at[k].set(column).at[:, k].set(column)
    rows = m.rows + new.astype(m.rows.dtype)
    c = _eliminated(gram, rows, inner(g)[:, None])[:, 0]
    back = lincomb(1, combine(c.at[k].set(0), m.v), c[k], v)
    return select(m.slow, lincomb(1, fz, -1, back), fz), row, gram, rows


def inverse_bound(m: Window) -> Inexact[Array, ""]:
    """A lower bound on the norm of A's inverse, from the pairs `A s = -y` in the window.

    The largest `||s|| / ||y||` over its span, up to a factor of 4 and to what the ridge hides.
    """
    s = lincomb(1, m.v, -1, m.y)
    inner = jax.vmap(lambda row: products(s, row))(s)
    bound = jnp.sqrt(jnp.maximum(jnp.trace(_eliminated(m.gram, m.rows, inner)), 1))
    return bound.astype(m.size.dtype)


def _eliminated(
    gram: Inexact[Array, "m m"], rows: Int[Array, ""], b: Inexact[Array, "m k"]
) -> Inexact[Array, "m k"]:
    """Solves `(gram + ridge) c = b`; no pivot is below the ridge, and LAPACK compiles slowly."""
    eps = max(float(jnp.finfo(gram.dtype).eps), _RIDGE)
    ridge = eps * jnp.clip(rows, 1, _DEPTH).astype(gram.dtype)
    eye = jnp.eye(_DEPTH, dtype=gram.dtype)
    table = jnp.concatenate([gram + ridge * eye, b.astype(gram.dtype)], 1)

    def eliminate(k, table):
        row, unit = table[k], eye[k]
        column = jax.lax.dynamic_index_in_dim(table, k, 1, keepdims=False)
        return table - jnp.outer(column - unit, row / jnp.vdot(row[:_DEPTH], unit))

    return jax.lax.fori_loop(0, _DEPTH, eliminate, table)[:, _DEPTH:]

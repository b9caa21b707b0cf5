"""The default method for a linear equation: a series where it is fast, GMRES where it is slow."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optimistix
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Inexact, Int, PyTree

from ._secant import combine, products
from ._tree import lincomb, select, two_norm
from .solvers import AbstractSolver

# Above this rate the method needs fewer products than the series, by a half and more.
_SLOW = 0.7
# Two copies of y a row: the products of sixteen steps at rho = 0.999 are worth them.
_DEPTH = 16
# The ridge of `deqjax.Anderson`, of a matrix with a diagonal of ones; eps where that is more.
_RIDGE = 1e-8


class Window(NamedTuple):
    """The memory of one problem."""

    z: PyTree  # the last iterate
    f: PyTree  # f of it
    y: PyTree  # differences of g = f(z) - z, in rows of unit length; 0 where there is none
    v: PyTree  # differences of f(z), in the same unit
    gram: Inexact[Array, "m m"]  # <y_i, y_j>
    count: Int[Array, ""]  # rows written; -1 before the first iterate
    size: Inexact[Array, ""]  # ||g|| / ||f(z)|| at the last iterate
    slow: Bool[Array, ""]  # whether the series has been given up


class Krylov(AbstractSolver):
    """Picard steps until they shrink what is left too little; from there Anderson's, 16 deep.

    As `deqjax.Anderson`, without what a nonlinear f asks for: on a linear one, a step that has made
    the residual worse tells as much as any other. This is GMRES, truncated to the last steps.
    """

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm

    def blank(self, z0: PyTree) -> Window:
        """An empty window."""
        rows = jax.tree.map(lambda x: jnp.zeros((_DEPTH, *x.shape), x.dtype), z0)
        gram = jnp.zeros((_DEPTH, _DEPTH), two_norm(z0).dtype)
        size, slow = jnp.asarray(jnp.inf, gram.dtype), jnp.asarray(False)
        return Window(z0, z0, rows, rows, gram, jnp.asarray(-1, jnp.int32), size, slow)

    def mix(self, z: PyTree, fz: PyTree, memory: Window) -> tuple[PyTree, Window]:
        """One step."""
        m, g = memory, lincomb(1, fz, -1, z)
        size = two_norm(g) / two_norm(fz)
        slow = m.slow | (size > _SLOW * m.size)
        v = lincomb(1, fz, -1, m.f)
        y = lincomb(1, v, -1, lincomb(1, z, -1, m.z))
        norm = two_norm(y)
        # The first iterate has none before it, and a frozen problem meets the same one again.
        new = (m.count >= 0) & (norm > 0) & jnp.isfinite(norm)
        k = jnp.maximum(m.count, 0) % _DEPTH

        def put(rows, x):
            def leaf(rows, x):
                x = jnp.where(new, x / norm.astype(x.dtype), rows[k])
                return jax.lax.dynamic_update_index_in_dim(rows, x, k, 0)

            return jax.tree.map(leaf, rows, x)

        count = jnp.where(slow, jnp.maximum(m.count, 0) + new.astype(m.count.dtype), m.count)
        ys, vs = put(m.y, y), put(m.v, v)
        ahead, gram = _if_slow(slow, fz, g, ys, vs, m.gram, k, count)
        return ahead, Window(z, fz, ys, vs, gram, count, size, slow)

    def keep(self, go, live, new: Window, old: Window) -> Window:
        """All of it: at the same z nothing is written."""
        del go, live, old
        return new


@custom_vmap
def _if_slow(slow, fz, g, ys, vs, gram, k, count) -> tuple[PyTree, Array]:
    """f(z), or where accelerated steps lead, and the Gram matrix.

    The window is not read before it is of use, which would cost more than a cheap f; nor handed
    through a branch, which would copy it.
    """
    args = slow, fz, g, ys, vs, gram, k, count
    return jax.lax.cond(slow, _accelerated, _plain, *args)


@_if_slow.def_vmap
def _(size, batched, *args):
    spread = lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape))
    args = jax.tree.map(spread, args, tuple(batched))
    out = jax.lax.cond(jnp.any(args[0]), jax.vmap(_accelerated), _plain, *args)
    return out, jax.tree.map(lambda _: True, out)


def _plain(slow, fz, g, ys, vs, gram, k, count):
    del slow, g, ys, vs, k, count
    return fz, gram


def _accelerated(slow, fz, g, ys, vs, gram, k, count):
    column = products(ys, jax.tree.map(lambda rows: rows[k], ys))
    gram = gram.at[k].set(column).at[:, k].set(column)
    c = _eliminated(gram, count, products(ys, g)[:, None])[:, 0]
    return select(slow, lincomb(1, fz, -1, combine(c, vs)), fz), gram


def inverse_bound(m: Window) -> Inexact[Array, ""]:
    """A lower bound of the norm of A's inverse, of which the window shows `A s = -y`.

    The largest `||s|| / ||y||` over its span, up to a factor of 4 and to what the ridge hides.
    """
    s = lincomb(1, m.v, -1, m.y)
    inner = jax.vmap(lambda row: products(s, row))(s)
    return jnp.sqrt(jnp.maximum(jnp.trace(_eliminated(m.gram, m.count, inner)), 1))


def _eliminated(
    gram: Inexact[Array, "m m"], count: Int[Array, ""], b: Inexact[Array, "m k"]
) -> Inexact[Array, "m k"]:
    """`(gram + ridge) c = b`; no pivot is below the ridge, and LAPACK compiles for longer."""
    eps = max(float(jnp.finfo(gram.dtype).eps), _RIDGE)
    ridge = eps * jnp.clip(count, 1, _DEPTH).astype(gram.dtype)
    eye = jnp.eye(_DEPTH, dtype=gram.dtype)
    table = jnp.concatenate([gram + ridge * eye, b.astype(gram.dtype)], 1)

    def eliminate(k, table):
        row, unit = table[k], eye[k]
        column = jax.lax.dynamic_index_in_dim(table, k, 1, keepdims=False)
        return table - jnp.outer(column - unit, row / jnp.vdot(row[:_DEPTH], unit))

    return jax.lax.fori_loop(0, _DEPTH, eliminate, table)[:, _DEPTH:]

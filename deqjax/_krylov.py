"""Anderson's method on a linear equation: GMRES, truncated to a window of secants."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Float, Inexact, Int, PyTree

from ._secant import combine, products
from ._tree import lincomb, two_norm
from .solvers import AbstractSolver


class Window(NamedTuple):
    """The memory of one problem."""

    z: PyTree  # the last iterate
    f: PyTree  # f of it
    y: PyTree  # differences of f(z) - z, in rows of unit length; 0 where there is none
    v: PyTree  # differences of f(z), in the same unit
    gram: Inexact[Array, "m m"]  # <y_i, y_j>
    count: Int[Array, ""]  # rows written


class Krylov(AbstractSolver):
    """Makes what is left, `f(z) - z`, as small as differences of the last steps can.

    As `deqjax.Anderson`, without what a nonlinear f asks for: on a linear one a step that has made
    the residual worse tells as much as any other. The least squares problem is solved by
    elimination, which takes a sixth of the time that LAPACK's program takes to compile.
    """

    rtol: float = 0.0
    atol: float = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    depth: int = eqx.field(static=True, default=16)

    def blank(self, z0: PyTree) -> Window:
        """An empty window."""
        rows = jax.tree.map(lambda x: jnp.zeros((self.depth, *x.shape), x.dtype), z0)
        gram = jnp.zeros((self.depth, self.depth), two_norm(z0).dtype)
        return Window(z0, z0, rows, rows, gram, jnp.asarray(-1, jnp.int32))

    def mix(self, z: PyTree, fz: PyTree, memory: Window) -> tuple[PyTree, Window]:
        """One step."""
        m = memory
        v = lincomb(1, fz, -1, m.f)
        y = lincomb(1, v, -1, lincomb(1, z, -1, m.z))
        norm = two_norm(y)
        # The first iterate has none before it, and a frozen problem meets the same one again.
        new = (m.count >= 0) & (norm > 0) & jnp.isfinite(norm)
        k = jnp.maximum(m.count, 0) % self.depth

        def put(rows, x):
            def leaf(rows, x):
                x = jnp.where(new, x / norm.astype(x.dtype), rows[k])
                return jax.lax.dynamic_update_index_in_dim(rows, x, k, 0)

            return jax.tree.map(leaf, rows, x)

        ys, vs = put(m.y, y), put(m.v, v)
        column = products(ys, jax.tree.map(lambda rows: rows[k], ys))
        gram = m.gram.at[k].set(column).at[:, k].set(column)
        count = jnp.where(new, m.count + 1, jnp.maximum(m.count, 0))
        g = lincomb(1, fz, -1, z)
        c = solve(gram, count, products(ys, g)[:, None])[:, 0]
        return lincomb(1, fz, -1, combine(c, vs)), Window(z, fz, ys, vs, gram, count)

    def keep(self, go, live, new: Window, old: Window) -> Window:
        """All of it: at the same z nothing is written."""
        del go, live, old
        return new


def inverse_bound(m: Window) -> Inexact[Array, ""]:
    """A lower bound of the norm of A's inverse, of which the window shows `A s = -y`.

    The largest `||s|| / ||y||` over its span, up to a factor of 4 and to what the ridge hides.
    """
    s = lincomb(1, m.v, -1, m.y)
    inner = jax.vmap(lambda row: products(s, row))(s)
    return jnp.sqrt(jnp.maximum(jnp.trace(solve(m.gram, m.count, inner)), 1))


def solve(
    gram: Float[Array, "m m"], count: Int[Array, ""], b: Float[Array, "m k"]
) -> Float[Array, "m k"]:
    """`(gram + ridge) c = b` by elimination; the ridge keeps every pivot above 0."""
    n = gram.shape[0]
    eps = max(float(jnp.finfo(gram.dtype).eps), 1e-8)
    ridge = eps * jnp.clip(count, 1, n).astype(gram.dtype)
    units = jnp.arange(n)
    table = jnp.concatenate([gram + ridge * jnp.eye(n, dtype=gram.dtype), b.astype(gram.dtype)], 1)

    def eliminate(k, table):
        row = jax.lax.dynamic_index_in_dim(table, k, 0)
        column = jax.lax.dynamic_index_in_dim(table, k, 1)
        pivot = jax.lax.dynamic_index_in_dim(row, k, 1)
        column = column - (units == k)[:, None].astype(column.dtype)
        return table - column * (row / pivot)

    return jax.lax.fori_loop(0, n, eliminate, table)[:, n:]

"""The memory of a secant method: secants in rows, and the small system that combines them."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._step import AbstractMemory
from .._tree import add, lincomb, select, two_norm, unify, widen

# In units of the longest Picard step of the window. If ||g|| hardly changes with z, as for
# x - tanh(x), secants do not say how far to go, and steps went to 1e10 and back. At rho(J) = 0.999
# steps have to be up to 1 / (1 - rho) long. With 1e4, a z that one such step has thrown far away
# would count as solved at a relative residual of 1e-4.
LONGEST = 1e3


class Rule(eqx.Module):
    """The definition of a secant method."""

    galerkin: bool = eqx.field(static=True)  # p = s instead of -y
    mixing: Any = 1.0  # damping, if not 1: z' = z + mixing g, and so on
    ridge: Any = 0.0
    line_search: bool = eqx.field(static=True, default=False)

    @property
    def mixed(self) -> bool:
        """Whether g is needed besides f."""
        return not (isinstance(self.mixing, float | int) and self.mixing == 1)


class Secants(AbstractMemory):
    """The memory of a secant method, for one problem."""

    z: PyTree  # the last accepted iterate
    f: PyTree  # f at that iterate
    p: PyTree  # test vectors, in rows
    v: PyTree  # differences of f, in rows
    norms: Float[Array, " m"]  # ||p_i||
    sizes: Float[Array, " m"]  # ||g|| where the i-th secant starts
    gram: Float[Array, "m m"]  # -<p_i, y_j>
    count: Int[Array, ""]  # rows written since the last restart
    size: Float[Array, ""]  # ||g|| at the last accepted iterate
    best: Float[Array, ""]  # the least ||g|| so far
    stride: Float[Array, ""]  # the fraction of an accelerated step that led to z; 0: a Picard step
    wait: Int[Array, ""]  # Picard steps to take before the next accelerated one
    pause: Int[Array, ""]  # Picard steps after the next rejection
    length: Float[Array, ""]  # of the accelerated step to z, in Picard steps; 0: a Picard step
    reach: Float[Array, ""]  # the longest length of the next accelerated step

    def kept(self, moves, active, old):
        """The new window, with the small arrays beside it from the problems that were active.

        A frozen problem, at the same z, adds no secant. One from a rejected iterate may be written,
        but is not counted. So the window needs no copy, which would cost more than a step.
        """
        return eqx.tree_at(_small, self, select(active, _small(self), _small(old)))


def empty(z0: PyTree, rows: int) -> Secants:
    """A memory without secants, with room for `rows` of them."""
    blank = jax.tree.map(lambda x: jnp.zeros((rows, *x.shape), x.dtype), z0)
    dtype = two_norm(z0).dtype
    inf, zero = jnp.asarray(jnp.inf, dtype), jnp.asarray(0, jnp.int32)
    gram = jnp.zeros((rows, rows), dtype)
    none, reach = jnp.zeros((), dtype), jnp.asarray(LONGEST, dtype)
    small = (zero, inf, inf, none, zero, zero + 1, none, reach)
    return Secants(z0, z0, blank, blank, gram[0], gram[0], gram, *small)


def products(rows: PyTree, x: PyTree) -> Float[Array, " m"]:
    """The inner product of each row with `x`, in float32 or wider, in full precision."""

    def leaf(rows, x):
        rows, x = widen(rows).reshape(rows.shape[0], -1), widen(x).reshape(-1)
        return jnp.matmul(rows, x, precision="highest")

    return jnp.sum(jnp.stack(unify(jax.tree.leaves(jax.tree.map(leaf, rows, x)))), 0)


def combine(c: Float[Array, " m"], rows: PyTree) -> PyTree:
    """`sum_j c_j rows_j`, in full precision."""

    def leaf(rows):
        flat = widen(rows).reshape(rows.shape[0], -1)
        out = jnp.matmul(c.astype(flat.dtype), flat, precision="highest")
        return out.reshape(rows.shape[1:]).astype(rows.dtype)

    return jax.tree.map(leaf, rows)


def minus(x: PyTree, y: PyTree) -> PyTree:
    return lincomb(1, x, -1, y)


def _set_row(rows: PyTree, k: Int[Array, ""], row: PyTree) -> PyTree:
    put = lambda rows, row: jax.lax.dynamic_update_index_in_dim(rows, row, k, 0)
    return jax.tree.map(put, rows, row)


def restart(now: Bool[Array, ""], m: Secants) -> Secants:
    """The memory as before the first step, if `now`: the rows in the window count no more."""
    return eqx.tree_at(_small, m, select(now, _small(empty(m.z, m.gram.shape[0])), _small(m)))


def _small(m: Secants) -> tuple[Array, ...]:
    """The scalar part of the memory, besides the window."""
    return m.count, m.size, m.best, m.stride, m.wait, m.pause, m.length, m.reach


def differences(rule: Rule, m: Secants) -> PyTree:
    """The rows y."""
    if rule.galerkin:
        return minus(m.v, m.p)
    return jax.tree.map(jnp.negative, m.p)


def inverse(m: Secants, x: PyTree, *, transpose: bool) -> PyTree:
    """`-B^-1 x` for Broyden's B, an estimate of `(I - J)^-1 x`; or the same for both transposes.

    With S and V the rows s and v: `x + V^T T^-1 S x`, and `x + S^T T^-T V x`.
    """
    left, right = (m.p, m.v) if transpose else (m.v, m.p)
    c = solve(m, products(right, x), 0.0, transpose)
    c = jnp.where(jnp.all(jnp.isfinite(c)), c, 0)
    return add(x, combine(c, left))


def push(rule: Rule, z: PyTree, fz: PyTree, m: Secants, accept: Bool[Array, ""]) -> Secants:
    """Adds the secant of an accepted iterate to the window."""
    s, v = minus(z, m.z), minus(fz, m.f)
    y = minus(v, s)
    p = s if rule.galerkin else jax.tree.map(jnp.negative, y)
    k = m.count % m.gram.shape[0]
    # There is no secant at the first iterate, or when a frozen problem meets the same one again.
    # Broyden's window then stays as it is, for `inverse`; Anderson's is emptied, which saves
    # reading the row that would have to stay. Values that are not finite are left out, since 0
    # times them would be NaN.
    norm = two_norm(p)
    new = accept & jnp.isfinite(m.size) & (norm > 0) & jnp.isfinite(norm)

    def row(rows, x):
        if rule.galerkin:
            return _set_row(rows, k, select(new, x, jax.tree.map(lambda r: r[k], rows)))
        return _set_row(rows, k, jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), x))

    # Write the row, and its row and column of the Gram matrix.
    rows_p, rows_v = row(m.p, p), row(m.v, v)
    column = -products(rows_p, y)
    across = products(rows_p, s) - products(rows_v, s) if rule.galerkin else column
    gram = m.gram.at[:, k].set(column).at[k, :].set(across)
    gram = jnp.where(new, gram, m.gram)
    return dataclasses.replace(
        m,
        p=rows_p,
        v=rows_v,
        norms=m.norms.at[k].set(jnp.where(new, norm.astype(m.norms.dtype), m.norms[k])),
        sizes=m.sizes.at[k].set(jnp.where(new, m.size, m.sizes[k])),
        gram=gram,
        count=jnp.where(new, m.count + 1, m.count if rule.galerkin else 0),
    )


def solve(m: Secants, b: Float[Array, " m"], ridge: Any, transpose: bool) -> Float[Array, " m"]:
    """Solves `gram c = b`, or its transpose, with test vectors of unit length and a ridge."""
    rows = m.gram.shape[0]
    known = jnp.arange(rows, dtype=m.count.dtype) < m.count
    unit = jnp.where(known, 1 / jnp.where(known, m.norms, 1), 0)
    gram = unit[:, None] * (m.gram.T if transpose else m.gram) * unit[None]
    # The trace of the Gram matrix of unit vectors is their number.
    trace = jnp.minimum(m.count, rows).astype(gram.dtype)
    eye = jnp.eye(rows, dtype=gram.dtype)
    # A ridge below the rounding of the diagonal would have no effect.
    ridge = jnp.maximum(jnp.asarray(ridge, gram.dtype), jnp.finfo(gram.dtype).eps)
    gram = gram + ridge * trace * eye
    gram = jnp.where(known[:, None] & known[None], gram, eye)
    b = unit * b.astype(gram.dtype)
    # A breakdown gives NaN. It is detected beforehand, so that its derivatives stay defined.
    found = jnp.linalg.solve(*jax.lax.stop_gradient((gram, b)))
    good = jnp.all(jnp.isfinite(found))
    c = jnp.linalg.solve(jnp.where(good, gram, eye), b)
    return unit * jnp.where(good, c, jnp.nan)

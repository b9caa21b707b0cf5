"""The residual of a linear equation, leaf by leaf: each is held to its own size and precision.

A leaf whose y is small because g is small there is as accurate as any other. If y is small because
large terms cancel, the leaf cannot be more accurate than the rounding of these terms. The coupling
of leaves is measured to know it.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact, PyTree

from .._solution import relative_residual
from .._tree import lincomb, max_abs, mesh_axes, two_norm, unify, vary, widen

# Above this ratio of y to b, a tenth of b in the residual is too much: 1 / (1 - rho) at 0.9999.
_SINGULAR = 1e4
# The part of y that may be rounding. At rho = 0.9999 it is at most 1e-2 in float32 if J is normal;
# for 30 triangular J whose y was nothing but rounding, the least was 3.7e-2.
_ROUNDING = 0.03
# Below this part of its neighbours' contributions, a leaf is no unit in which to measure steps.
_PART = 0.1


class AbstractMeasure(eqx.Module):
    """A measure of the `y` of one problem; its arrays may hold one value per problem."""

    @abc.abstractmethod
    def error(self, y: PyTree, fy: PyTree) -> Inexact[Array, "..."]:
        """The error, below 1 if y suffices, from `fy = b + (I - A) y`; NaN if fy is not finite."""

    @abc.abstractmethod
    def accepts(
        self, error: Inexact[Array, ""], growth: Inexact[Array, ""], inverse: Inexact[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether the best y is a success, even if it misses the tolerance that was asked for.

        `growth` is the size of y relative to b, `inverse` a lower bound on the norm of A's inverse.
        """

    @abc.abstractmethod
    def report(self, error: Inexact[Array, ""]) -> dict[str, Any]:
        """The error, under its name in the stats."""


class Residual(AbstractMeasure):
    """The relative residual of each leaf, held to its `tol`."""

    tol: tuple[Any, ...]
    # `[i, j]`: the rounding in leaf i due to leaf j, relative to the size of j; None: one leaf.
    rounding: Inexact[Array, "... l l"] | None
    eps: float = eqx.field(static=True)

    def limits(self, dtype: Any) -> Inexact[Array, " l"]:
        """The tolerances, as an array."""
        return jnp.stack([jnp.asarray(t, dtype) for t in self.tol])

    def error(self, y, fy):
        if self.rounding is None:
            left, size = two_norm(lincomb(1, fy, -1, y)), two_norm(fy)
            none = (left == 0) & (size == 0)
            return jnp.where(none, 0, left / jnp.where(none, 1, size)) / self.limits(left.dtype)[0]
        pairs = zip(jax.tree.leaves(y), jax.tree.leaves(fy), strict=True)
        left = _stack([relative_residual(*pair) for pair in pairs])
        tol, size = self.limits(left.dtype), _norms(fy).astype(left.dtype)
        floor = self.rounding.astype(left.dtype) @ size / tol
        left = left * jnp.where(floor > 0, size / jnp.where(floor > 0, size + floor, 1), 1)
        return jnp.max(left / tol)

    def accepts(self, error, growth, inverse):
        tol = self.limits(error.dtype)
        good = error <= jnp.min(slack(tol) / tol)
        left = jnp.maximum(error * jnp.max(tol), self.eps)
        # A singular system has no solution, but a small residual relative to a large enough y.
        good = good & ((growth < _SINGULAR) | (left * growth < 0.1))
        return good & (jnp.minimum(left, 10 * self.eps) * inverse < _ROUNDING)

    def report(self, error):
        return {
            "residual": error * jnp.max(_stack([jnp.asarray(t, error.dtype) for t in self.tol]))
        }


def residual_of(b: PyTree, tol: Any, coupled: Array | None, *, finest: bool = True) -> Residual:
    """The measure of the equation with right side `b`; `tol=None` is what products can reach.

    The tolerance is at least 2 eps of the leaf's dtype or, unless `finest`, what products can
    reach.
    """
    leaves = jax.tree.leaves(b)
    usual = [_unit(x) for x in leaves]
    least = [2 * float(jnp.finfo(x.dtype).eps) for x in leaves] if finest else usual
    tols = usual if tol is None else [_at_least(tol, x) for x in least]
    rounding = None
    if coupled is not None:
        unit = jnp.asarray(np.maximum.outer(usual, usual), coupled.dtype)
        rounding = coupled * jnp.broadcast_to(unit, coupled.shape)
    eps = max(float(jnp.finfo(widen(x).dtype).eps) for x in jax.tree.leaves(b))
    return Residual(tuple(tols), rounding, eps)


def slack(tolerance: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """The residual that is accepted instead of `tolerance`; a loose one is not enlarged tenfold."""
    return jnp.maximum(tolerance, jnp.minimum(10 * tolerance, 0.1))


def coupling(
    matvec: Callable[[PyTree], PyTree], b: PyTree, rank: int
) -> Inexact[Array, "... l l"] | None:
    """The size that leaf j of y gives to leaf i of `y - matvec(y)`, whatever cancels; 0 for i = j.

    Takes one product per leaf, with pseudo-random signs: its norm is then about that of the block
    of `I - matvec`, entry by entry. None if there is one leaf.
    """
    leaves, treedef = jax.tree.flatten(b)
    if len(leaves) == 1:
        return None
    sizes = [max(int(np.prod(x.shape[rank:])), 1) for x in leaves]

    def signs(x):
        bits = jnp.arange(x.size, dtype=jnp.uint32) * jnp.uint32(2654435761)
        return jnp.where(bits >> 15 & 1, 1, -1).astype(x.dtype).reshape(x.shape)

    def one(j):
        probe = [jnp.where(i == j, signs(x), 0) for i, x in enumerate(leaves)]
        probe = vary(jax.tree.unflatten(treedef, probe), mesh_axes(b))
        image = jax.tree.map(lambda x: jnp.square(widen(x)), matvec(probe))
        total = [jnp.sum(x, range(rank, x.ndim)) for x in jax.tree.leaves(image)]
        out = jnp.sqrt(jnp.stack(unify(total), -1))
        out = out / jnp.sqrt(jnp.asarray(sizes, out.dtype)[j])
        return jnp.where(jnp.arange(len(leaves)) == j, 0, out)

    return jnp.moveaxis(jax.lax.map(one, jnp.arange(len(leaves))), 0, -1)


def growth(y: PyTree, b: PyTree, coupled: Array | None) -> Inexact[Array, ""]:
    """The size of `y` relative to its causes, for the worst leaf if the coupling is known."""
    if coupled is None:
        size, cause = two_norm(y), two_norm(b)
    else:
        size = _norms(y)
        cause = _norms(b) + coupled.astype(size.dtype) @ size
    return jnp.max(jnp.where(size > 0, size / jnp.where(cause > 0, cause, 1), 0))


def units(y: PyTree, coupled: Array | None) -> PyTree:
    """A power of two near the size of each leaf, in which steps are compared between leaves."""
    if coupled is None:
        return None
    size = _stack([max_abs(x) for x in jax.tree.leaves(y)])
    for _ in range(3):
        size = jnp.maximum(size, _PART * (coupled.astype(size.dtype) @ size))
    known = (size > 0) & jnp.isfinite(size)
    unit = jnp.where(known, jnp.exp2(jnp.round(jnp.log2(jnp.where(known, size, 1)))), 1)
    leaves, treedef = jax.tree.flatten(y)
    return jax.tree.unflatten(treedef, [unit[i].astype(x.dtype) for i, x in enumerate(leaves)])


def _unit(x: Array) -> float:
    """The relative residual that products in the dtype of `x` can reach."""
    return max(10 * float(jnp.finfo(widen(x).dtype).eps), 2 * float(jnp.finfo(x.dtype).eps))


def _at_least(tol: Any, least: float) -> Any:
    return max(tol, least) if isinstance(tol, float | int) else jnp.maximum(tol, least)


def _norms(tree: PyTree) -> Inexact[Array, " l"]:
    return _stack([two_norm(x) for x in jax.tree.leaves(tree)])


def _stack(scalars: list[Array]) -> Array:
    return jnp.stack(unify(scalars))

import math
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PyTree

from .._linear import AbstractMeasure, LinearMap, Residual, by_iteration, judged, slack
from .._solution import relative_residual
from .._tree import add, cast, lincomb, per_problem, select, unify, widen
from ._base import AbstractImplicitAdjoint, check_linear

# JVPs for the weight. The first step takes most of what z has beside the leading eigenvector of J.
_JVPS = 3
# Keeps w positive at units whose row of J is zero, at no great cost in the rate of the others.
_FLOOR = 0.01
# Less than this many roundings of a product between the rate and 1, and there is no bound.
_ROUNDINGS = 20


class Contraction(NamedTuple):
    """`J w <= rate w`, w > 0; a rate that is infinite where no such w has been found."""

    w: PyTree  # float32 or wider
    rate: Inexact[Array, "..."]


class _Certificate(AbstractMeasure):
    """The bound on the relative error where there is one, the relative residual elsewhere."""

    contraction: Contraction
    residual: Residual
    tol: float
    rounding: float = eqx.field(static=True)
    transpose: bool = eqx.field(static=True)

    def norm(self, y: PyTree) -> Inexact[Array, ""]:
        """That in which `J^T`, or J, contracts."""
        w = self.contraction.w
        if self.transpose:
            return _total(jnp.sum, lambda y, w: jnp.sum(w * jnp.abs(widen(y))), y, w)
        return _total(jnp.max, lambda y, w: jnp.max(jnp.abs(widen(y)) / w, initial=0), y, w)

    @property
    def gap(self) -> Inexact[Array, ""]:
        """`1 - c`, no more than that; 0 or below where there is no bound."""
        return 1 - self.contraction.rate * (1 + self.rounding)

    @property
    def holds(self):
        """Whether there is a bound."""
        return self.gap > _ROUNDINGS * self.rounding

    @property
    def target(self):
        """The tolerance, or twice the bound of the exact solution if that is more."""
        least = self.rounding / jnp.where(self.holds, self.gap, 1)
        return jnp.maximum(2 * least / (1 - least), self.tol)

    def error(self, y, fy):
        """See `AbstractMeasure`."""
        size = self.norm(y)
        left = self.norm(lincomb(1, fy, -1, y)) + self.rounding * size
        bound = left / jnp.where(self.holds, self.gap, 1)
        beyond = bound >= size
        relative = jnp.where(beyond, jnp.inf, bound / jnp.where(beyond, 1, size - bound))
        relative = jnp.where(left == 0, 0, relative)
        relative = jnp.where(jnp.isfinite(left), relative, jnp.nan)
        plain = self.residual.error(y, fy)
        return jnp.where(self.holds, (relative / self.target).astype(plain.dtype), plain)

    def accepts(self, error, y):
        """See `AbstractMeasure`."""
        target = self.target.astype(error.dtype)
        good = error * target <= slack(target)
        return jnp.where(self.holds, good, self.residual.accepts(error, y))

    def report(self, error):
        """See `AbstractMeasure`."""
        bound = jnp.where(self.holds, error * self.target.astype(error.dtype), jnp.inf)
        return {"error_bound": bound}


class PositiveConcaveAdjoint(AbstractImplicitAdjoint):
    """TODO"""

    tol: float | None = 1e-4
    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True, default="nan")
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_linear(self)

    def known(self, matvec: LinearMap, z: PyTree, rank: int) -> Contraction:
        """A weight, by power steps from z, and its rate."""
        measured = per_problem(_rate, rank)
        w, best = z, None
        for _ in range(_JVPS):
            image = lincomb(1, w, -1, matvec(w))
            now = Contraction(jax.tree.map(widen, w), measured(image, w))
            best = now if best is None else select(now.rate < best.rate, now, best)
            w = lincomb(1, image, _FLOOR, z)
        return best

    def solve(
        self,
        matvec: LinearMap,
        b: PyTree,
        known: Contraction,
        *,
        transpose: bool,
        max_steps: int | None,
        rank: int,
    ) -> tuple[PyTree, dict[str, Any]]:
        """See `deqjax.adjoints`."""
        steps = max_steps if self.max_steps is None else self.max_steps
        tol = 0.0 if self.tol is None else self.tol
        r = _rounding(b, rank)
        certificate = lambda residual: _Certificate(known, residual, tol, r, transpose)
        y, stats = by_iteration(
            None, matvec, b, None, None, max_steps=steps, rank=rank, sharper=certificate
        )
        fy = add(b, lincomb(1, y, -1, matvec(y)))
        stats["residual"] = per_problem(relative_residual, rank)(y, fy)
        return judged(y, stats, self.on_failure), stats


def _total(combine, fn, *trees) -> Inexact[Array, ""]:
    return combine(jnp.stack(jax.tree.leaves(unify(jax.tree.map(fn, *trees)))))


def _rate(image: PyTree, w: PyTree) -> Inexact[Array, ""]:
    r = _rounding(w, 0)
    ratio = jax.tree.map(lambda i, w: widen(i) / widen(w), image, w)
    low = _total(jnp.min, lambda x: jnp.min(x, initial=jnp.inf), ratio)
    high = _total(jnp.max, lambda x: jnp.max(x, initial=0), ratio)
    positive = _total(jnp.min, lambda w: jnp.min(widen(w), initial=1), w) > 0
    return jnp.where(positive & (low >= -r), high, jnp.inf)


def _rounding(tree: PyTree, rank: int) -> float:
    sizes = [math.prod(x.shape[rank:]) for x in jax.tree.leaves(tree)]
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))
    return eps * (4 + math.sqrt(sum(sizes)))

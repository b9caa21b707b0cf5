import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, PyTree

from .._checks import check_real
from .._solution import relative_residual
from .._tree import add, lincomb, per_problem, quotient, select, unify, widen
from ._base import AbstractImplicitAdjoint, check_linear
from ._linear_solve import LinearMap, by_iteration, judged
from ._residual import AbstractMeasure, Residual, slack

# JVPs for the weight. The first removes most of what z has beside the leading eigenvector of J.
_JVPS = 3
# Keeps w positive where a row of J is zero; this hardly changes the rates of the other units.
_FLOOR = 0.1
# No bound if the rate is closer to 1 than so many roundings: one would be a twentieth of the gap.
_ROUNDINGS = 20
# The rounding of a product, in eps. For sums of nonnegative terms it depends only on their length,
# grows as sqrt(n) (Ipsen and Zhou, Probabilistic error analysis for inner products, 2020), and was
# measured to be below 1 for n up to 300. Saturated units cost more, since their slopes
# `1 - tanh(u)^2` are lost in rounding: up to 31 eps in float32, if g is only at such a unit.
_SUM, _SLOPE = 0.25, 32


class Contraction(NamedTuple):
    """`0 <= J w <= rate w`, w > 0; the rate is infinite if no such w was found from z."""

    w: PyTree  # float32 or wider
    rate: Inexact[Array, "..."]


def _total(combine: Callable, fn: Callable, *trees: PyTree) -> Inexact[Array, ""]:
    """`combine` of the scalars that `fn` computes from the leaves."""
    return combine(jnp.stack(jax.tree.leaves(unify(jax.tree.map(fn, *trees)))))


def _rate(image: PyTree, w: PyTree) -> Inexact[Array, ""]:
    """`max J w / w`, or infinity unless w > 0 and, up to rounding, J w >= 0."""
    r = _rounding(w, 0)
    ratio = jax.tree.map(lambda i, w: quotient(widen(i), widen(w)), image, w)
    low = _total(jnp.min, lambda x: jnp.min(x, initial=jnp.inf), ratio)
    high = _total(jnp.max, lambda x: jnp.max(x, initial=0), ratio)
    positive = _total(jnp.min, lambda w: jnp.min(widen(w), initial=1), w) > 0
    return jnp.where(positive & (low >= -r), high, jnp.inf)


def _rounding(tree: PyTree, rank: int) -> float:
    """The rounding of a product with J or its transpose, relative in the norms of the bound."""
    sizes = [math.prod(x.shape[rank:]) for x in jax.tree.leaves(tree)]
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))
    return eps * (_SLOPE + _SUM * math.sqrt(sum(sizes)))


class _Certificate(AbstractMeasure):
    """The bound on the relative error if there is one, otherwise the relative residual.

    With `J >= 0` and `J w <= c w`, the transpose contracts `||y|| = sum w |y|` by c, since
    `sum_j w_j |J^T y|_j <= sum_i |y_i| (J w)_i`; and J contracts `||y|| = max |y| / w`, since
    `|J y| <= J |y| <= ||y|| J w`. The solution y* of `y = b + J y`, or of its transpose, has
    `y - y* = J (y - y*) - (b + J y - y)`, hence

        ||y - y*|| <= B := ||b + J y - y|| / (1 - c),    ||y - y*|| / ||y*|| <= B / (||y|| - B)
    """

    contraction: Contraction
    residual: Residual
    tol: float
    rounding: float = eqx.field(static=True)
    transpose: bool = eqx.field(static=True)

    def norm(self, y: PyTree) -> Inexact[Array, ""]:
        """The norm in which `J^T`, or J, contracts."""
        w = self.contraction.w
        if self.transpose:
            return _total(jnp.sum, lambda y, w: jnp.sum(w * jnp.abs(widen(y))), y, w)
        size = lambda y, w: jnp.max(quotient(jnp.abs(widen(y)), w), initial=0)
        return _total(jnp.max, size, y, w)

    @property
    def gap(self) -> Inexact[Array, ""]:
        """The gap `1 - c`, or less; 0 or below if there is no bound."""
        return 1 - self.contraction.rate * (1 + self.rounding)

    @property
    def holds(self):
        """Whether there is a bound."""
        return self.gap > _ROUNDINGS * self.rounding

    @property
    def target(self):
        """The tolerance, or the bound at a residual of half a rounding if that is more."""
        least = 1.5 * self.rounding / jnp.where(self.holds, self.gap, 1)
        return jnp.maximum(least / (1 - least), self.tol)

    def error(self, y, fy):
        size = self.norm(y)
        left = self.norm(lincomb(1, fy, -1, y)) + self.rounding * size
        bound = left / jnp.where(self.holds, self.gap, 1)
        beyond = bound >= size
        relative = jnp.where(beyond, jnp.inf, bound / jnp.where(beyond, 1, size - bound))
        relative = jnp.where(left == 0, 0, relative)
        relative = jnp.where(jnp.isfinite(left), relative, jnp.nan)
        plain = self.residual.error(y, fy)
        return jnp.where(self.holds, (relative / self.target).astype(plain.dtype), plain)

    def accepts(self, error, growth, inverse):
        target = self.target.astype(error.dtype)
        good = error * target <= slack(target)
        return jnp.where(self.holds, good, self.residual.accepts(error, growth, inverse))

    def report(self, error):
        bound = jnp.where(self.holds, error * self.target.astype(error.dtype), jnp.inf)
        return {"error_bound": bound}


class PositiveConcaveAdjoint(AbstractImplicitAdjoint):
    """The implicit gradient at a fixed point of a positive concave `f`, with a bound on its error.

    Every component of such an f is concave and positive on z >= 0; f is then monotone, J = df/dz is
    nonnegative, and `J z* <= f(z*) - f(0) < z*`. With any `w > 0` and `J w <= c w`, c < 1,

        y = g + J^T y,    ||y_k - y||_w <= ||g + J^T y_k - y_k||_w / (1 - c),    ||y||_w = sum w |y|

    for any y_k; in forward mode the same holds for J and `max |y| / w`. The weight w is z* itself
    or the result of one or two power steps from z*, whichever has the least c. Each problem of a
    batch stops when this bound, relative to y, is below `tol`. The Neumann series is summed while
    its terms shrink the residual by 0.3 or more; then follows Anderson's method, 16 deep, which on
    a linear equation is GMRES, for each problem by itself.

    **Arguments:**

    - `tol`: a float, the relative error in the norm above at which the linear solve stops. The
        default is a solver's default `rtol`, since J at z is no nearer to J at z* than z is to z*.
        The tolerance is at least 1.5 roundings of a product divided by `1 - c`, with a rounding of
        `32 + sqrt(n) / 4` eps for n entries of z; `None` asks for just that.
    - `max_steps`: as in `deqjax.ImplicitAdjoint`.
    - `on_failure`: the result of a failed solve: `"nan"`, `"keep"` its best value, `"raise"` a
        run-time error. A solve has failed if its best bound is above 10 times `tol` (no more than
        0.1, unless `tol` is).

    There is no bound if no such w is found, for instance if `c >= 1` up to 20 roundings, f is not
    positive concave, or z is far from its fixed point; nor is there one in half precision.
    `error_bound` is then infinite, and the solve is held to the relative residual of
    `ImplicitAdjoint()`.

    `deqjax.implicit_vjp` reports `"error_bound"`: at least `||y_k - y||_w / ||y||_w`, including the
    rounding of products. The bound is for J at z. It does not include the distance of z from the
    fixed point nor, in float64, all of the rounding of slopes that are nearly 0 (some 65 eps).

    **Cost:** one evaluation of `f` with its linearisation, three JVPs, one Jacobian product per
    step and another for the stats; 52 copies of `z`. With `W >= 0` dense and random, 7 products at
    rho(J) = 0.996, where the series takes 944.

    **When not to use it:** for an f that is not positive concave. A J with negative entries can
    pass as a nonnegative one (only `0 <= J w <= c w` is tested), and the bound is then not valid.
    Also not with matrix products below the precision of their dtype (TF32), which the bound does
    not include: set `jax_default_matmul_precision` to `"highest"`.

    Forward mode, higher derivatives and `jax.shard_map` are supported as by
    `deqjax.ImplicitAdjoint`; an `f` that holds a `jax.custom_vjp` function raises JAX's
    `TypeError`.

    **Raises:** `ValueError` for an `on_failure` that is none of the above, a `tol` that is not a
    positive float, or `max_steps < 1`.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029, for such f; Walker and Ni, Anderson acceleration for fixed-point
    iterations, SIAM J. Numer. Anal. 49 (2011), theorem 2.2, for Anderson's method as GMRES. The
    bound is derived above the code that computes it.
    """

    tol: float | None = 1e-4
    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True, default="nan")
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_linear(self)

    def known(self, matvec: LinearMap, z: PyTree, rank: int) -> Contraction:
        """A weight, by power steps from z, and its rate."""
        check_real("PositiveConcaveAdjoint", z, "use deqjax.ImplicitAdjoint(), which has no bound.")

        def step(w):
            image = lincomb(1, w, -1, matvec(w))
            rate = per_problem(_rate, rank)(image, w)
            return Contraction(jax.tree.map(widen, w), rate), lincomb(1, image, _FLOOR, z)

        best, w = step(z)
        for _ in range(_JVPS - 1):
            now, w = step(w)
            best = select(now.rate < best.rate, now, best)
        return best

    def solve(
        self,
        matvec: LinearMap,
        b: PyTree,
        known: Contraction,
        *,
        transpose: bool,
        max_steps: int,
        rank: int,
    ) -> tuple[PyTree, dict[str, Any]]:
        steps = max_steps if self.max_steps is None else self.max_steps
        tol = 0.0 if self.tol is None else self.tol
        r = _rounding(b, rank)
        certificate = lambda residual: _Certificate(known, residual, tol, r, transpose)
        y, stats = by_iteration(
            None, matvec, b, None, None, max_steps=steps, rank=rank, sharper=certificate
        )
        # Compiled away if only the gradient is used.
        fy = add(b, lincomb(1, y, -1, matvec(y)))
        stats["residual"] = per_problem(relative_residual, rank)(y, fy)
        return judged(y, stats, self.on_failure), stats

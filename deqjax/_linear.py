"""`A y = b` by products with `A = I - J` or its transpose alone: an implicit gradient."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import optimistix
from jaxtyping import Array, Bool, Inexact, PyTree

from ._iterate import Budget, iterate, lax_while
from ._solution import RESULTS, relative_residual
from ._tree import cast, max_abs, mesh_axes, per_problem, select, unify, widen
from .solvers import AbstractSolver, Anderson, FixedPointIteration

LinearMap = Callable[[PyTree], PyTree]

# Above this rate Anderson's method needs fewer products than the series, by a half and more.
_STALLED = 0.7
# Two copies of y a row: the products of sixteen steps at rho = 0.999 are worth them.
_ANDERSON = Anderson(depth=16)
# The ratio of y to b above which a tenth of b in the residual is too much: 1 / (1 - rho) at 0.9999.
_SINGULAR = 1e4


class _Memory(NamedTuple):
    inner: PyTree
    residual: Inexact[Array, ""]
    stalled: Bool[Array, ""]


class AbstractMeasure(eqx.Module):
    """What is asked of a `y` of one problem; its arrays may hold one value per problem."""

    @abc.abstractmethod
    def error(self, y: PyTree, fy: PyTree) -> Inexact[Array, "..."]:
        """Below 1 where y will do, by `fy = b + (I - A) y`; NaN where that is not finite."""

    @abc.abstractmethod
    def accepts(self, error: Inexact[Array, ""], y: PyTree) -> Bool[Array, ""]:
        """Whether the best y is a success, though perhaps not all that was asked for."""

    @abc.abstractmethod
    def report(self, error: Inexact[Array, ""]) -> dict[str, Any]:
        """What the error means, for the stats."""


class Residual(AbstractMeasure):
    """The relative residual, held to `tol`."""

    tol: float | Inexact[Array, ""]
    eps: float = eqx.field(static=True)  # of the dtype that y is summed in
    least: float = eqx.field(static=True)  # a residual that products can reach

    def error(self, y, fy):
        """See `AbstractMeasure`."""
        size = relative_residual(y, fy)
        return size / jnp.asarray(self.tol, size.dtype)

    def accepts(self, error, y):
        """See `AbstractMeasure`."""
        tolerance = jnp.asarray(self.tol, error.dtype)
        good = error * tolerance <= jnp.maximum(slack(tolerance), self.least)
        # A singular system has no solution, and yet a small residual beside a y large enough.
        growth = max_abs(y).astype(error.dtype)
        left = jnp.maximum(error * tolerance, self.eps) * growth
        return good & ((growth < _SINGULAR) | (left < 0.1))

    def report(self, error):
        """See `AbstractMeasure`."""
        return {"residual": error * jnp.asarray(self.tol, error.dtype)}


def slack(tolerance: Inexact[Array, ""]) -> Inexact[Array, ""]:
    """What is accepted in the place of `tolerance`; ten times a loose one would be no answer."""
    return jnp.maximum(tolerance, jnp.minimum(10 * tolerance, 0.1))


class _Linear(AbstractSolver):
    """A fixed-point method on `y = b + (I - A) y`, which is held to a measure of its own."""

    inner: AbstractSolver
    measure: AbstractMeasure
    rtol: float | Inexact[Array, ""] = 0.0
    atol: float | Inexact[Array, ""] = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    # Whether to stop where residuals shrink too slowly.
    impatient: bool = eqx.field(static=True, default=False)

    def error(self, z, fz):
        return self.measure.error(z, fz)

    def blank(self, z0):
        unknown = jnp.asarray(jnp.inf, max_abs(z0).dtype)
        return _Memory(self.inner.blank(z0), unknown, jnp.asarray(False))

    def mix(self, z, fz, memory):
        z_next, inner = self.inner.mix(z, fz, memory.inner)
        now = relative_residual(z, fz).astype(memory.residual.dtype)
        stalled = now > _STALLED * memory.residual if self.impatient else memory.stalled
        return z_next, _Memory(inner, now, stalled)

    def overflow(self, memory):
        return memory.stalled

    def recovers(self, memory):
        return self.inner.recovers(memory.inner)

    def keep(self, go, live, new, old):
        rest = super().keep(go, live, new._replace(inner=None), old._replace(inner=None))
        return rest._replace(inner=self.inner.keep(go, live, new.inner, old.inner))


def by_iteration(
    solver: AbstractSolver | None,
    matvec: LinearMap,
    b: PyTree,
    y0: PyTree,
    tol: Any,
    *,
    max_steps: int | None,
    rank: int,
    sharper: Callable[[Residual], AbstractMeasure] = lambda residual: residual,
) -> tuple[PyTree, dict[str, Any]]:
    """Iterates `y <- b + (I - A) y`, each problem of a batch until its own tolerance.

    `solver=None` sums the Neumann series, and goes on with Anderson's method where that stalls.
    `sharper` makes a measure that can tell more than the relative residual from that one.
    """
    wide = jax.tree.map(widen, b)
    eps = lambda tree: max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))
    if tol is None:
        tol = max(10 * eps(wide), 2 * eps(b)) if solver is None else solver.rtol
    measure = sharper(Residual(tol, eps(wide), 4 * eps(b)))
    # The equation is linear: its size is taken out, so that no square overflows.
    size = per_problem(max_abs, rank)(b)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    divide = lambda x, s: jax.tree.map(lambda x: x / s.astype(x.dtype), x)
    unit = per_problem(divide, rank)(wide, size)
    start = unit
    if y0 is not None:
        # Where b is 0 so is y, to which a relative residual does not lead.
        warm = per_problem(divide, rank)(cast(y0, wide), size)
        usable = per_problem(lambda b, y: (max_abs(b) > 0) & jnp.isfinite(max_abs(y)), rank)
        start = select(usable(b, y0), warm, unit)

    def fn(y, unit):
        product = matvec(cast(y, b))
        return jax.tree.map(lambda y, r, u: u + (y - widen(r)), y, product, unit), None

    ceiling = 256 if max_steps is None else max_steps

    def run(inner, y, limit, impatient=False):
        budget = Budget(ceiling, limit, rank, fixed=False)
        method = _Linear(inner=inner, measure=measure, impatient=impatient)
        return iterate((fn, method, y, unit, budget, lax_while))

    limit = jnp.asarray(ceiling, jnp.int32)
    if solver is None:
        y, (num_steps, small, state) = run(FixedPointIteration(), start, limit, impatient=True)
        # Those that are done, or beyond help, are not evaluated again.
        limit = jnp.where(small | ~state.overflow, -1, ceiling - num_steps)
        y, (more, _, after) = run(_ANDERSON, y, limit)
        num_steps, error = num_steps + more, jnp.where(limit < 0, state.error, after.error)
    else:
        y, (num_steps, _, state) = run(solver, start, limit)
        error = state.error

    def outcome(measure, error, y):
        good = measure.accepts(error, y)
        code = RESULTS.where(good, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        return measure.report(error) | {"result": code}

    restore = lambda y, s, b: jax.tree.map(
        lambda y, b: (y * s.astype(y.dtype)).astype(b.dtype), y, b
    )
    stats = {"num_steps": num_steps} | per_problem(outcome, rank)(measure, error, y)
    return per_problem(restore, rank)(y, size, b), stats


def by_lineax(
    linear_solver: lineax.AbstractLinearSolver, matvec: LinearMap, b: PyTree, y0: PyTree
) -> tuple[PyTree, dict[str, Any]]:
    """Hands the equation to Lineax, a batch as one system, without its run-time errors."""
    axes = mesh_axes(b)
    if axes:
        raise ValueError(
            f"A Lineax solver expects to run outside jax.shard_map, got a system that varies "
            f"over the mesh axes {sorted(map(str, axes))}; use ImplicitAdjoint() there."
        )
    product = lambda y: unify(matvec(cast(y, b)))
    operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: unify(b)))
    options = {} if y0 is None else {"y0": cast(y0, unify(b))}
    sol = lineax.linear_solve(operator, unify(b), linear_solver, options=options, throw=False)
    y = cast(sol.value, b)
    residual = relative_residual(matvec(y), b)
    num_steps = jnp.asarray(sol.stats.get("num_steps", 1), jnp.int32)
    result = RESULTS.promote(sol.result)
    return y, {"num_steps": num_steps, "residual": residual, "result": result}


def judged(y: PyTree, stats: dict[str, Any], on_failure: str) -> PyTree:
    """`y`, or what `on_failure` says of the problems whose solve has failed."""
    failed = stats["result"] != RESULTS.successful
    if on_failure == "nan":
        return select(failed, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), y), y)
    if on_failure == "raise":
        message = "The linear solve of the implicit function theorem failed."
        return eqx.error_if(y, jnp.any(failed), message)
    return y

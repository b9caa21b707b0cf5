"""Solves `A y = b` for an implicit gradient, only by products with `A = I - J` or its transpose."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import optimistix
from jaxtyping import Array, Inexact, PyTree

from .._iterate import iterate, lax_while
from .._problem import Budget
from .._solution import RESULTS
from .._tree import add, cast, lincomb, max_abs, mesh_axes, per_problem, select, unify, vary, widen
from ..solvers import AbstractSolver
from ._krylov import Krylov, Window, inverse_bound
from ._residual import (
    AbstractMeasure,
    Residual,
    coupling,
    growth,
    residual_of,
    units,
)

LinearMap = Callable[[PyTree], PyTree]


class _Linear(AbstractSolver):
    """A fixed-point method on `y = b + (I - A) y`, with a stopping measure of its own."""

    inner: AbstractSolver
    measure: AbstractMeasure
    unit: PyTree  # the unit of each leaf in which the method sees it; None: 1
    rtol: float | Inexact[Array, ""] = 0.0
    atol: float | Inexact[Array, ""] = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm

    def error(self, z, fz, memory=None):
        del memory
        return self.measure.error(z, fz)

    def in_units(self, z: PyTree) -> PyTree:
        """Returns z in the units in which the method sees it."""
        return z if self.unit is None else jax.tree.map(jnp.divide, z, self.unit)

    def blank(self, z0):
        return self.inner.blank(z0)

    def mix(self, z, fz, memory):
        z, memory = self.inner.mix(self.in_units(z), self.in_units(fz), memory)
        return z if self.unit is None else jax.tree.map(jnp.multiply, z, self.unit), memory

    def status(self, memory):
        return self.inner.status(memory)


def by_iteration(
    solver: AbstractSolver | None,
    matvec: LinearMap,
    b: PyTree,
    y0: PyTree,
    tol: Any,
    *,
    max_steps: int,
    rank: int,
    sharper: Callable[[Residual], AbstractMeasure] = lambda residual: residual,
) -> tuple[PyTree, dict[str, Any]]:
    """Iterates `y <- b + (I - A) y`, each problem of a batch until its own tolerance.

    `solver=None` sums the Neumann series, and continues with a Krylov method if the series stalls.
    `sharper` turns the relative residual into a measure that says more.
    """
    size, scaled_b = _scaled(b, rank)
    start = scaled_b if y0 is None else _warm(y0, b, size, scaled_b, rank)

    # The measure that y has to meet, and the units in which its leaves are compared.
    if tol is None and solver is not None:
        tol = solver.rtol
    coupled = coupling(matvec, b, rank)
    measure = sharper(residual_of(b, tol, coupled))
    leaf_units = None if coupled is None else per_problem(units, rank)(start, coupled)

    # Iterate on `b / size`.
    def fn(y, scaled_b):
        product = matvec(cast(y, b))
        return jax.tree.map(lambda y, r, b: b + (y - widen(r)), y, product, scaled_b), None

    inner = Krylov() if solver is None else solver
    method = _Linear(inner=inner, measure=measure, unit=leaf_units)
    budget = Budget(max_steps, jnp.asarray(max_steps, jnp.int32), rank, fixed=False)
    y, (num_steps, _, state) = iterate((fn, method, start, scaled_b, budget, lax_while))
    inverse = vary(jnp.ones_like(state.error), mesh_axes(state.error))  # nothing known
    if solver is None:
        inverse = _inverse_norm(state.memory, inverse, rank)

    # Judge each problem, and give its y the size that was taken out.
    def outcome(measure, error, y, b, coupled, inverse):
        good = measure.accepts(error, growth(y, b, coupled), inverse)
        code = RESULTS.where(good, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
        return measure.report(error) | {"result": code}

    def restore(y, s, b):
        return jax.tree.map(lambda y, b: (y * s.astype(y.dtype)).astype(b.dtype), y, b)

    stats = per_problem(outcome, rank)(measure, state.error, y, scaled_b, coupled, inverse)
    return per_problem(restore, rank)(y, size, b), {"num_steps": num_steps} | stats


def _scaled(b: PyTree, rank: int) -> tuple[Inexact[Array, "..."], PyTree]:
    """The size of b, and `b / size`, whose squares do not overflow."""
    size = per_problem(max_abs, rank)(b)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    return size, per_problem(_divided, rank)(jax.tree.map(widen, b), size)


def _divided(x: PyTree, size: Inexact[Array, ""]) -> PyTree:
    return jax.tree.map(lambda x: x / size.astype(x.dtype), x)


def _warm(
    y0: PyTree, b: PyTree, size: Inexact[Array, "..."], scaled_b: PyTree, rank: int
) -> PyTree:
    """`y0 / size`; the default start instead where y0 is not finite, or b, and hence y, is 0."""
    warm = per_problem(_divided, rank)(cast(y0, scaled_b), size)
    usable = per_problem(lambda b, y: (max_abs(b) > 0) & jnp.isfinite(max_abs(y)), rank)
    return select(usable(b, y0), warm, scaled_b)


def _inverse_norm(
    window: Window, unknown: Inexact[Array, "..."], rank: int
) -> Inexact[Array, "..."]:
    """A lower bound on the norm of A's inverse; `unknown` while no problem has left the series."""
    of = lambda window: per_problem(inverse_bound, rank)(window)
    return jax.lax.cond(jnp.any(window.slow), of, lambda _: unknown, window)


def by_lineax(
    linear_solver: lineax.AbstractLinearSolver,
    matvec: LinearMap,
    b: PyTree,
    y0: PyTree,
    tol: Any,
    *,
    rank: int,
) -> tuple[PyTree, dict[str, Any]]:
    """Passes the equation to Lineax, a batch as one system, and judges each problem."""
    axes = mesh_axes(b)
    if axes:
        raise ValueError(
            f"A Lineax solver expects to run outside jax.shard_map, got a system that varies "
            f"over the mesh axes {sorted(map(str, axes))}; use ImplicitAdjoint() there."
        )
    # Solve.
    product = lambda y: unify(matvec(cast(y, b)))
    operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: unify(b)))
    options = {} if y0 is None else {"y0": cast(y0, unify(b))}
    sol = lineax.linear_solve(operator, unify(b), linear_solver, options=options, throw=False)
    y = cast(sol.value, b)
    coupled = coupling(matvec, b, rank)

    # Judge by the tolerance that Lineax was given, but by no less than products can reach.
    asked = getattr(linear_solver, "rtol", None) if tol is None else tol
    measure = residual_of(b, asked, coupled, finest=False)
    failure = RESULTS.promote(sol.result)
    singular: Any = RESULTS.singular
    failure = RESULTS.where(failure == RESULTS.successful, singular, failure)

    def outcome(measure, y, left, b, coupled):
        y, left, b = (jax.tree.map(widen, x) for x in (y, left, b))
        error = measure.error(y, add(y, lincomb(1, b, -1, left)))
        good = measure.accepts(error, growth(y, b, coupled), jnp.ones_like(error))
        return measure.report(error) | {"result": RESULTS.where(good, RESULTS.successful, failure)}

    stats = per_problem(outcome, rank)(measure, y, matvec(y), b, coupled)
    steps = jnp.asarray(sol.stats.get("num_steps", 1), jnp.int32)
    return y, {"num_steps": jnp.broadcast_to(steps, stats["residual"].shape)} | stats


def judged(y: PyTree, stats: dict[str, Any], on_failure: str) -> PyTree:
    """`y`, treated as `on_failure` says for the problems whose solve has failed."""
    failed = stats["result"] != RESULTS.successful
    if on_failure == "nan":
        return select(failed, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), y), y)
    if on_failure == "raise":
        message = (
            "The linear solve of the implicit function theorem failed: I - J is singular or nearly "
            "so, or the steps did not suffice. If f conserves a quantity (J has columns that sum "
            "to 1: probabilities, mass), normalise z inside f; otherwise raise max_steps, or look "
            "at the report of deqjax.implicit_vjp."
        )
        return eqx.error_if(y, jnp.any(failed), message)
    return y

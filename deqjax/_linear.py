"""`A y = b` by products with `A = I - J` or its transpose alone: an implicit gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import optimistix
from jaxtyping import Array, Inexact, PyTree

from ._iterate import Budget, iterate, lax_while
from ._solution import RESULTS, relative_residual
from ._tree import cast, max_abs, mesh_axes, per_problem, unify, widen
from .solvers import AbstractSolver

LinearMap = Callable[[PyTree], PyTree]


class _Neumann(AbstractSolver):
    """Picard iteration that remembers its last increment, and what is left of the series.

    An increment is not an error: at the rate q of the last two, increment q / (1 - q) is to come.
    """

    rtol: float | Inexact[Array, ""]
    atol: float | Inexact[Array, ""]
    norm: Callable[[PyTree], Any] = optimistix.max_norm

    def memory(self, z0):
        unknown = jnp.asarray(jnp.inf, max_abs(z0).dtype)
        return unknown, unknown

    def mix(self, z, fz, memory):
        before, _ = memory
        now = relative_residual(z, fz).astype(before.dtype)
        known = jnp.isfinite(before) & (now < before)
        rest = now * now / jnp.where(known, before - now, 1)
        return fz, (now, jnp.where(known, rest, jnp.inf))


def series(
    matvec: LinearMap, b: PyTree, tol: float | None, *, max_steps: int | None, rank: int
) -> tuple[PyTree, dict[str, Any]]:
    """Sums `b + (I - A) b + (I - A)^2 b + ...`, each problem of a batch until its own tolerance."""
    wide = jax.tree.map(widen, b)
    eps = lambda tree: max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree))
    tol = max(10 * eps(wide), 2 * eps(b)) if tol is None else tol
    # The equation is linear: at unit size a relative tolerance serves as the absolute one.
    size = per_problem(max_abs, rank)(b)
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    divide = lambda x, s: jax.tree.map(lambda x: x / s.astype(x.dtype), x)
    unit = per_problem(divide, rank)(wide, size)

    def fn(y, unit):
        product = matvec(cast(y, b))
        return jax.tree.map(lambda y, r, u: u + (y - widen(r)), y, product, unit), None

    ceiling = 256 if max_steps is None else max_steps
    budget = Budget(ceiling, jnp.asarray(ceiling, jnp.int32), rank, fixed=False)
    y, (num_steps, small, state) = iterate((fn, _Neumann(tol, tol), unit, unit, budget, lax_while))
    # Small at once means that the first term was the whole sum.
    increment, rest = state.memory
    residual = jnp.where(small & (num_steps == 0), 0, increment)
    good = small | (rest <= max(100 * tol, 4 * eps(b)))
    code = lambda good: RESULTS.where(good, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
    restore = lambda y, s, b: jax.tree.map(
        lambda y, b: (y * s.astype(y.dtype)).astype(b.dtype), y, b
    )
    stats = {
        "num_steps": num_steps,
        "residual": residual,
        "result": per_problem(code, rank)(good),
    }
    return per_problem(restore, rank)(y, size, b), stats


def by_lineax(
    linear_solver: lineax.AbstractLinearSolver, matvec: LinearMap, b: PyTree
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
    sol = lineax.linear_solve(operator, unify(b), linear_solver, throw=False)
    y = cast(sol.value, b)
    residual = relative_residual(matvec(y), b)
    num_steps = jnp.asarray(sol.stats.get("num_steps", 1), jnp.int32)
    result = RESULTS.promote(sol.result)
    return y, {"num_steps": num_steps, "residual": residual, "result": result}

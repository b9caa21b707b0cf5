"""The residual of each iterate of a solve."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import check_int
from .._problem import convert, point, precision_of, prepare, steps_before
from .._program import run
from .._solution import relative_residual
from .._step import evaluate, step
from .._tree import mesh_axes, per_problem, vary
from ..solvers import AbstractSolver


def residuals(
    fn: Callable[..., Any],
    solver: AbstractSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    steps: int = 40,
    has_aux: bool = False,
    batched: bool = False,
    indexed: bool = False,
) -> Float[Array, "points ..."]:
    """The relative residual of each iterate, to see how a solver converges.

        ||f(z_k) - z_k||_2 / ||f(z_k)||_2,     k = 0, ..., steps

        jnp.log10(deqjax.residuals(fn, deqjax.Anderson(), z0, args))

    **Arguments:**

    - `fn`, `z0`, `args`, `has_aux`, `batched`, `indexed`: as in `deqjax.fixed_point`.
    - `solver`: a deqjax solver; its tolerances do not stop it.
    - `steps`: the number of steps, an int of at least 1; not a traced budget.

    **Returns:** an array of shape `(steps + 1,)` or, if batched, `(steps + 1, batch)`, in float32
    or wider. Entry k is `sol.stats["residual"]` of `deqjax.fixed_point` after k steps with zero
    tolerances. It is NaN where f is not finite; some solvers come back from there. Where a
    `deqjax.Reversible` state would leave its range it stays, and so does the residual.

    **Cost:** `steps + 1` evaluations of f.

    **When not to use it:** for the residual of a solve's result, which is in `sol.stats`.

    **Raises:** `ValueError` as `deqjax.fixed_point`, and for a solver that is not deqjax's.
    """
    z0, steps = point(z0, batched), check_int("residuals", "steps", steps, "pass a Python number.")
    if not isinstance(solver, AbstractSolver):
        raise ValueError(
            f"residuals expects a deqjax solver, whose iterates it can see, got {solver!r}; "
            f"pass for instance deqjax.FixedPointIteration()."
        )
    solver, budget, _ = prepare(solver, z0, batched, steps, None)
    budget = dataclasses.replace(budget, indexed=indexed)
    before = steps_before("residuals", solver, 0, z0, budget.rank) if indexed else None
    with precision_of(solver):
        fn, z0, args, axes = convert(fn, z0, args, solver, has_aux=has_aux, step=before)
    return run(_residuals, fn, vary(solver, axes), z0, args, budget)


def _residuals(fn, solver, z0, args, budget):
    rank = budget.rank
    solver = solver.prepared(fn, z0, args, rank)
    axes = mesh_axes(fn, solver, z0, args)

    def measured(z, k):
        """f at step k, and the residual as its auxiliary output."""
        fz, _ = evaluate(fn, z, budget.at(args, k))
        return fz, per_problem(relative_residual, rank)(z, fz)

    def body(carry, k):
        z, memory = carry
        out = step(measured, solver, z, k, memory, rank=rank)
        return vary((out.z, out.memory), axes), out.aux

    memory, z = per_problem(lambda s, z0: (s.blank(z0), s.start(z0)), rank)(solver, z0)
    points = jnp.arange(budget.max_steps + 1, dtype=jnp.int32)
    return jax.lax.scan(body, vary((z, memory), axes), points)[1]

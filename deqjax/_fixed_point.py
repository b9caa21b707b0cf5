"""The entry point: solves a fixed-point problem."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Int, PyTree

from ._iterate import LoopResult, LoopState, iterate
from ._problem import (
    Budget,
    OptimistixSolver,
    check_optimistix,
    check_state,
    check_unmapped,
    convert,
    precision_of,
    prepare,
    steps_before,
)
from ._program import run
from ._solution import RESULTS, Solution, completed, outcome, raise_unsuccessful
from ._step import evaluate, residual
from ._tree import vary
from .adjoints import AbstractAdjoint, AbstractFixedPointAdjoint, ImplicitAdjoint
from .solvers import AbstractSolver


def fixed_point(
    fn: Callable[..., Any],
    solver: OptimistixSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    has_aux: bool = False,
    batched: bool = False,
    indexed: bool = False,
    max_steps: int = 256,
    steps: int | Int[Array, "..."] | None = None,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),
    throw: bool = False,
) -> Solution:
    """Solves `z = f(z, args)` for `z`.

    **Arguments:**

    - `fn`: `fn(z, args) -> z'`, or `(z', aux)` with `has_aux=True`; `z'` has the structure, shapes
        and dtypes of `z`.
    - `solver`: a deqjax solver, or any Optimistix one (`optimistix.Newton(rtol=..., atol=...)`).
        With `rtol=0, atol=0` a deqjax solver takes exactly `max_steps` (or `steps`) steps.
    - `z0`: the initial iterate, any pytree of float arrays, real or complex; integers are promoted.
        Derivatives of complex numbers follow JAX's convention, whether f is holomorphic or not.
    - `args`: passed on to `fn`; any pytree.
    - `has_aux`: whether `fn` returns `(z', aux)`.
    - `batched`: axis 0 of every leaf of z is a batch of independent problems. `fn` sees the whole
        batch; each problem stops on its own tolerance and is then frozen; the cotangent of what
        `fn` shares between problems is accumulated once. `jax.vmap` of this function does the same
        at the same cost; with `deqjax.RecursiveCheckpointAdjoint` and a tolerance, however, it
        makes one cotangent per example. As everywhere in JAX, an example at which f is NaN makes
        the gradient of shared parameters NaN, even if the loss masks the example: replace its input
        before the solve.
    - `indexed`: `fn` is `fn(z, args, step)`, where `step` counts the steps before this evaluation:
        0 at z0, `num_steps` at `value`; int32 of shape `()` or, if batched, `(batch,)`. A backward
        pass gives f the same numbers. This is for noise (`jax.random.fold_in(key, step)`; with one
        key, all problems of a batch have the same), an embedding of the step, or a schedule. f is
        evaluated once more at `value`, so that a table needs `max_steps + 1` rows. The default
        adjoint refuses it: pass `deqjax.ReversibleAdjoint`, or `deqjax.RecursiveCheckpointAdjoint`.
    - `max_steps`: the ceiling on steps, an int of at least 1.
    - `steps`: an int array of at most `max_steps`, of shape `()` or, if batched, `(batch,)`: a
        ceiling that may be traced and never recompiles.
    - `adjoint`: a deqjax or an Optimistix adjoint, which differentiates the solve.
    - `throw`: raise at run time unless every result is successful. Leave it off in training: the
        check gathers results on one device and defeats the compilation cache.

    **Returns:** a `Solution` with

    - `value`: the iterate at which the residual is reported: `z_n` after n steps. If the steps run
        out before the tolerance is met: the best iterate, by the measure of the stopping test. With
        zero tolerances, or `deqjax.Reversible`, always `z_n`.
    - `result`: one `deqjax.RESULTS` code per problem: `successful` (met its tolerance, or took the
        fixed number of steps), `nonlinear_max_steps_reached`, `nonfinite`, or
        `nonlinear_divergence` (an entry above sqrt(largest float), an integer state out of its
        range, or a traced solver field out of its range).
    - `aux`: the auxiliary output of the evaluation at `value`, differentiated there.
    - `stats`: `"num_steps"`, `"num_fn_evals"` (one more), `"residual"`
        `||f(z) - z||_2 / ||f(z)||_2` in float32 or wider, `"overflow"` (an integer state would have
        left its range), each with one entry per problem; and `"max_steps"`.

    **Cost:** `num_steps + 1` evaluations of `f`. With a tolerance the last one is repeated outside
    the loop, if a residual, a result or an aux is used. Outside `jax.jit`, each call also traces
    `fn`, and takes some milliseconds more per function in `fn` that has a derivative rule.

    Each such call reads `fn` anew: what it closes over, globals, and the state of a bound method. A
    program is compiled for what `fn` does, not for the object: a new lambda of the same body
    compiles nothing, and arrays that it closes over are arguments of the program. Another Python
    number in `fn` or in `args` makes another program; the last 64 programs are kept. A function
    that cannot be compared is compiled at each call: your own norm, or norm of a linear solver,
    that uses more than its arguments and library functions; a callback; a derivative rule that
    closes over arrays or asks which tangents are zero; another fixed point.

    Inside `jax.shard_map`, `fn` may not communicate between devices: they stop at different steps.

    **Raises:** `ValueError` when traced, if `fn` changes the structure, a shape or a dtype of z, if
    z0 holds booleans or no numbers, for `max_steps < 1`, a solver field out of its range, a solver
    and an adjoint that do not fit together, `indexed` with one that needs the same f at each step,
    batch axes of unequal length, `steps` of a wrong dtype, shape or range, or an Optimistix solver
    inside `jax.shard_map`.
    """
    options = {"has_aux": has_aux, "batched": batched, "max_steps": max_steps, "steps": steps}
    before = 0 if indexed else None
    sol = solve(fn, solver, z0, args, adjoint=adjoint, best=True, before=before, **options)
    return raise_unsuccessful(sol) if throw else sol


def solve(
    fn: Callable[..., Any],
    solver: OptimistixSolver,
    z0: PyTree,
    args: PyTree,
    *,
    has_aux: bool,
    batched: bool,
    max_steps: int,
    steps: int | Int[Array, "..."] | None,
    adjoint: AbstractAdjoint,
    best: bool,
    before: int | Int[Array, "..."] | None,
) -> Solution:
    """`fixed_point` without `throw`; with `best=False` it returns `z_n` even if steps run out.

    `before` is the number of steps that z0 has had; None: `fn` takes no step number.
    """
    z0, max_steps = check_state(z0, batched, max_steps)
    indexed = before is not None
    check_adjoint(adjoint, indexed)
    # Optimistix iterates its own solvers; for ours, prepare the budget.
    if not isinstance(solver, AbstractSolver):
        check_optimistix(solver, batched, indexed, steps)
        fn, z0, args, _ = convert(fn, z0, args, has_aux=has_aux)
        check_unmapped(solver, fn, z0, args)
        return run(_solve_optimistix, fn, solver, z0, args, adjoint, max_steps)
    solver, budget, requested = prepare(solver, z0, batched, max_steps, steps)
    budget = dataclasses.replace(budget, best=best, indexed=indexed)
    step = steps_before("fixed_point", solver, before, z0, budget.rank) if indexed else None
    with precision_of(solver):
        fn, z0, args, axes = convert(fn, z0, args, solver, budget, has_aux=has_aux, step=step)
    solver, budget = vary((solver, budget), axes)
    return run(_solve, fn, solver, z0, args, budget, requested, adjoint)


def _solve(fn, solver, z0, args, budget, requested, adjoint) -> Solution:
    solver = solver.prepared(fn, z0, args, budget.rank)
    inputs = (fn, solver, z0, args, budget)
    rewrite = ft.partial(_no_residual, adjoint) if budget.indexed else residual
    z, loop = adjoint.apply(iterate, rewrite, inputs, frozenset())

    # Outside the differentiated loop, gradients of aux and residual cost nothing extra, and the
    # compiler drops what is not used.
    args = budget.at(args, loop.state.index)
    fz, aux = evaluate(fn, z, args)
    complete = completed(solver, z, fz, loop, budget, requested)
    result, stats = outcome(z, fz, loop, complete, solver.in_range(), budget)
    stats |= solver.stats(fn, z, args, loop.state.memory, ~complete, budget.rank)
    return Solution(value=z, result=result, aux=aux, stats=stats, state=None)


def _solve_optimistix(fn, solver, z0, args, adjoint, max_steps) -> Solution:
    find = ft.partial(optimistix.fixed_point, has_aux=True, max_steps=max_steps, throw=False)

    def primal(inputs):
        sol = find(*inputs[:4])
        return sol.value, LoopResult(
            jnp.asarray(sol.stats["num_steps"], jnp.int32), sol.result, None
        )

    # Solve, and differentiate.
    if isinstance(adjoint, AbstractFixedPointAdjoint):
        # Our residual is f(z) - z; Optimistix's minimisers would pass the gradient of its square.
        terms = max(256, max_steps)
        budget = Budget(terms, jnp.asarray(terms), rank=0, fixed=False)
        inputs = (fn, solver, z0, args, budget)
        z, (num_steps, result, _) = adjoint.apply(primal, residual, inputs, frozenset())
    else:
        sol = find(fn, solver, z0, args, adjoint=adjoint)
        z, result = sol.value, sol.result
        num_steps = jnp.asarray(sol.stats["num_steps"], jnp.int32)

    # Report Optimistix's result, unless the evaluation at z shows a numerical failure.
    fz, aux = evaluate(fn, z, args)
    budget = Budget(max_steps, num_steps, rank=0, fixed=False)
    yes = jnp.asarray(True)
    loop = LoopResult(num_steps, yes, LoopState(None, ~yes, jnp.asarray(0.0), num_steps))
    ours, stats = outcome(z, fz, loop, yes, yes, budget)
    result = RESULTS.where(ours == RESULTS.successful, result, ours)
    return Solution(value=z, result=result, aux=aux, stats=stats, state=None)


def check_adjoint(adjoint: Any, indexed: bool) -> None:
    """Raises `ValueError` unless `adjoint` is an instance, and fits an f that is `indexed`."""
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(
            f"fixed_point expects a deqjax or an Optimistix adjoint, got {adjoint!r}; "
            f"pass an instance, for instance adjoint=deqjax.ImplicitAdjoint()."
        )
    if indexed and isinstance(adjoint, AbstractFixedPointAdjoint | optimistix.ImplicitAdjoint):
        raise ValueError(_OF_STEPS.format(type(adjoint).__name__))


def _no_residual(adjoint: Any, z: PyTree, _: Any, inputs: tuple) -> PyTree:
    """Refuses an adjoint that reads `f(z) - z`: there is another f at each step."""
    raise ValueError(_OF_STEPS.format(f"{type(adjoint).__name__}, which reads f(z) - z"))


_OF_STEPS = (
    "fixed_point with indexed=True expects an adjoint of the steps taken, since an f that changes "
    "from step to step has no fixed point to differentiate, got {}; pass "
    "adjoint=deqjax.ReversibleAdjoint() with deqjax.Reversible, or "
    "adjoint=deqjax.RecursiveCheckpointAdjoint() with deqjax.FixedPointIteration (with "
    "deqjax.Anderson and deqjax.Broyden in float64 alone)."
)

"""The front door: the solve that everything else is for."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Int, PyTree

from ._iterate import LoopResult, Memory, iterate
from ._problem import (
    Budget,
    OptimistixSolver,
    check_optimistix,
    check_state,
    check_unmapped,
    convert,
    precision_of,
    prepare,
)
from ._program import run
from ._solution import RESULTS, Solution, completed, outcome, raise_unsuccessful
from ._step import evaluate, residual
from ._tree import vary
from .adjoints import AbstractAdjoint, AbstractFixedPointAdjoint, ImplicitAdjoint
from .solvers import AbstractSolver


def fixed_point(
    fn: Callable[[PyTree, PyTree], Any],
    solver: OptimistixSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    has_aux: bool = False,
    batched: bool = False,
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
        batch; each problem stops on its own tolerance and is frozen from then on; the cotangent of
        what `fn` shares between problems is accumulated once. `jax.vmap` of this function does the
        same at the same cost, except with `deqjax.RecursiveCheckpointAdjoint` and a tolerance,
        where it makes one cotangent per example. As everywhere in JAX, an example at which f is NaN
        makes the gradient of shared parameters NaN, however the loss masks it: replace its input
        before the solve.
    - `max_steps`: the ceiling on mixes, an int of at least 1.
    - `steps`: an int array, at most `max_steps`, of shape `()` or, batched, `(batch,)`: a ceiling
        that may be traced and never recompiles.
    - `adjoint`: how the solve is differentiated; a deqjax or an Optimistix adjoint.
    - `throw`: raise at run time unless every result is successful. Leave it off in training: the
        check gathers results on one device and defeats the compilation cache.

    **Returns:** a `Solution` with

    - `value`: the iterate whose residual is reported: `z_n` after n steps; where these ran out
        before the tolerance was met, the best one by the measure of the stopping test. With zero
        tolerances, or `deqjax.Reversible`, always `z_n`.
    - `result`: one `deqjax.RESULTS` code per problem: `successful` (met its tolerance, or took the
        fixed number of steps), `nonlinear_max_steps_reached`, `nonfinite`, or
        `nonlinear_divergence` (an entry above sqrt(largest float), an integer state out of its
        range, or a traced solver field out of its range).
    - `aux`: of the evaluation at `value`, differentiated as such.
    - `stats`: `"num_steps"` mixes, `"num_fn_evals"` (one more), `"residual"`
        `||f(z) - z||_2 / ||f(z)||_2` in float32 or wider, `"overflow"` (an integer state would have
        left its range), each with one entry per problem; and `"max_steps"`.

    **Cost:** `num_steps + 1` evaluations of `f`. With a tolerance the last one is made again,
    outside the loop, if a residual, a result or an aux is used. Outside a `jax.jit` also one trace
    of `fn` a call, some milliseconds more for each function in it that has a derivative rule.

    `fn` is read at each such call: what it closes over, a global, or the state of a bound method is
    what it is now. A program is compiled for what `fn` does, not for the object: a new lambda of
    the same body compiles nothing, and arrays that it closes over are arguments of the program.
    Another Python number in it or in `args` is another program, of which the last 64 are kept; and
    none is kept, so that each call compiles, where what is called cannot be compared: a norm or a
    linear solver's norm of your own that is more than its arguments and library functions, a
    callback, a derivative rule that closes over arrays or asks which tangents are zero.

    Inside `jax.shard_map`, `fn` may not communicate between devices, which stop at different steps.

    **Raises:** `ValueError` when traced, if `fn` changes the structure, a shape or a dtype of z, if
    z0 holds booleans or no numbers, for `max_steps < 1`, a solver field out of its range, a solver
    and an adjoint that do not go together, batch axes of unequal length, `steps` out of place, or
    an Optimistix solver inside `jax.shard_map`.
    """
    options = {"has_aux": has_aux, "batched": batched, "max_steps": max_steps, "steps": steps}
    sol = solve(fn, solver, z0, args, adjoint=adjoint, best=True, **options)
    return raise_unsuccessful(sol) if throw else sol


def solve(
    fn: Callable[[PyTree, PyTree], Any],
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
) -> Solution:
    """`fixed_point`, which with `best=False` returns `z_n` even if the steps run out."""
    z0, max_steps = check_state(z0, batched, max_steps)
    _check_adjoint(adjoint)
    if not isinstance(solver, AbstractSolver):
        check_optimistix(solver, batched, steps)
        fn, z0, args, _ = convert(fn, z0, args, has_aux=has_aux)
        check_unmapped(solver, fn, z0, args)
        return run(_solve_optimistix, fn, solver, z0, args, adjoint, max_steps)
    prepared, budget, requested = prepare(solver, z0, batched, max_steps, steps)
    budget = dataclasses.replace(budget, best=best)
    with precision_of(prepared):
        fn, z0, args, axes = convert(fn, z0, args, prepared, budget, has_aux=has_aux)
    prepared, budget = vary((prepared, budget), axes)
    return run(_solve, fn, prepared, z0, args, budget, requested, adjoint)


def _solve(fn, solver, z0, args, budget, requested, adjoint) -> Solution:
    solver = solver.prepared(fn, z0, args, budget.rank)
    inputs = (fn, solver, z0, args, budget)
    z, loop = adjoint.apply(iterate, residual, inputs, frozenset())

    # Outside the differentiated loop: gradients of aux and residual come free, and what is not
    # used is not computed.
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

    if isinstance(adjoint, AbstractFixedPointAdjoint):
        # Of f(z) - z itself: Optimistix's minimisers would hand over the gradient of its square.
        terms = max(256, max_steps)
        budget = Budget(terms, jnp.asarray(terms), rank=0, fixed=False)
        inputs = (fn, solver, z0, args, budget)
        z, (num_steps, result, _) = adjoint.apply(primal, residual, inputs, frozenset())
    else:
        sol = find(fn, solver, z0, args, adjoint=adjoint)
        z, result = sol.value, sol.result
        num_steps = jnp.asarray(sol.stats["num_steps"], jnp.int32)
    fz, aux = evaluate(fn, z, args)
    budget = Budget(max_steps, num_steps, rank=0, fixed=False)
    yes = jnp.asarray(True)
    loop = LoopResult(num_steps, yes, Memory(None, ~yes, jnp.asarray(0.0)))
    mine, stats = outcome(z, fz, loop, yes, yes, budget)
    result = RESULTS.where(mine == RESULTS.successful, result, mine)
    return Solution(value=z, result=result, aux=aux, stats=stats, state=None)


def _check_adjoint(adjoint: Any) -> None:
    """An instance of an adjoint."""
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(
            f"fixed_point expects a deqjax or an Optimistix adjoint, got {adjoint!r}; "
            f"pass an instance, for instance adjoint=deqjax.ImplicitAdjoint()."
        )

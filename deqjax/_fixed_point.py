"""The front door: validation, result codes."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Int, PyTree

from ._iterate import Budget, iterate, problems
from ._solution import RESULTS, Solution, raise_unsuccessful, relative_residual, result_code
from ._step import evaluate, is_small, residual
from ._tree import is_traced, mesh_axes, per_problem, vary
from .adjoints import AbstractAdjoint, ImplicitAdjoint
from .solvers import AbstractSolver

OptimistixSolver = (
    optimistix.AbstractFixedPointSolver
    | optimistix.AbstractRootFinder
    | optimistix.AbstractLeastSquaresSolver
    | optimistix.AbstractMinimiser
)


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
    - `z0`: the initial iterate, any pytree of float arrays.
    - `args`: passed on to `fn`; any pytree.
    - `has_aux`: whether `fn` returns `(z', aux)`.
    - `batched`: axis 0 of every leaf of z is a batch of independent problems. `fn` sees the whole
        batch; each problem stops on its own tolerance and is frozen from then on; the cotangent of
        what `fn` shares between problems is accumulated once. That is the fast form: `jax.vmap` of
        this function carries one parameter cotangent per example through the backward loop.
    - `max_steps`: the ceiling on mixes, an int of at least 1.
    - `steps`: an int array, at most `max_steps`, of shape `()` or, batched, `(batch,)`: a ceiling
        that may be traced and never recompiles.
    - `adjoint`: how the solve is differentiated; a deqjax or an Optimistix adjoint.
    - `throw`: raise at run time unless every result is successful. Leave it off in training: the
        check gathers results on one device and defeats the compilation cache.

    **Returns:** a `Solution` with

    - `value`: `z_n`, the iterate whose residual is reported.
    - `result`: one `deqjax.RESULTS` code per problem: `successful` (met its tolerance, or took the
        fixed number of steps), `nonlinear_max_steps_reached`, `nonfinite`, or
        `nonlinear_divergence` (an entry above sqrt(largest float), or a traced solver field out of
        its range).
    - `aux`: of the evaluation at `value`, differentiated as such.
    - `stats`: `"num_steps"` mixes, `"num_fn_evals"` (one more), `"residual"`
        `||f(z) - z||_2 / ||f(z)||_2` in float32 or wider, `"overflow"` (integer states only), each
        with one entry per problem; and `"max_steps"`.

    **Cost:** `num_steps + 1` evaluations of `f`. After a stop on a tolerance the last one is made
    again, outside the loop, if a residual, a result or an aux is used.

    Like `jax.jit`, it traces `fn` once for each function object and shapes of its inputs: what
    changes between calls has to come through `args`, `z0`, an Equinox module, or a new function
    object.

    **Raises:** `ValueError` when traced, if `fn` changes the structure, a shape or a dtype of z, if
    z0 is not of floating point, for `max_steps < 1`, a solver field out of its range, a solver and
    an adjoint that do not go together, batch axes of unequal length, or `steps` out of place.
    """
    z0 = _float_state(z0)
    if batched:
        _check_batch(z0)
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(
            f"fixed_point expects max_steps to be an int of at least 1, got {max_steps!r}; "
            f"pass a smaller, traced budget as steps=..."
        )
    _check_adjoint(adjoint)
    if not isinstance(solver, AbstractSolver):
        _check_optimistix(solver, batched, steps)
        sol = _solve_optimistix(fn, solver, z0, args, adjoint, max_steps=max_steps, has_aux=has_aux)
        return raise_unsuccessful(sol) if throw else sol

    solver.check()
    known_zero = lambda x: not is_traced(x) and float(x) == 0
    fixed = known_zero(solver.rtol) and known_zero(solver.atol)
    # As arrays, so that another tolerance or budget does not recompile.
    tolerances = [jnp.asarray(x, jnp.result_type(float)) for x in (solver.rtol, solver.atol)]
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, tolerances)
    requested = _check_steps(steps, max_steps, problems(z0, batched))
    budget = Budget(max_steps, jnp.clip(requested, 0, max_steps), batched, fixed)
    sol = _solve(fn, solver, z0, args, budget, requested, adjoint, has_aux=has_aux)
    return raise_unsuccessful(sol) if throw else sol


@eqx.filter_jit
def _solve(fn, solver, z0, args, budget, requested, adjoint, *, has_aux) -> Solution:
    converted = _convert(fn, z0, args, has_aux)
    axes = mesh_axes(converted, solver, z0, args, budget)
    if axes:  # Then only what f closes over may still be constant over a mesh axis.
        fn, solver, z0, args, budget = vary((fn, solver, z0, args, budget), axes)
        converted = _convert(fn, z0, args, has_aux)
    fn, inputs = converted, (converted, solver, z0, args, budget)
    z, (num_steps, small, _) = adjoint.apply(iterate, residual, inputs, frozenset())

    # Outside the differentiated loop: gradients of aux and residual come free, and what is not
    # used is not computed.
    fz, aux = evaluate(fn, z, args)
    small = small | per_problem(ft.partial(is_small, solver), budget.batched)(z, fz)
    # Zero tolerances, traced or not, ask for a number of steps.
    untested = (solver.rtol == 0) & (solver.atol == 0)
    complete = jnp.where(untested, num_steps == requested, small)
    return _solution(z, fz, aux, complete, solver.in_range(), num_steps, budget)


def _solve_optimistix(fn, solver, z0, args, adjoint, *, max_steps, has_aux) -> Solution:
    fn = _convert(fn, z0, args, has_aux)
    sol = optimistix.fixed_point(
        fn, solver, z0, args, has_aux=True, max_steps=max_steps, adjoint=adjoint, throw=False
    )
    fz, aux = evaluate(fn, sol.value, args)
    num_steps = jnp.asarray(sol.stats["num_steps"], jnp.int32)
    budget = Budget(max_steps, num_steps, batched=False, fixed=False)
    ok = jnp.asarray(True)
    mine = _solution(sol.value, fz, aux, ok, ok, num_steps, budget)
    result = RESULTS.where(mine.result == RESULTS.successful, sol.result, mine.result)
    return eqx.tree_at(lambda s: s.result, mine, result)


def _solution(z, fz, aux, complete, in_range, num_steps, budget) -> Solution:
    def report(z, fz, complete):
        return result_code(z, fz, complete, in_range), relative_residual(z, fz)

    result, size = per_problem(report, budget.batched)(z, fz, complete)
    stats = {
        "num_steps": num_steps,
        "num_fn_evals": num_steps + 1,
        "residual": size,
        "max_steps": budget.max_steps,
        "overflow": jnp.zeros(num_steps.shape, bool),
    }
    return Solution(value=z, result=result, aux=aux, stats=stats, state=None)


def _convert(fn, z0, args, has_aux):
    """`fn` as `(z, args) -> (z', aux)`, a pytree of all arrays it holds or closes over, checked."""

    def call(z, args):
        out = fn(z, args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                f"With has_aux=True fn is expected to return a pair (z', aux), got "
                f"{type(out).__name__}; return a pair, or leave has_aux out."
            )
        fz, aux = out if has_aux else (out, None)
        return jax.tree.map(jnp.asarray, fz), aux

    converted = eqx.filter_closure_convert(call, z0, args)
    got, _ = converted.out_struct  # pyright: ignore[reportFunctionMemberAccess]
    show = lambda tree: eqx.tree_pformat(tree, struct_as_array=True)
    like = jax.eval_shape(lambda: z0)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    if jax.tree.structure(got) != jax.tree.structure(like) or not all(
        map(same, jax.tree.leaves(got), jax.tree.leaves(like))
    ):
        raise ValueError(
            f"fn is expected to return the structure, shapes and dtypes of z0, {show(like)}, got "
            f"{show(got)}; cast or reshape its output, start from another z0, or pass has_aux=True "
            f"if that is a pair (z', aux)."
        )
    return converted


def _float_state(z0):
    leaves = jax.tree.leaves(z0)
    if not leaves:
        raise ValueError(f"z0 is expected to hold at least one float array, got {z0!r}.")
    for x in leaves:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"z0 is expected to be a pytree of real floating-point arrays, got a leaf of dtype "
                f"{dtype}; cast it, for instance with jnp.asarray(z0, float)."
            )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), z0)


def _check_batch(z0):
    shapes = [x.shape for x in jax.tree.leaves(z0)]
    if any(len(s) == 0 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"With batched=True every leaf of z0 is expected to have a batch of the same length on "
            f"axis 0, got the shapes {shapes}; add or align that axis, or use batched=False."
        )


def _check_steps(steps, max_steps, shape):
    """The requested number of steps as an int32 array of shape `()` or `shape`."""
    known = not is_traced(steps)
    steps = np.asarray(max_steps if steps is None else steps) if known else steps
    if not jnp.issubdtype(steps.dtype, jnp.integer) or steps.shape not in {(), shape}:
        allowed = " or ".join(map(str, {(): None, shape: None}))
        raise ValueError(
            f"fixed_point expects steps to be an integer array of shape {allowed}, got "
            f"{steps.dtype} of shape {steps.shape}; one budget per problem needs batched=True."
        )
    if known and not np.all((steps >= 0) & (steps <= max_steps)):
        raise ValueError(
            f"fixed_point expects 0 <= steps <= max_steps={max_steps}, got steps={steps}; "
            f"raise max_steps, which is the ceiling."
        )
    return jnp.asarray(steps, jnp.int32)


def _check_adjoint(adjoint):
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(
            f"fixed_point expects a deqjax or an Optimistix adjoint, got {adjoint!r}; "
            f"pass an instance, for instance adjoint=deqjax.ImplicitAdjoint()."
        )


def _check_optimistix(solver, batched, steps):
    if not isinstance(solver, OptimistixSolver):
        raise ValueError(
            f"fixed_point expects a deqjax or an Optimistix solver, got {solver!r}; "
            f"pass an instance, for instance deqjax.FixedPointIteration()."
        )
    name = type(solver).__name__
    if batched or steps is not None:
        raise ValueError(
            f"batched=True and steps=... are expected with a deqjax solver, got the Optimistix "
            f"solver {name}; use jax.vmap for a batch, and max_steps as the ceiling."
        )

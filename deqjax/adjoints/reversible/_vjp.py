"""The reversible solve and its backward sweep as a plain function, with its outcome."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Int, PyTree

from ..._problem import check_output, check_state, prepare, steps_before
from ..._program import run
from ..._solution import completed, outcome
from ..._traced import trace
from ..._tree import strong
from ...solvers import Reversible
from .._arrays import arrays_of
from .._base import check_cotangent
from ._adjoint import ReversibleAdjoint
from ._flat import flatten
from ._sweep import judged, recorded, sweep


def reversible_vjp(
    fn: Callable[..., PyTree],
    solver: Reversible,
    z0: PyTree,
    args: PyTree,
    cotangent: PyTree,
    *,
    adjoint: ReversibleAdjoint = ReversibleAdjoint(),
    batched: bool = False,
    indexed: bool = False,
    max_steps: int = 256,
    steps: int | Int[Array, "..."] | None = None,
) -> tuple[tuple[PyTree, PyTree, PyTree], dict[str, Any]]:
    """The solve and the backward pass of `deqjax.ReversibleAdjoint` as one plain function.

    With g the cotangent of the value `s[n]`: `(ds[n]/dtheta)^T g`, for the arrays theta of `fn`,
    of `args` and of `z0`, by the steps taken; and the outcome of the reversal.

    **Arguments:**

    - `fn`, `solver`, `z0`, `args`, `batched`, `indexed`, `max_steps`, `steps`: as in
        `deqjax.fixed_point`.
    - `cotangent`: of the structure, shapes and dtypes of `z0`.
    - `adjoint`: the way to reverse, and the treatment of a gradient that cannot be trusted.

    **Returns:** `((d_fn, d_args, d_z0), stats)`. If `fn` is a pytree with inexact arrays (an
    Equinox module), `d_fn` has its structure, with `None` for the other leaves. If `fn` is a plain
    function, `d_fn` is a list of the cotangents of the inexact arrays that it closes over, in order
    of first use. `stats` has, with one entry per problem,

    - `"value"`: `s[n]`; `"result"`, `"num_steps"`, `"num_fn_evals"`, `"residual"`, `"overflow"` and
        `"max_steps"`: as in `deqjax.fixed_point`.
    - `"reversal_residual"`: in the exact mode, the largest difference between the states at which
        the sweep arrives and the true ones, 0 if and only if they are equal; with `last`, infinite
        if their checksums differ. In the floating-point mode, the largest difference from a known
        state, relative to the size of the states. Infinite if the integers could not take a step,
        forwards or back.
    - `"trusted"`: whether the reversal residual is within the bound of `adjoint`.
    - `"guard"`: from 0 to 1, the largest difference between the two evaluations of f, over the
        largest that `guard_bits` can correct. Near 1, raise `guard_bits` or lower `fraction_bits`;
        a larger difference is found by the reversal residual. 0 without guard digits.

    **Cost:** that of the solve and of `adjoint`.

    **When not to use it:** inside a loss, where `deqjax.fixed_point` with the adjoint does this.

    **Raises:** `ValueError` as `deqjax.fixed_point` and `deqjax.ReversibleAdjoint` do, if the
    cotangent is not shaped like `z0`, or if `fn` both holds and closes over inexact arrays.
    """
    z0, max_steps = check_state(z0, batched, max_steps)
    cotangent = strong(cotangent)
    check_cotangent("reversible_vjp", z0, cotangent)
    adjoint.check_solver(solver)
    prepared, budget, requested = prepare(solver, z0, batched, max_steps, steps)
    budget = dataclasses.replace(budget, indexed=indexed)
    step = [steps_before("reversible_vjp", solver, 0, z0, budget.rank)] if indexed else []
    own, form = arrays_of("reversible_vjp", fn, z0, args, *step)
    check_output(own.call.out_struct, z0)
    d, d_z0, stats = run(_reversible_vjp, own, prepared, z0, cotangent, budget, requested, adjoint)
    return (*form(d), d_z0), stats


def _reversible_vjp(own, solver, z0, cotangent, budget, requested, adjoint):
    apply = trace(lambda z, at: (at.call(at.own, z, at.args), None), z0, own)
    solver = solver.prepared(apply, z0, own, budget.rank)
    arrays, treedef = jax.tree.flatten(own)
    flat = flatten(apply, arrays, solver, z0, budget, adjoint.tape(solver, z0))
    moving = [eqx.is_inexact_array(x) for x in flat.arrays]
    (z, loop), rec = recorded(flat)
    fz = flat.f(budget.at(flat.arrays, loop.num_steps), z)
    complete = completed(solver, z, fz, loop, budget, requested)
    result, stats = outcome(z, fz, loop, complete, solver.in_range(), budget)
    out, found = sweep(flat, moving, rec, cotangent)
    stats |= {
        "value": z,
        "result": result,
        "reversal_residual": found.gap,
        "trusted": found.gap <= flat.tape.bound(z0),
        "guard": found.guard,
    }
    out = judged(flat, out, found, cotangent, adjoint.on_failure)
    return jax.tree.unflatten(treedef, out.arrays), out.z0, stats

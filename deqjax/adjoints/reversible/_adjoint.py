from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from ..._checks import check_choice, is_int, renamed
from ..._iterate import LoopResult, lax_while
from ..._problem import Budget
from ..._step import AbstractTape
from ..._tree import stop_gradient
from ...solvers import Reversible
from .._base import AbstractAdjoint, check_ceiling, check_last, unpack, with_tangent
from ._flat import flatten
from ._linearise import linear, tangents_of
from ._sweep import recorded
from ._tape import Digits, Segments, segment_length


class ReversibleAdjoint(AbstractAdjoint):
    """Differentiates the steps of `deqjax.Reversible` by running them backwards.

    With `g[k]` the cotangent of the iterate `s[k]`, for k = n, ..., 1 a step is undone, `f` is
    evaluated at the same point, and the transpose of the step is applied:

        s[k-2]  = (s[k] - beta f(s[k-1])) / (1 - beta)
        g[k-1] += beta J(s[k-1])^T g[k]
        g[k-2] += (1 - beta) g[k]

    and the cotangents of everything that `f` depends on are summed.

    **Exact mode** of the solver: states are undone bit for bit, so that the gradient is that of
    the steps taken at any depth, with the rounding error of ordinary backpropagation. `f` may be
    rounded differently in the forward and in the backward program, within the solver's
    `guard_bits`. With `guard_bits=0` it has to give the same bits in both: this holds on one device
    and for data parallelism, and not for a cell sharded over tensors. The check is at the end: the
    sweep has to arrive exactly at z0. Draw random numbers from the step number (`indexed=True`), or
    once per solve, and pass them in.

    **Floating-point mode**: every k-th pair of states is stored. The reversal is compared with each
    pair, and starts again from it.

    A problem whose cotangent is zero, because the loss masks it, does not affect the gradient of
    another. Under `jax.vmap(..., axis_name=...)` `f` may not use that axis.

    **Arguments:**

    - `on_failure`: the result of a gradient whose reversal failed: `"nan"`, `"raise"` a run-time
        error, `"keep"` no change. In the exact mode, the reversal fails if it does not end exactly
        at z0; in the floating-point mode, if it misses a stored state by more than `10 sqrt(u)`
        of its size, with u the unit roundoff. `deqjax.reversible_vjp` reports the outcome.
    - `segment`: k, only for the floating-point mode. `"auto"` lets the reversal lose half of the
        digits, `(1 / |1 - beta|)^k = u^(-1/2)`: 12 steps at beta = 1/2 and 5 at 0.8 in float32;
        for a beta that is an array, as for `|1 - beta| = 1/10`. `None` is the textbook sweep: only
        z0 is known, and nothing is checked. After n steps the early states have a relative error of
        about `u |1 - beta|^-n` (0.25 after 22 steps at beta = 1/2 in float32); up to the
        contraction of f, the gradient has it too.
    - `last`: K, to differentiate only the last K steps of each problem (truncated backpropagation),
        as if `jax.lax.stop_gradient` stood on the state before them. z0 then has the gradient 0,
        unless the problem took at most K steps. `None`: all steps. In the exact mode that state is
        compared by a checksum of 32 bits, so that a wrong reversal is not noticed with a
        probability of 2^-32. In the floating-point mode, states before the first pair that is
        stored within these steps are not compared; if K < k there may be none.

    **Cost:** backwards, one evaluation of `f` with its VJP for each step that is differentiated;
    with `guard_bits=0` one more evaluation. Stored for the backward pass, per entry of z: two
    states (8 bytes in float32); in the exact mode the digits that `deqjax.Reversible` counts; in
    the floating-point mode two states every k steps. With `last` it is those of K steps, 4 bytes
    for each step and problem, and a hash of the state in each forward step. In the sweep, five
    copies of `z` and one of the parameters, for any number of steps; under `jax.vmap` too, only one
    of those that examples share. Called by Optimistix, the steps are taken a second time for the
    record.

    Forward mode differentiates the recurrence as it runs. Higher derivatives, in any order of
    modes, differentiate it by checkpoints, `sqrt(max_steps)` states, or `sqrt(K)` with `last`.

    **When not to use it:** at a converged fixed point, where `deqjax.ImplicitAdjoint` needs no
    steps; for an `f` that differs from call to call (use `deqjax.RecursiveCheckpointAdjoint`).

    **Raises:** `ValueError` with a solver other than `deqjax.Reversible`, for an `on_failure`,
    `segment` or `last` that is none of the above, or through Optimistix with no `max_steps`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the backward pass of section 3.
    """

    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True)
    segment: int | Literal["auto"] | None = eqx.field(static=True)
    last: int | None = eqx.field(static=True)

    def __init__(
        self,
        on_failure: Literal["nan", "keep", "raise"] = "nan",
        segment: int | Literal["auto"] | None = "auto",
        last: int | None = None,
        *,
        check: Literal["nan", "off", "raise"] | None = None,
    ):
        if check is not None:
            renamed("ReversibleAdjoint(check=...)", "on_failure=...")
            on_failure = "keep" if check == "off" else check
        self.on_failure, self.segment, self.last = on_failure, segment, last

    def __check_init__(self):
        check_choice("ReversibleAdjoint", "on_failure", self.on_failure, ("nan", "keep", "raise"))
        k = self.segment
        if not (k is None or k == "auto" or is_int(k)):
            raise ValueError(
                f'ReversibleAdjoint expects segment to be "auto", None or an int of at least 1, '
                f"got {k!r}; pass the number of steps between two stored states."
            )
        check_last("ReversibleAdjoint", self.last)

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        del rewrite_fn, tags
        p = unpack(inputs)
        self.check_solver(p.solver)
        solver = p.solver.prepared(p.fn, p.z0, p.args, p.rank)
        tape = self.tape(solver, p.z0)
        if p.budget is not None:
            flat = flatten(p.fn, p.args, solver, p.z0, p.budget, tape)
            out, rec = recorded(stop_gradient(flat))
        else:
            most = check_ceiling(
                "ReversibleAdjoint", p.max_steps, ", which sets the size of the record"
            )
            out = primal_fn((*stop_gradient(inputs), lax_while))
            steps = LoopResult(*out[1][:3]).num_steps.astype(jnp.int32)
            budget = Budget(most, steps, 0, fixed=True)
            flat, rec = flatten(p.fn, p.args, solver, p.z0, budget, tape), None
        return with_tangent(out, (flat, rec), eqx.Partial(_of_steps, self.on_failure))

    def check_solver(self, solver: Any) -> None:
        """Raises `ValueError` for another solver than `Reversible`."""
        # Only the class itself: a subclass may mix by another rule, which would be undone wrongly.
        if type(solver) is not Reversible:
            raise ValueError(
                f"ReversibleAdjoint expects the solver deqjax.Reversible, got "
                f"{type(solver).__name__}; use deqjax.Reversible(...), or "
                f"deqjax.ImplicitAdjoint() or deqjax.RecursiveCheckpointAdjoint() with this solver."
            )

    def tape(self, solver: Reversible, z0: PyTree) -> AbstractTape:
        """The tape on which the forward loop records."""
        if solver.exact:
            return Digits(self.last, solver.grid)
        k = self.segment
        return Segments(self.last, segment_length(solver.beta, z0) if k == "auto" else k)


def _of_steps(on_failure: str, out: PyTree, inputs: tuple, t_inputs: tuple) -> PyTree:
    """The tangent of z by the steps taken, in the form that `with_tangent` expects."""
    del out
    (flat, rec), (t_flat, _) = inputs, t_inputs
    if rec is None:  # Optimistix's loop has recorded nothing
        _, rec = recorded(stop_gradient(flat))
    return linear(flat, rec, tangents_of(flat, t_flat), on_failure)

"""The only solver loop: it steps, counts, freezes and stops; from z0, or through the last steps.

Also two `while` loops for it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int, PyTree

from ._problem import Budget, problems
from ._solution import too_large
from ._step import Step, freeze, isolate, measured, step
from ._tree import mesh_axes, opaque, per_problem, select, stop_gradient, vary

WhileLoop = Callable[..., Any]


class LoopState(eqx.Module):
    """The state after the last step, with the solver's memory where Optimistix has it."""

    memory: PyTree
    overflow: Bool[Array, "..."]
    error: Inexact[Array, "..."]  # the solver's measure at the iterate returned, where it was taken
    index: Int[Array, "..."]  # of the iterate returned
    tape: PyTree = None


class LoopResult(NamedTuple):
    """The result of a loop beside z, in the places where Optimistix's own loop has it."""

    num_steps: Int[Array, "..."]
    outcome: Any  # whether the tolerance was met; for Optimistix's loop, its result code
    state: Any  # a `LoopState`; for Optimistix's loop, the solver's state, which has a memory too


class _Carry(NamedTuple):
    i: Int[Array, ""]  # steps of the loop
    z: PyTree
    memory: PyTree
    tape: PyTree
    num_steps: Int[Array, "..."]
    stopped: Bool[Array, "..."]  # met its tolerance, f(z) is unusable, overflow, or out of steps
    overflow: Bool[Array, "..."]
    error: Inexact[Array, "..."]  # at z, once measured
    best: tuple[PyTree, Array, Array] | None  # the iterate of the least error, its error, its index
    out_of_steps: Bool[Array, "..."]


class Start(NamedTuple):
    """The place in an iteration from which a loop continues."""

    i: Int[Array, ""]
    num_steps: Int[Array, "..."]
    z: PyTree
    memory: PyTree


def iterate(inputs: tuple, start: Start | None = None) -> tuple[PyTree, LoopResult]:
    """Iterates `solver` on `fn` from `z0`; `inputs = (fn, solver, z0, args, budget, while_loop)`.

    Returns `z_n` and a `LoopResult`. A problem keeps its state once it has met its tolerance or its
    f(z) is unusable, whatever the rest of the batch does. A problem that runs out of steps is
    measured once more, and its best iterate is returned.
    """
    fn, solver, z0, args, budget, while_loop = inputs
    # XLA would fold tests of a constant z0 entry by entry: 6 of 8 seconds of compilation at
    # 256 x 64 x 48.
    z0 = opaque(z0)
    axes = mesh_axes(fn, solver, z0, args, budget)
    tracks_best = solver.returns_best and budget.best and not budget.fixed

    def going(c: _Carry):
        active = ~c.stopped if tracks_best else ~c.stopped & (c.num_steps < budget.limit)
        return c.i < budget.limit if budget.uniform else jnp.any(active)

    def body(c: _Carry) -> _Carry:
        isolated = budget.tape is not None and budget.tape.isolated
        f = isolate(fn, c.i) if isolated else fn
        at = budget.at(args, c.num_steps)
        out = step(f, solver, c.z, at, c.memory, rank=budget.rank)
        return vary(_after(c, out, solver, budget), axes)

    start = _beginning(solver, z0, budget) if start is None else start
    init = vary(_first(solver, start, budget, tracks_best), axes)
    c = while_loop(going, body, init, max_steps=budget.max_steps + tracks_best)
    z, error, index = _returned(c, budget)
    state = LoopState(c.memory, c.overflow, error, index, c.tape)
    return z, LoopResult(c.num_steps, error < 1, state)


def last_steps(inputs: tuple, n: Int[Array, "..."], last: int | None) -> tuple[PyTree, LoopResult]:
    """`iterate` up to step n of each problem, as a function of the last steps alone.

    The state before them is a constant. With `last` None it is a function of all of them.
    """
    fn, solver, z0, args, budget, while_loop = inputs
    budget = dataclasses.replace(budget, limit=n, fixed=True)
    if last is None:
        return iterate((fn, solver, z0, args, budget, while_loop))
    early = jnp.maximum(n - last, 0)
    before = dataclasses.replace(budget, limit=early, resumed=True)
    z, loop = iterate((*stop_gradient((fn, solver, z0, args)), before, lax_while))
    # A problem with fewer steps is a function of z0 as well.
    first = _beginning(solver, z0, budget)
    state = select(early > 0, (z, loop.state.memory), (first.z, first.memory))
    count = jnp.broadcast_to(early, first.num_steps.shape)
    start = Start(jnp.max(early, initial=0), count, *state)
    budget = dataclasses.replace(budget, max_steps=min(last, budget.max_steps))
    return iterate((fn, solver, z0, args, budget, while_loop), start)


def _beginning(solver: Any, z0: PyTree, budget: Budget) -> Start:
    """The place before the first step."""
    start = lambda solver, z0: (solver.blank(z0), solver.start(z0))
    memory, z = per_problem(start, budget.rank)(solver, z0)
    count = jnp.zeros(problems(z0, budget.rank), jnp.int32)
    return Start(jnp.asarray(0, jnp.int32), count, z, memory)


def _first(solver: Any, start: Start, budget: Budget, tracks_best: bool) -> _Carry:
    """The carry of a loop that begins at `start`."""
    (i, count, z, memory), rank, tape = start, budget.rank, budget.tape
    no = jnp.zeros(count.shape, bool)
    status = per_problem(lambda s, _, memory: s.status(memory), rank)(solver, z, memory)
    record = None if tape is None else tape.blank(solver.pair(z, memory), budget.max_steps, rank)
    # The error has the dtype that the solver's norm returns.
    dtype = jax.eval_shape(lambda: measured(solver, z, z, rank)).dtype
    error = jnp.full(count.shape, jnp.inf, dtype)
    best = (z, error, count) if tracks_best else None
    return _Carry(i, z, memory, record, count, status.failed, status.overflow, error, best, no)


def _after(c: _Carry, out: Step, solver: Any, budget: Budget) -> _Carry:
    """The carry after the step `out`."""
    within = c.num_steps < budget.limit
    # A single problem that a test has stopped is no longer in the loop. At a fixed depth there is
    # no test, and the compiler drops the measured error.
    stopped = c.stopped if budget.rank or budget.fixed else jnp.asarray(False)
    error = c.error if budget.fixed else jnp.where(stopped, c.error, out.error)
    active = ~stopped
    overflow = c.overflow | (out.overflow & active & within)

    # Stop problems that have met their tolerance or cannot continue.
    if not budget.fixed:
        stopped = stopped | (error < 1) | out.broken | out.overflow

    # Keep the best iterate for when the steps run out.
    best, out_of_steps = c.best, c.out_of_steps
    if best is not None:
        out_of_steps = out_of_steps | (~stopped & ~within)
        # If the error is always infinite, as with zero tolerances, this keeps the last iterate.
        best = select(error <= best[1], (c.z, error, c.num_steps), best)
        stopped = stopped | out_of_steps

    # Record and take the step of the problems that continue; freeze the others.
    moves = ~stopped & within
    tape, record = budget.tape, c.tape
    if tape is not None:
        after = solver.pair(out.z, out.memory)
        record = tape.push(solver, record, c.i, moves, solver.pair(c.z, c.memory), after)
    z, memory = out.z, out.memory
    if not budget.uniform:
        z = select(moves, z, c.z)
        if budget.resumed:
            memory = select(moves, memory, c.memory)
        else:
            memory = freeze(moves, active, memory, c.memory)
    count = c.num_steps + moves.astype(jnp.int32)
    return _Carry(c.i + 1, z, memory, record, count, stopped, overflow, error, best, out_of_steps)


def _returned(c: _Carry, budget: Budget) -> tuple[PyTree, Array, Array]:
    """The last iterate, or the best one where the steps ran out; its error, and its index."""
    last = (c.z, c.error, c.num_steps)
    if c.best is None:
        return last
    # A diverged problem keeps its last iterate: the best one would hide the divergence.
    short = c.out_of_steps & ~per_problem(too_large, budget.rank)(c.z)
    return select(short, c.best, last)


def unrolled(fn: Callable, solver: Any, z0: PyTree, xs: PyTree) -> tuple[PyTree, PyTree, Array]:
    """Takes one step per row of `xs` from `z0`; step i evaluates `fn(z, xs[i]) -> (f(z), aux)`.

    Returns `z_n`, every aux, and whether a step left the range or f(z) was not finite.
    """

    def body(carry, x):
        z, memory, bad = carry
        out = step(fn, solver, z, x, memory)
        return (out.z, out.memory, bad | out.overflow | out.broken), out.aux

    solver = solver.prepared(fn, z0, jax.tree.map(lambda x: x[0], xs), 0)
    memory = solver.blank(z0)
    status = solver.status(memory)
    init = (solver.start(z0), memory, status.overflow | status.failed)
    (z, _, bad), aux = jax.lax.scan(body, init, xs)
    return z, aux, bad


def lax_while(cond: Callable, body: Callable, init: Any, *, max_steps: int | None = None) -> Any:
    """`jax.lax.while_loop` with the signature of `equinox.internal.while_loop`.

    Equinox's loop raises a carry-type error inside `jax.shard_map`, whatever the carries.
    """
    if max_steps is None:
        return jax.lax.while_loop(cond, body, init)
    going = lambda c: (c[0] < max_steps) & cond(c[1])
    return jax.lax.while_loop(going, lambda c: (c[0] + 1, body(c[1])), (jnp.asarray(0), init))[1]


def checkpointed_while(
    cond: Callable, body: Callable, init: Any, *, max_steps: int, checkpoints: int | None = None
) -> Any:
    """A `while` loop as a checkpointed scan of stretches, each a scan of checkpointed steps."""
    stretches = min(checkpoints or math.isqrt(max_steps - 1) + 1, max_steps)
    length = -(-max_steps // stretches)
    # Devices of a shard_map that stop at different steps may not branch: the transpose of a branch
    # has sums over devices, which would wait for ever.
    axes = mesh_axes(init)

    def if_going(fn, carry):
        k, state = carry
        going = cond(state) & (k < max_steps)
        if axes:
            return select(going, fn(carry), carry)
        return jax.lax.cond(going, fn, lambda carry: carry, carry)

    def step(carry):
        k, state = carry
        return k + 1, body(state)

    def scan(fn, length):
        fn = jax.checkpoint(fn, prevent_cse=False)
        return lambda carry: jax.lax.scan(lambda c, _: (fn(c), None), carry, length=length)[0]

    def if_stretch(carry):
        return if_going(scan(lambda c: if_going(step, c), length), carry)

    return scan(if_stretch, stretches)((vary(jnp.asarray(0), axes), init))[1]

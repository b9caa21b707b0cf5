"""The reversible iteration backwards: its states, and the cotangents that they carry."""

import functools as ft
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from ..._iterate import LoopResult, Pair, iterate, lax_while
from ..._step import isolate
from ..._tree import (
    add,
    cast,
    conjugate,
    dot,
    lincomb,
    max_abs,
    mesh_axes,
    opaque,
    per_problem,
    scale,
    select,
    vary,
    widen,
)
from ._flat import Flat, batchable


class Record(eqx.Module):
    """The record that a forward loop leaves to the backward sweep."""

    pair: Pair  # the last two states
    tape: PyTree
    num_steps: Int[Array, "..."]
    lost: Bool[Array, "..."]  # a step could not be taken, and so not be undone


class Cotangents(eqx.Module):
    """Cotangents of the differentiated arrays (None for the others), of z0 and of beta.

    Tangents and the primals themselves are kept in the same form; arrays in that of `own_f`.
    """

    arrays: Sequence[Array | None]
    z0: PyTree
    beta: Array | None


class _Sweep(NamedTuple):
    k: Int[Array, ""]  # steps that are not yet undone
    y: PyTree  # s[k-1]
    z: PyTree  # s[k]
    words: PyTree  # what the tape wants to be carried
    gy: PyTree  # cotangents of the two states
    gz: PyTree
    gp: list[Array]  # cotangents of the arrays
    gbeta: Inexact[Array, "..."]
    gap: Float[Array, "..."]  # largest mismatch of a reconstructed state with a known one


@batchable
def run(flat: Flat, own: Sequence[bool], record: None, gz: None) -> tuple[PyTree, LoopResult]:
    """`iterate`, recording."""
    del own, record, gz
    return iterate(flat.inputs(lax_while))


def recorded(flat: Flat) -> tuple[tuple[PyTree, LoopResult], Record]:
    """The result of `iterate`, and the record of it."""
    out = run(flat, [False] * len(flat.arrays))
    z, loop = out
    state = loop.state
    pair = flat.solver.pair(z, state.memory)
    lost = state.overflow | flat.solver.status(state.memory).failed
    return out, Record(pair, state.tape, loop.num_steps, lost)


@batchable
def sweep(
    flat: Flat, own: Sequence[bool], record: Record, gz: PyTree
) -> tuple[Cotangents, Float[Array, "..."]]:
    """The cotangents of a solve whose value has cotangent `gz`, and the mismatch of its reversal.

    The mismatch has one entry per problem. `own` are the arrays that are differentiated.
    """
    solver, budget = flat.solver, flat.budget
    rank, tape, num_steps = budget.rank, flat.tape, record.num_steps
    params, others = eqx.partition(flat.to_own(flat.arrays), list(own))
    memory = per_problem(solver.blank, rank)(flat.z0)
    (start, _) = solver.pair(flat.z0, memory)
    zeros = ft.partial(jax.tree.map, jnp.zeros_like)
    times, beta = per_problem(scale, rank), solver.relaxation
    beta_moves = eqx.is_array(beta)
    view = lambda y: solver.view(y, flat.z0)

    axes = mesh_axes(flat, record, gz)
    # Inside shard_map the VJP of f sums over devices what f closes over and what does not vary:
    # then all devices have to take part in each, so they sweep as often as the slowest.
    collective = any(mesh_axes(x) != axes for x in jax.tree.leaves(params))
    total = budget.limit if budget.uniform else jnp.max(num_steps, initial=0)
    total = jax.lax.pmax(total, tuple(axes)) if collective else total
    masked = collective or not budget.uniform

    def f(params, y):
        return flat.own_f(eqx.combine(params, others), y)

    def body(c: _Sweep) -> _Sweep:
        i = c.k - 1
        live = c.k <= num_steps  # a problem that stopped earlier waits for its own last step
        gz = select(live, c.gz, zeros(c.gz)) if masked else c.gz
        y = view(c.y)
        fy, pull = jax.vjp(f, params, y)
        if tape.isolated:
            fy, _ = isolate(lambda y, arrays: (flat.f(arrays, y), None), i)(y, flat.arrays)
        dp, dy = pull(times(beta, gz))
        first, pair = c.k == num_steps, (c.y, c.z)
        before, words, gap = tape.undo(
            solver, record.tape, c.words, i, first, pair, fy, start, rank
        )
        new = (before, c.y, times(1 - beta, gz), add(c.gy, dy))
        new = select(live, new, (c.y, c.z, c.gy, c.gz)) if masked else new
        gap = jnp.maximum(c.gap, jnp.where(live, gap, 0))
        gbeta = c.gbeta
        if beta_moves:
            db = per_problem(lambda g, fy, x: dot(conjugate(g), lincomb(1, fy, -1, x)), rank)
            gbeta = gbeta + db(gz, fy, before)
        y, z, gy, gz, words, gbeta, gap = vary((*new, words, gbeta, gap), axes)
        return _Sweep(c.k - 1, y, z, words, gy, gz, add(c.gp, dp), gbeta, gap)

    # Sums over steps are kept in float32 or wider, and like the sums over devices inside f.
    gp = jax.tree.map(lambda x: vary(jnp.zeros_like(widen(x)), mesh_axes(x)), params)
    gbeta = jnp.zeros(num_steps.shape, dot(gz, gz).dtype)
    gap = jnp.zeros(num_steps.shape, jnp.float32)
    states = (*record.pair, tape.words(record.tape, rank), zeros(gz), gz, gbeta, gap)
    y, z, words, gy, gz, gbeta, gap = vary(states, axes)
    init = _Sweep(total, y, z, words, gy, gz, gp, gbeta, gap)
    end = lax_while(lambda c: c.k > 0, body, init)

    # A beta that problems share has the sum of their cotangents.
    total = lambda x: jnp.sum(x, tuple(range(beta.ndim, x.ndim))).astype(beta.dtype)
    g_beta = total(end.gbeta) if beta_moves else None
    out = Cotangents(cast(end.gp, params), add(end.gy, end.gz), g_beta)
    gap = jnp.maximum(end.gap, tape.final_gap((end.y, end.z), start, rank))
    return out, jnp.where(record.lost, jnp.inf, gap)


def judged(
    flat: Flat, out: Cotangents, gap: Float[Array, "..."], gz: PyTree, on_failure: str
) -> Cotangents:
    """`out` if every reversal has ended where it has to, and otherwise what `on_failure` says.

    A problem whose cotangent is zero adds nothing to any other, wherever its reversal has ended.
    """
    used = per_problem(lambda gz: max_abs(gz) != 0, flat.budget.rank)(opaque(gz))
    wrong = used & ~(gap <= flat.tape.bound(flat.z0))
    if on_failure == "keep":
        return out
    if on_failure == "raise":
        return eqx.error_if(out, jnp.any(wrong), _MESSAGE)

    def poisoned(x, has_axis):
        if x is None:
            return None
        bad = jnp.any(wrong, tuple(i for i, has in enumerate(has_axis) if not has))
        # An array that all devices of a shard_map share has one cotangent, their sum.
        missing = tuple(mesh_axes(bad) - mesh_axes(x))
        bad = jax.lax.pmax(bad, missing) if missing else bad
        return select(bad, jnp.full_like(x, jnp.nan), x)

    rank = wrong.ndim
    own_axes = lambda x: (True,) * x.ndim + (False,) * (rank - x.ndim)
    return Cotangents(
        [poisoned(*pair) for pair in zip(out.arrays, flat.per_problem, strict=True)],
        jax.tree.map(lambda x: poisoned(x, (True,) * rank), out.z0),
        None if out.beta is None else poisoned(out.beta, own_axes(out.beta)),
    )


_MESSAGE = (
    "ReversibleAdjoint: the backward sweep did not end at z0, so that the gradient would be wrong. "
    "Is f the same function at each call (noise drawn inside it, a nondeterministic kernel)? "
    "Or is the state out of range (sol.stats['overflow'])? "
    "deqjax.RecursiveCheckpointAdjoint() needs neither."
)

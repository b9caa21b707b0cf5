"""The reversible iteration backwards: its states, and the cotangents that they carry."""

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from ..._iterate import LoopResult, iterate, lax_while
from ..._step import Mismatch, Pair, isolate
from ..._tree import (
    Axes,
    add,
    cast,
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
    """The record that a forward loop leaves for the backward sweep."""

    pair: Pair  # the last two states
    tape: PyTree
    num_steps: Int[Array, "..."]
    lost: Bool[Array, "..."]  # a step could not be taken, and so cannot be undone


class Cotangents(eqx.Module):
    """Cotangents of the differentiated arrays (None for the others), of z0 and of beta.

    Tangents and primals have the same form; the arrays are those of `own_f`.
    """

    arrays: Sequence[Array | None]
    z0: PyTree
    beta: PyTree  # None for a beta that is a number


class _Sweep(NamedTuple):
    done: Int[Array, ""]  # steps of the sweep
    y: PyTree  # s[k-1]
    z: PyTree  # s[k]
    words: PyTree  # carried for the tape
    gy: PyTree  # cotangents of the two states
    gz: PyTree
    gp: list[Array]  # cotangents of the arrays
    gbeta: PyTree
    found: Mismatch


@batchable
def run(flat: Flat, own: Sequence[bool], record: None, gz: None) -> tuple[PyTree, LoopResult]:
    """`iterate`, with a record."""
    del own, record, gz
    return iterate(flat.inputs(lax_while))


def recorded(flat: Flat) -> tuple[tuple[PyTree, LoopResult], Record]:
    """The result of `iterate`, and its record."""
    out = run(flat, [False] * len(flat.arrays))
    z, loop = out
    state = loop.state
    pair = flat.solver.pair(z, state.memory)
    lost = state.overflow | flat.solver.status(state.memory).failed
    return out, Record(pair, state.tape, loop.num_steps, lost)


@batchable
def sweep(
    flat: Flat, own: Sequence[bool], record: Record, gz: PyTree
) -> tuple[Cotangents, Mismatch]:
    """The cotangents of a solve whose value has cotangent `gz`, and the mismatch of its reversal.

    `own` marks the arrays that are differentiated.
    """
    params, others = eqx.partition(flat.to_own(flat.arrays), list(own))
    memory = per_problem(lambda s, z0: s.blank(z0), flat.budget.rank)(flat.solver, flat.z0)
    (start, _) = flat.solver.pair(flat.z0, memory)
    axes = mesh_axes(flat, record, gz)
    top, trips, waits = _extent(flat, record, params, axes)
    # The number of each problem's steps that are not undone.
    end = jnp.maximum(record.num_steps - (flat.tape.last or flat.budget.max_steps), 0)

    def body(c: _Sweep) -> _Sweep:
        k = top - c.done  # steps that are not yet undone
        i = jnp.maximum(k - 1, 0)
        active = (end < k) & (k <= record.num_steps)  # others wait for their last step, or are done
        gz = select(active, c.gz, _zeros(c.gz)) if waits else c.gz
        y = flat.solver.view(c.y, flat.z0)
        fy, dp, dy = _pulled_back(flat, params, others, i, y, gz)
        if flat.tape.isolated:  # with the bits that the forward loop had
            arrays = flat.budget.at(flat.arrays, i)
            fy, _ = isolate(lambda y, arrays: (flat.f(arrays, y), None), c.done)(y, arrays)

        # Undo the step, and pass its cotangents on; a problem that waits keeps its own.
        first, pair = k == record.num_steps, (c.y, c.z)
        before, words, found = flat.tape.undo(
            flat.solver, record.tape, c.words, i, first, pair, fy, start, flat.budget.rank
        )
        rest = per_problem(scale, flat.budget.rank)(flat.solver.retention, gz)
        new = (before, c.y, rest, add(c.gy, dy))
        new = select(active, new, (c.y, c.z, c.gy, c.gz)) if waits else new
        most = lambda old, new: jnp.maximum(old, jnp.where(active, new, 0))
        found = jax.tree.map(most, c.found, found)
        gbeta = _plus_relaxation(flat, c.gbeta, gz, fy, before)
        y, z, gy, gz, words, gbeta, found = vary((*new, words, gbeta, found), axes)
        return _Sweep(c.done + 1, y, z, words, gy, gz, add(c.gp, dp), gbeta, found)

    # Sweep from the last step to the first.
    c = lax_while(lambda c: c.done < trips, body, _initial(flat, record, params, gz, axes))
    g_z0 = add(c.gy, c.gz)
    if flat.tape.last is not None:  # the state after the steps that are not undone is a constant
        g_z0 = select(end > 0, _zeros(g_z0), g_z0)
    out = Cotangents(cast(c.gp, params), g_z0, _of_relaxation(flat, c.gbeta))
    gap = flat.tape.final_gap(record.tape, record.num_steps, (c.y, c.z), start)
    gap = jnp.where(record.lost, jnp.inf, jnp.maximum(c.found.gap, gap))
    return out, c.found._replace(gap=gap)


def _extent(
    flat: Flat, record: Record, params: PyTree, axes: Axes
) -> tuple[Int[Array, "..."], Int[Array, ""], bool]:
    """The step at which the sweep begins, its length, and whether a problem may have to wait."""
    # Inside shard_map the VJP of f sums over devices the cotangents of closed-over arrays that do
    # not vary. All devices have to take part in each sum, and sweep as often as the slowest.
    collective = any(mesh_axes(x) != axes for x in jax.tree.leaves(params))
    slowest = lambda x: jax.lax.pmax(x, tuple(axes)) if collective else x
    budget, last = flat.budget, flat.tape.last
    n, waits = budget.limit, collective
    if not budget.uniform:
        n, waits = record.num_steps, True
    if last is None:
        top = slowest(jnp.max(n, initial=0))
        return top, top, waits
    # Each problem begins at its own last step, so that no more than K steps are swept.
    return n, slowest(jnp.max(jnp.minimum(n, last), initial=0)), waits


def _initial(flat: Flat, record: Record, params: PyTree, gz: PyTree, axes: Axes) -> _Sweep:
    """The carry at the end of the solve, where the sweep begins."""
    shape = record.num_steps.shape
    # Sums over steps are in float32 or wider, and vary over the mesh axes of the parameters.
    gp = jax.tree.map(lambda x: vary(jnp.zeros_like(widen(x)), mesh_axes(x)), params)
    beta = _wide_relaxation(flat, gz)
    gbeta = jax.tree.map(lambda b: jnp.zeros(shape + b.shape[len(shape) :], b.dtype), beta)
    found = Mismatch(*[jnp.zeros(shape, jnp.float32)] * 2)
    words = flat.tape.words(record.tape, flat.budget.rank)
    carry = (*record.pair, words, _zeros(gz), gz, gbeta, found)
    y, z, words, gy, gz, gbeta, found = vary(carry, axes)
    return _Sweep(jnp.asarray(0, jnp.int32), y, z, words, gy, gz, gp, gbeta, found)


def _pulled_back(
    flat: Flat, params: PyTree, others: PyTree, i: Int[Array, "..."], y: PyTree, gz: PyTree
) -> tuple:
    """f at `y = s[i]`, and the cotangents that step i sends to the arrays and to y."""

    def f(params, y):
        return flat.own_f(flat.budget.at(eqx.combine(params, others), i), y)

    fy, pull = jax.vjp(f, params, y)
    dp, dy = pull(per_problem(scale, flat.budget.rank)(flat.solver.relaxation, gz))
    return fy, dp, dy


def _wide_relaxation(flat: Flat, gz: PyTree) -> PyTree:
    """An array beta in the dtype in which its cotangent is summed; None for a number."""
    dtype = dot(gz, gz).dtype
    bits = lambda dtype: jnp.finfo(dtype).bits
    wide = lambda beta: beta.astype(max(beta.dtype, dtype, key=bits))
    return jax.tree.map(wide, flat.solver.learned)


def _plus_relaxation(flat: Flat, gbeta: PyTree, gz: PyTree, fy: PyTree, before: PyTree) -> PyTree:
    """Adds the term of a step, `gz (f(s[k-1]) - s[k-2])`, summed over entries that share a beta."""
    beta = _wide_relaxation(flat, gz)
    if beta is None:
        return None

    def one(beta, gz, fy, before):
        gz, fy, before = jax.tree.map(widen, (gz, fy, before))
        mixed = lambda beta: scale(beta, lincomb(1, fy, -1, before))
        return jax.vjp(mixed, beta)[1](gz)[0]

    before = flat.solver.view(before, flat.z0)
    return add(gbeta, per_problem(one, flat.budget.rank)(beta, gz, fy, before))


def _of_relaxation(flat: Flat, gbeta: PyTree) -> PyTree:
    """The cotangent in the shape of beta: a beta that problems share gets the sum of theirs."""
    total = lambda g, beta: jnp.sum(g, tuple(range(beta.ndim, g.ndim))).astype(beta.dtype)
    return jax.tree.map(total, gbeta, flat.solver.learned)


def _zeros(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, tree)


def judged(flat: Flat, out: Cotangents, found: Mismatch, gz: PyTree, on_failure: str) -> Cotangents:
    """`out`, treated as `on_failure` says if a reversal did not end where it has to.

    A problem whose cotangent is zero does not affect any other, wherever its reversal ended.
    """
    used = per_problem(lambda gz: max_abs(gz) != 0, flat.budget.rank)(opaque(gz))
    wrong = used & ~(found.gap <= flat.tape.bound(flat.z0))
    if on_failure == "keep":
        return out
    if on_failure == "raise":
        return eqx.error_if(out, jnp.any(wrong), _MESSAGE)

    def poisoned(x, has_axis):
        if x is None:
            return None
        bad = jnp.any(wrong, tuple(i for i, has in enumerate(has_axis) if not has))
        # An array that all devices of a shard_map share has one cotangent, the sum of theirs.
        missing = tuple(mesh_axes(bad) - mesh_axes(x))
        bad = jax.lax.pmax(bad, missing) if missing else bad
        return select(bad, jnp.full_like(x, jnp.nan), x)

    # Poison the cotangents that a wrong reversal has part in.
    rank = wrong.ndim
    own_axes = lambda x: [i < x.ndim for i in range(rank)]
    return Cotangents(
        [poisoned(*pair) for pair in zip(out.arrays, flat.per_problem, strict=True)],
        jax.tree.map(lambda x: poisoned(x, (True,) * rank), out.z0),
        jax.tree.map(lambda x: poisoned(x, own_axes(x)), out.beta),
    )


_MESSAGE = (
    "ReversibleAdjoint: the backward sweep did not end at z0 or, with last=K, at the state before "
    "the last K steps, so that the gradient would be wrong. Does f draw noise? Draw it from the "
    "step number (indexed=True), or once before the solve. Is f rounded too differently (raise "
    "guard_bits of deqjax.Reversible, or lower its fraction_bits; reversible_vjp says in "
    "stats['guard'] how much of the guard was used)? Is the state out of range "
    "(sol.stats['overflow'])? deqjax.RecursiveCheckpointAdjoint() needs none of this."
)

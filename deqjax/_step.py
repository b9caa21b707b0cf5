"""One step: evaluate, measure, mix. Nothing else calls the function whose fixed point is sought.

Also the protocol of what a loop freezes and records step by step.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from ._tree import opaque, per_problem, quotient, select, unify, widen

Fn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
Pair = tuple[PyTree, PyTree]  # two consecutive states; integers in the exact mode


class AbstractMemory(eqx.Module):
    """The memory of a method, or a part of it, that is not frozen entry by entry."""

    @abc.abstractmethod
    def kept(self, moves: Bool[Array, "..."], active: Bool[Array, "..."], old: Self) -> Self:
        """The memory after a step of the loop, which `moves` some problems and not others.

        `active` are the problems that had not stopped before the step, `old` is the memory before
        it. All arrays have the axes of `moves` in front. Not called where every problem moves, nor
        by Optimistix's loop.
        """


class Mismatch(NamedTuple):
    """How far a reversal was off, for each problem; the largest over the steps."""

    gap: Float[Array, "..."]  # between computed and known states
    guard: Float[Array, "..."]  # between two evaluations of f, over what guard digits can correct


class AbstractTape(eqx.Module):
    """A record of a forward loop, from which its steps are undone."""

    # The number of steps, the last ones, that can be undone; None: all.
    last: eqx.AbstractVar[int | None]

    @property
    @abc.abstractmethod
    def isolated(self) -> bool:
        """Whether f has to give the same bits forwards and backwards."""

    @abc.abstractmethod
    def blank(self, pair: Pair, max_steps: int, rank: int) -> PyTree:
        """The tape before the first step."""

    @abc.abstractmethod
    def push(
        self, solver: Any, tape: PyTree, i: Int[Array, ""], go: Bool[Array, "..."],
        pair: Pair, after: Pair,
    ) -> PyTree:  # fmt: skip
        """Records step i, from `pair` to `after`, for the problems that `go`."""

    def words(self, tape: PyTree, rank: int) -> PyTree:
        """The words that a sweep carries, shaped like one row of a tape read digit by digit."""
        del tape, rank

    @abc.abstractmethod
    def undo(
        self, solver: Any, tape: PyTree, words: PyTree, i: Int[Array, "..."],
        first: Bool[Array, "..."], pair: Pair, fy: PyTree, start: PyTree, rank: int,
    ) -> tuple[PyTree, PyTree, Mismatch]:  # fmt: skip
        """Undoes step i from `pair = (s[i], s[i+1])` and `fy = f(s[i])`.

        i has one entry, or one per problem. `words` are carried from step to step and mean nothing
        in a problem's `first`. Returns `s[i-1]`, the words, and the mismatch.
        """

    @abc.abstractmethod
    def final_gap(
        self, tape: PyTree, num_steps: Int[Array, "..."], pair: Pair, start: PyTree
    ) -> Float[Array, "..."]:
        """The distance of the pair at a sweep's end from the true one, unless `undo` gave it."""

    @abc.abstractmethod
    def bound(self, z0: PyTree) -> float:
        """The mismatch up to which a reversal is trusted."""


class Step(NamedTuple):
    """The result of one evaluation of `f` at `z`; the flags have one entry per problem."""

    z: PyTree  # the next iterate
    memory: PyTree  # the solver's memory for the next step
    aux: PyTree  # the auxiliary output of f(z)
    error: Inexact[Array, "..."]  # the solver's measure of f(z) - z; its tolerance is met below 1
    broken: Bool[Array, "..."]  # f(z) is not finite
    overflow: Bool[Array, "..."]  # the next iterate would have left the solver's number range


def evaluate(fn: Fn, z: PyTree, args: PyTree) -> tuple[PyTree, PyTree]:
    """`(f(z), aux)`, strongly typed as `z` is."""
    fz, aux = fn(z, args)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), fz), aux


def residual(z: PyTree, _: Any, inputs: tuple) -> PyTree:
    """`f(z) - z`, with the signature that Optimistix gives to an adjoint's `rewrite_fn`."""
    fn, _, _, args, *_ = inputs
    fz, _ = evaluate(fn, z, args)
    return jax.tree.map(jnp.subtract, fz, z)


def scaled_error(solver: Any, z: PyTree, fz: PyTree) -> Inexact[Array, ""]:
    """`norm((f(z) - z) / (atol + rtol |f(z)|))`; infinite with both tolerances zero.

    For complex entries the norm gets the moduli. The error is NaN if and only if f(z) - z is not
    finite, so that one pass over the state gives both.
    """
    rtol, atol = jnp.asarray(solver.rtol), jnp.asarray(solver.atol)

    def scaled(z, fz):
        gap, size = widen(fz) - widen(z), jnp.abs(widen(fz))
        gap = jnp.abs(gap) if jnp.iscomplexobj(gap) else gap
        scale = atol.astype(size.dtype) + rtol.astype(size.dtype) * size
        return jnp.where(jnp.isfinite(gap), quotient(gap, scale), jnp.nan)

    measurable = (rtol >= 0) & (atol >= 0) & (rtol + atol > 0)
    error = solver.norm(unify(jax.tree.map(scaled, z, fz)))
    return jnp.where(measurable | jnp.isnan(error), error, jnp.inf)


def measured(
    solver: Any, z: PyTree, fz: PyTree, rank: int, memory: PyTree = None
) -> Inexact[Array, "..."]:
    """The solver's own measure of `f(z) - z`, for each problem."""
    return per_problem(lambda solver, *at: solver.error(*at), rank)(solver, z, fz, memory)


def step(fn: Fn, solver: Any, z: PyTree, args: PyTree, memory: PyTree, *, rank: int = 0) -> Step:
    """Evaluates `fn` at `z`, measures the error, and takes the solver's step."""
    fz, aux = evaluate(fn, z, args)
    error = measured(solver, z, fz, rank, memory)

    def mix(solver, z, fz, memory, error):
        broken = jnp.isnan(error) & ~solver.status(memory).retry
        z, memory = solver.mix(z, fz, memory)
        return z, memory, broken, solver.status(memory).overflow

    # An array of the solver may hold one value per problem.
    z, memory, broken, overflow = per_problem(mix, rank)(solver, z, fz, memory, error)
    return Step(z, memory, aux, error, broken, overflow)


def freeze(
    moves: Bool[Array, "..."], active: Bool[Array, "..."], new: PyTree, old: PyTree
) -> PyTree:
    """`new` for the problems in `moves`, `old` for the others.

    An `AbstractMemory` decides for itself.
    """
    own = lambda x: isinstance(x, AbstractMemory)
    leaf = lambda new, old: new.kept(moves, active, old) if own(new) else select(moves, new, old)
    return jax.tree.map(leaf, new, old, is_leaf=own)


def isolate(fn: Fn, i: Int[Array, ""]) -> Fn:
    """Puts `fn` alone into a loop of one trip, so that it gives the same bits in every program.

    XLA fuses f with the code around it and rewrites it accordingly: the rounding before and after
    differentiation differs. The body of a loop is compiled by itself. But XLA removes a loop that
    it knows to have one trip, and makes its counter 0. So XLA must not be able to fold the bound:
    `min(i + 1, 1)`, with the counter i of the outer loop, behind a barrier.

    XLA takes what f computes from `args` alone out of the loop, and merges it with the derivative's
    computations. If `args` are constants, as in a pullback that is compiled by itself, XLA folds it
    while it compiles. So f gets `args` through a barrier.
    """

    def alone(z, args):
        one = jax.lax.optimization_barrier(jnp.minimum(i + 1, 1))
        body = lambda c: (c[0] + 1, evaluate(fn, c[1], opaque(args))[0])
        return jax.lax.while_loop(lambda c: c[0] < one, body, (jnp.zeros_like(one), z))[1], None

    return alone

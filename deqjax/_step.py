"""One step: evaluate, measure, mix. Nothing else calls the function whose fixed point is sought."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact, Int, PyTree

from ._tree import opaque, per_problem, quotient, select, unify, widen

Fn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class AbstractMemory(eqx.Module):
    """The memory of a method, or a part of it, that is not frozen entry by entry."""

    @abc.abstractmethod
    def kept(self, moves: Bool[Array, "..."], active: Bool[Array, "..."], old: Self) -> Self:
        """The memory after a pass of the loop, which `moves` some problems.

        `active` are those that had not stopped before the pass, `old` is the memory at that time.
        """


class Step(NamedTuple):
    """The result of one evaluation of `f` at `z`; the flags have one entry per problem."""

    z: PyTree  # the next iterate
    memory: PyTree  # what the solver wants to see at the next step
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

    Of complex entries the norm sees the moduli. NaN if and only if f(z) - z is not finite: one pass
    over the state tells both.
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
    """The solver's own measure of `f(z) - z`, of each problem."""
    return per_problem(lambda solver, *at: solver.error(*at), rank)(solver, z, fz, memory)


def step(fn: Fn, solver: Any, z: PyTree, args: PyTree, memory: PyTree, *, rank: int = 0) -> Step:
    """One evaluation of `fn` at `z`, its verdict, and the solver's next iterate."""
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
    """`new` of the problems that a pass `moves`, `old` of the others; an `AbstractMemory` decides
    for itself."""
    own = lambda x: isinstance(x, AbstractMemory)
    leaf = lambda new, old: new.kept(moves, active, old) if own(new) else select(moves, new, old)
    return jax.tree.map(leaf, new, old, is_leaf=own)


def isolate(fn: Fn, i: Int[Array, ""]) -> Fn:
    """`fn` alone in a loop of one trip: the same bits in whatever program it is evaluated.

    XLA fuses f with what surrounds it, and rewrites it by what else is computed there: not to the
    same rounding before and after differentiation. The body of a loop is compiled by itself. Its
    bound has to be one that XLA cannot fold: `min(i + 1, 1)` of the counter of the outer loop,
    behind a barrier, since a loop that is known to have one trip is no loop, and its counter 0.

    What f makes of `args` alone XLA takes out of the loop and merges with what the derivative makes
    of them, or folds while it compiles if they are constants, as those of a pullback are that is
    compiled by itself. So f sees them through a barrier.
    """

    def alone(z, args):
        one = jax.lax.optimization_barrier(jnp.minimum(i + 1, 1))
        body = lambda c: (c[0] + 1, evaluate(fn, c[1], opaque(args))[0])
        return jax.lax.while_loop(lambda c: c[0] < one, body, (jnp.zeros_like(one), z))[1], None

    return alone

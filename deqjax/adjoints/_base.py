"""The base of every adjoint.

`apply` is the only connection between a solve and its derivative. deqjax and Optimistix both call
`adjoint.apply(primal_fn, rewrite_fn, inputs, tags)`: `primal_fn(inputs + (while_loop,))` runs the
loop, `rewrite_fn(z, None, inputs)` is `f(z) - z`.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import PyTree

from .._checks import check_choice, check_int
from .._iterate import LoopResult, lax_while
from .._problem import Budget
from .._tree import as_real, attach, dot, from_real, mesh_axes, scale, stop_gradient, vary
from ._linear_solve import LinearMap

AbstractAdjoint = optimistix.AbstractAdjoint
LinearSolve = Callable[[LinearMap, PyTree], PyTree]


class Problem(NamedTuple):
    """The solve that an adjoint differentiates."""

    fn: Any
    solver: Any
    z0: PyTree
    args: PyTree
    max_steps: int | None
    rank: int
    budget: Budget | None  # None: called by Optimistix
    rest: tuple  # the other inputs, in their places

    @property
    def ceiling(self) -> int:
        """The ceiling of the backward solve; a warm start shortens only the forward solve."""
        return max(self.max_steps or 0, 256)


def unpack(inputs: tuple) -> Problem:
    """Reads the positional inputs of deqjax or of Optimistix, whose layout is private."""
    fn, solver, z0, args, *rest = inputs
    match rest:
        case [Budget() as budget]:
            most, rank = budget.max_steps, budget.rank
            return Problem(fn, solver, z0, args, most, rank, budget, tuple(rest))
        case [_options, most, _f_struct, _aux_struct, _tags]:
            return Problem(fn, solver, z0, args, most, 0, None, tuple(rest))
    raise ValueError(
        f"The adjoint expects the inputs of deqjax or of Optimistix 0.1, got {len(inputs)} others; "
        f"install optimistix>=0.1,<0.2."
    )


def no_gradient(tree: PyTree) -> PyTree:
    """`tree`, which raises if a loss differentiates it, instead of silently dropping a term."""
    return jax.tree.map(eqxi.nondifferentiable_backward, tree)


def with_tangent(out: PyTree, inputs: PyTree, tangent: Callable) -> PyTree:
    """`out = (z, extras)`, where z has the derivative `tangent(out, inputs, their tangents)`.

    A loss of the extras, which has no derivative, raises.
    """
    z, extras = attach(out, inputs, eqx.Partial(_tangent_of_both, tangent))
    return z, no_gradient(extras)


def _tangent_of_both(tangent: Callable, out: PyTree, inputs: PyTree, t_inputs: PyTree) -> PyTree:
    t_z = tangent(out, inputs, t_inputs)
    # Zero, but computed from tangents, so that `no_gradient` notices a loss of the extras.
    zero = dot(t_z, scale(0, t_z))
    like = lambda x: vary(jnp.broadcast_to(zero.astype(x.dtype), x.shape), mesh_axes(x))
    return t_z, jax.tree.map(like, eqx.filter(out[1], eqx.is_inexact_array))


class AbstractFixedPointAdjoint(AbstractAdjoint):
    """Differentiates the fixed point, not the steps, by a linear map.

    A subclass computes the tangent of z from the tangents of everything that f depends on. The map
    is linear, so that JAX transposes it into the backward pass.
    """

    @abc.abstractmethod
    def tangent(self, at: "Linearisation", problem: Problem, loop: LoopResult) -> PyTree:
        """The tangent of z."""

    def check_solver(self, solver: Any) -> None:
        """Raises `ValueError` for a solver that the adjoint does not support."""
        del solver

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        del tags
        self.check_solver(unpack(inputs).solver)
        out = primal_fn((*stop_gradient(inputs), lax_while))
        return with_tangent(out, inputs, eqx.Partial(_tangent_of, self, rewrite_fn))


class Linearisation(NamedTuple):
    """The point at which `residual(z, moving) = f(z) - z` is differentiated."""

    residual: Callable[[PyTree, PyTree], PyTree]
    z: PyTree
    moving: PyTree  # all arrays of the inputs that have a tangent
    tangents: PyTree

    def vary(self, *used: PyTree) -> PyTree:
        """z, marked as varying over the mesh axes of `used` too, for the first carry of a loop."""
        return vary(self.z, mesh_axes(self.z, *used))

    def right_side(self) -> PyTree:
        """`b` of the equation below: `(df/dtheta) dtheta`."""
        of_inputs = lambda moving: self.residual(self.z, moving)
        _, b = jax.jvp(of_inputs, (self.moving,), (self.tangents,))
        return vary(b, mesh_axes(self.z))

    def equation(self) -> tuple[LinearMap, PyTree]:
        """`(matvec, b)` of the equation `(I - J) dz = b` of the implicit function theorem."""
        # Linearised once, outside the loop: no product then evaluates f again or, inside shard_map,
        # casts its constants (the transpose of a cast would sum over devices).
        _, product = jax.linearize(lambda z: self.residual(z, self.moving), self.z)
        return lambda v: scale(-1, product(v)), self.right_side()


def solved(
    matvec: LinearMap, b: PyTree, solve: LinearSolve, transpose_solve: LinearSolve
) -> PyTree:
    """The solution of `matvec(y) = b`, by `solve(matvec, b)`, which sees only real leaves."""
    over_reals = lambda y: as_real(matvec(from_real(y, b)))
    # custom_linear_solve expects that all leaves of b have a tangent, or none. In a second
    # derivative only some have one: a barrier gives the others zeros, forwards and transposed.
    whole = jax.lax.optimization_barrier
    right = whole(as_real(b))
    y = jax.lax.custom_linear_solve(over_reals, right, solve, transpose_solve)
    return from_real(whole(y), b)


class AbstractImplicitAdjoint(AbstractFixedPointAdjoint):
    """Solves the equation of the implicit function theorem, and reports the outcome."""

    @abc.abstractmethod
    def known(self, matvec: LinearMap, z: PyTree, rank: int) -> PyTree:
        """The facts about `matvec = I - J` at the fixed point z that `solve` needs beforehand."""

    @abc.abstractmethod
    def solve(
        self,
        matvec: LinearMap,
        b: PyTree,
        known: PyTree,
        *,
        transpose: bool,
        max_steps: int,
        rank: int,
    ) -> tuple[PyTree, dict[str, Any]]:
        """`y` with `matvec(y) = b`, where `matvec` is `I - J` or its transpose; and its stats."""

    def tangent(self, at: Linearisation, problem: Problem, loop: LoopResult) -> PyTree:
        del loop
        matvec, b = at.equation()
        known = stop_gradient(self.known(matvec, at.z, problem.rank))
        options = {"max_steps": problem.ceiling, "rank": problem.rank}

        def by(transpose: bool) -> LinearSolve:
            return lambda matvec, b: self.solve(matvec, b, known, transpose=transpose, **options)[0]

        return solved(matvec, b, by(False), by(True))


def _tangent_of(adjoint: Any, rewrite_fn: Callable, out: PyTree, inputs: tuple, t_inputs: PyTree):
    """The tangent of z by the residual of the inputs, in the form that `with_tangent` expects."""
    z, extras = out
    is_none = lambda x: x is None
    moved = jax.tree.map(lambda t: t is not None, t_inputs, is_leaf=is_none)
    moving, still = eqx.partition(inputs, moved, is_leaf=is_none)

    def residual(z, moving):
        return rewrite_fn(z, None, eqx.combine(moving, still))

    at = Linearisation(residual, z, moving, t_inputs)
    return adjoint.tangent(at, unpack(inputs), LoopResult(*extras[:3]))


def check_linear(adjoint: Any) -> None:
    """Raises `ValueError` unless the fields of an adjoint that solves a linear system are right."""
    name, how = type(adjoint).__name__, adjoint.on_failure
    tol, steps = adjoint.tol, adjoint.max_steps
    check_choice(name, "on_failure", how, ("nan", "keep", "raise"))
    if tol is not None and not (isinstance(tol, float) and tol > 0):
        raise ValueError(
            f"{name} expects a float tolerance above 0, got tol={tol}; pass one, relative to y."
        )
    if steps is not None:
        check_int(name, "max_steps", steps, "pass None for the ceiling of the solve.")


def check_ceiling(name: str, max_steps: int | None, reason: str = "") -> int:
    """Returns `max_steps`, or raises `ValueError` for None, which Optimistix allows."""
    if max_steps is None:
        raise ValueError(
            f"{name} expects a number as max_steps, got None; choose a ceiling on the number of "
            f"steps{reason}."
        )
    return max_steps


def check_last(name: str, last: int | None) -> None:
    """Raises `ValueError` unless `last`, a number of steps, is None or an int of at least 1."""
    if last is not None:
        check_int(name, "last", last, "pass None to differentiate all steps.")


def check_cotangent(name: str, z: PyTree, cotangent: PyTree) -> None:
    """Raises `ValueError` unless `cotangent` is shaped like `z`."""
    if jax.eval_shape(lambda: z) != jax.eval_shape(lambda: cotangent):
        raise ValueError(
            f"{name} expects a cotangent of the structure, shapes and dtypes of z, "
            f"{eqx.tree_pformat(z)}, got {eqx.tree_pformat(cotangent)}; pass one like z."
        )

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import lineax
from jaxtyping import PyTree

from .._linear import LinearMap, by_iteration, by_lineax, judged
from .._number import float_state
from .._tree import as_real, conjugate, from_real, lincomb
from ..solvers import AbstractSolver, Reversible
from ._base import (
    AbstractImplicitAdjoint,
    arrays_of,
    check_cotangent,
    check_linear,
    strong,
)


class ImplicitAdjoint(AbstractImplicitAdjoint):
    """Differentiates the fixed point by the implicit function theorem, matrix-free.

    With J the Jacobian of `f` with respect to z at the solution, and g the cotangent of `z*`,

        dz* = (I - J)^-1 (df/dtheta) dtheta,        dtheta = (df/dtheta)^T (I - J)^-T g,

    and the inverse is applied by products with J or its transpose alone. `z0` and the
    solver's own fields have derivative zero.

    **Arguments:**

    - `linear_solver`: how to solve `y = g + J^T y`.
        `None`: the Neumann series `y <- g + J^T y`, until its residuals shrink by less than 0.3 a
        term; from there Anderson's method, 16 steps deep. A deqjax solver other than `Reversible`,
        for the method that it is (`FixedPointIteration()` is the series alone) and its `rtol`. Of
        these each problem of a batch stops by itself. Or any Lineax solver
        (`lineax.GMRES(rtol=..., atol=...)`), for which a batch is one system.
    - `tol`: the relative residual `||g + J^T y - y||_2 / ||g + J^T y||_2` at which an iteration
        stops, a float: the gradient's relative error is then about `tol / (1 - rho(J))`. `None` is
        10 eps of float32 or of the state's dtype, whichever is wider, or 2 eps of a half precision
        state, whose products are no better; with a deqjax solver, its `rtol`.
    - `max_steps`: the ceiling of an iteration; `None` is that of the call (256, if that is more,
        with an Optimistix solver).
    - `on_failure`: what a linear solve that fails gives: `"nan"`, `"keep"` its best value,
        `"raise"` a run-time error. An iteration has failed if its best residual is above 10 times
        `tol` (no more than 0.1, unless `tol` is), and 4 eps of the state's dtype; or if y is above
        1e4 g and misses a tenth of g, as in a singular system. A Lineax solver has if it says so.
    - `y0`: where the linear solve starts, of the structure of z; `None` is g, as it is for problems
        whose y0 is not finite. Of use where g and J are nearly those of an earlier solve
        (`stats["solution"]` of `deqjax.implicit_vjp`).

    **Cost:** one evaluation of `f` with its linearisation, one Jacobian product a step; three
    copies of `z`, and 38 where Anderson's method is at work. The number of terms of the series to a
    tolerance t is about `log(t) / log(rho(J))`.

    **When not to use it:** away from a fixed point (a fixed small number of steps): it then
    differentiates a point that the solve did not reach; `deqjax.ReversibleAdjoint` and
    `deqjax.RecursiveCheckpointAdjoint` differentiate the steps taken.

    Forward mode, higher derivatives, and `jax.shard_map` hold for the iterations; a Lineax solver
    raises `ValueError` inside `jax.shard_map`. Through an `f` that holds a `jax.custom_vjp`
    function, JAX allows reverse mode alone, and no `jax.vmap` around it (`batched=True` does hold).

    **Raises:** `ValueError` for an `on_failure` or a `linear_solver` that is none of the above, a
    `tol` that is no positive float, or `max_steps < 1`.

    Reference: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019, theorem 1.
    """

    linear_solver: lineax.AbstractLinearSolver | AbstractSolver | None = None
    tol: float | None = None
    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True, default="nan")
    max_steps: int | None = eqx.field(static=True, default=None)
    y0: PyTree = None

    def __check_init__(self):
        check_linear(self)
        allowed = lineax.AbstractLinearSolver | AbstractSolver | None
        if not isinstance(self.linear_solver, allowed) or isinstance(
            self.linear_solver, Reversible
        ):
            raise ValueError(
                f"ImplicitAdjoint expects linear_solver to be None, a deqjax solver other than "
                f"Reversible, or a Lineax solver, got {self.linear_solver!r}; pass an instance: "
                f"deqjax.Broyden() or lineax.GMRES(rtol=1e-6, atol=1e-6)."
            )

        rtol = getattr(self.linear_solver, "rtol", 1.0)
        if isinstance(self.linear_solver, AbstractSolver) and self.tol is None:
            if isinstance(rtol, float | int) and rtol == 0:
                raise ValueError(
                    "ImplicitAdjoint expects a linear_solver with rtol above 0, or a tol, got "
                    "neither; for a fixed number of terms use deqjax.NeumannPhantomAdjoint."
                )

    def known(self, matvec: LinearMap, z: PyTree, rank: int) -> PyTree:
        """Nothing."""
        del matvec, z, rank

    def solve(
        self,
        matvec: LinearMap,
        b: PyTree,
        known: PyTree = None,
        *,
        transpose: bool = False,
        max_steps: int | None,
        rank: int,
    ) -> tuple[PyTree, dict[str, Any]]:
        """See `deqjax.adjoints`."""
        del known
        solver = self.linear_solver
        # In the view of b: of a tangent, or of a cotangent.
        y0 = as_real(conjugate(self.y0) if transpose else self.y0)
        if isinstance(solver, lineax.AbstractLinearSolver):
            y, stats = by_lineax(solver, matvec, b, y0)
        else:
            steps = max_steps if self.max_steps is None else self.max_steps
            y, stats = by_iteration(solver, matvec, b, y0, self.tol, max_steps=steps, rank=rank)
        return judged(y, stats, self.on_failure), stats


def implicit_vjp(
    fn: Callable[[PyTree, PyTree], PyTree],
    z: PyTree,
    args: PyTree,
    cotangent: PyTree,
    *,
    adjoint: AbstractImplicitAdjoint = ImplicitAdjoint(),
    max_steps: int = 256,
    batched: bool = False,
) -> tuple[tuple[PyTree, PyTree], dict[str, Any]]:
    """The backward pass of an implicit adjoint as a plain function, with its outcome.

    With g the cotangent and J the Jacobian of `fn` at the fixed point `z`:
    `(df/dtheta)^T (I - J)^-T g`, for the arrays theta of `fn` and of `args`.

    **Arguments:**

    - `fn`, `z`, `args`: `fn(z, args)` is approximately `z`, a pytree of float arrays, real or
        complex.
    - `cotangent`: of the structure, shapes and dtypes of `z`.
    - `adjoint`: a `deqjax.ImplicitAdjoint` or a `deqjax.PositiveConcaveAdjoint`; with
        `on_failure="keep"` the outcome is reported and nothing else.
    - `max_steps`, `batched`: as in `deqjax.fixed_point`.

    **Returns:** `((d_fn, d_args), stats)`. `d_fn` has the structure of `fn` if that is a pytree
    with inexact arrays (an Equinox module), `None` elsewhere; if `fn` is a plain function, it is a
    list of the cotangents of the inexact arrays it closes over, in order of first use. `stats` has
    `"num_steps"`, `"residual"` and `"result"`, one entry per problem: steps of the solve, its
    relative residual (see `tol`; of a Lineax solver `||g - (I - J^T) y|| / ||g||`) and its outcome;
    and `"solution"`, y. With a `deqjax.PositiveConcaveAdjoint` also `"error_bound"`.

    **Cost:** one evaluation of `fn` with its linearisation, one VJP a term, one for the term that
    meets the tolerance and one for the arrays of `fn` and `args`.

    **Raises:** `ValueError` if `fn` both holds and closes over inexact arrays, if the cotangent is
    not shaped like `z`, or for `max_steps < 1`.
    """
    if not isinstance(adjoint, AbstractImplicitAdjoint):
        raise ValueError(
            f"implicit_vjp expects a deqjax.ImplicitAdjoint or a deqjax.PositiveConcaveAdjoint, "
            f"got {adjoint!r}; the others solve no linear system of which there would be something "
            f"to tell."
        )
    z, cotangent = float_state(z), strong(cotangent)
    check_cotangent("implicit_vjp", z, cotangent)
    if max_steps < 1:
        raise ValueError(f"implicit_vjp expects max_steps of at least 1, got {max_steps}.")
    return _implicit_vjp(fn, z, args, cotangent, adjoint, max_steps, batched)


@eqx.filter_jit
def _implicit_vjp(fn, z, args, cotangent, adjoint, max_steps, batched):
    own, call = arrays_of(fn, z, args)
    hidden, body = eqx.partition(call, eqx.is_inexact_array)
    moving, still = eqx.partition(args, eqx.is_inexact_array)

    # A function of real numbers, also where z is complex.
    def f(own, hidden, moving, x):
        fz = eqx.combine(hidden, body)(own, from_real(x, z), eqx.combine(moving, still))
        return as_real(fz)

    x = as_real(z)
    _, pull = jax.vjp(f, own, hidden, moving, x)
    transposed = lambda v: lincomb(1, v, -1, pull(v)[3])
    # Not linearised beforehand: an f without a JVP will do for an adjoint that asks for none.
    push = lambda v: jax.jvp(lambda x: f(own, hidden, moving, x), (x,), (v,))[1]
    rank = int(batched)
    known = adjoint.known(lambda v: lincomb(1, v, -1, push(v)), z, rank)
    options = dict(transpose=True, max_steps=max_steps, rank=rank)
    y, stats = adjoint.solve(transposed, as_real(conjugate(cotangent)), known, **options)
    stats["solution"] = conjugate(from_real(y, z))
    d_own, d_hidden, d_args, _ = pull(y)
    return (d_own if jax.tree.leaves(own) else jax.tree.leaves(d_hidden), d_args), stats

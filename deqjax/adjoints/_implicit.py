import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import PyTree

from .._checks import check_int, float_state
from .._program import run
from .._solution import RESULTS
from .._tree import as_real, conjugate, from_real, lincomb, strong
from ..solvers import AbstractSolver, Reversible
from ._arrays import arrays_of
from ._base import (
    AbstractImplicitAdjoint,
    check_cotangent,
    check_linear,
)
from ._condition import error_estimate, one_norm_of_inverse
from ._linear_solve import LinearMap, by_iteration, by_lineax, judged


class ImplicitAdjoint(AbstractImplicitAdjoint):
    """Differentiates the fixed point by the implicit function theorem, matrix-free.

    With J the Jacobian of `f` with respect to z at the solution, and g the cotangent of `z*`,

        dz* = (I - J)^-1 (df/dtheta) dtheta,        dtheta = (df/dtheta)^T (I - J)^-T g,

    where the inverse is applied only by products with J or its transpose. `z0` and the
    solver's own fields have derivative zero.

    **Arguments:**

    - `linear_solver`: the method for `y = g + J^T y`.
        `None`: the Neumann series `y <- g + J^T y`, until its residuals shrink by less than 0.3 per
        term; from there Anderson's method, 16 steps deep. Or a deqjax solver other than
        `Reversible`, for its method (`FixedPointIteration()` is the series alone) and its `rtol`.
        With these, each problem of a batch stops by itself. Or any Lineax solver
        (`lineax.GMRES(rtol=..., atol=...)`), for which a batch is one system.
    - `tol`: a float, the relative residual `||g + J^T y - y||_2 / ||g + J^T y||_2` at which an
        iteration stops, for each leaf by itself. `None` is 10 eps of float32 or of the leaf's
        dtype, whichever is wider, or 2 eps of a half-precision leaf, whose products are no better;
        with a linear solver, its `rtol`. A `tol` below 2 eps of the leaf's dtype means 2 eps.
    - `max_steps`: the ceiling of an iteration; `None` is that of the call, or 256 if that is more.
    - `on_failure`: the result of a failed linear solve: `"nan"`, `"keep"` its best value, `"raise"`
        a run-time error. Every solve, also Lineax's, is judged by its measured residual. It has
        failed if this is above 10 times `tol` (no more than 0.1, unless `tol` is); or if y is above
        1e4 g and misses a tenth of g, as in a singular system; or, in the default iteration, if the
        last steps show that 3 % of y or more may be rounding.
    - `y0`: the start of the linear solve, of the structure of z. `None` is g, which is also the
        start of problems whose y0 is not finite or whose g is 0. Useful if g and J are close to
        those of an earlier solve (`stats["solution"]` of `deqjax.implicit_vjp`).

    The guarantee is on the residual, which is measured. The gradient's relative error is up to
    `||(I - J)^-1||` times the residual. This factor is `1 / (1 - rho(J))` if J is normal, and can
    be anything if not: `deqjax.implicit_vjp(..., condition=True)` estimates both.

    In a state of several leaves, each leaf is held to its own size, so that a leaf with a small
    cotangent has as good a gradient as any. If large contributions of other leaves cancel in a
    leaf, it is held to no more than their rounding allows.

    **Cost:** one evaluation of `f` with its linearisation, one Jacobian product per step and, in a
    state of several leaves, one per leaf; 50 copies of `z`, of which a step reads eight before
    Anderson's method starts. If memory is short, 15 copies with
    `linear_solver=deqjax.Anderson(rtol=1e-5, depth=3)`, which took 22 products instead of 16 at
    rho(J) = 0.9, and 102 instead of 43 at 0.99. The number of terms of the series to a tolerance t
    is about `log(t) / log(rho(J))`.

    **When not to use it:** away from a fixed point (after a fixed small number of steps), as it
    then differentiates a point that the solve did not reach; `deqjax.ReversibleAdjoint` and
    `deqjax.RecursiveCheckpointAdjoint` differentiate the steps taken. Also not if f conserves a
    quantity (the columns of J sum to 1: a Markov chain, a balance of mass): there is a fixed point
    for every amount of it, I - J is singular, and the gradient is NaN. Normalise inside f:

        fn = lambda p, P: P @ p / jnp.sum(P @ p)    # instead of P @ p

    The iterations support forward mode, higher derivatives, and `jax.shard_map`; a Lineax solver
    raises `ValueError` inside `jax.shard_map`. If `f` holds a `jax.custom_vjp` function, JAX allows
    only reverse mode, and no `jax.vmap` around it (`batched=True` works).

    **Raises:** `ValueError` for an `on_failure` or a `linear_solver` that is none of the above, a
    `tol` that is not a positive float, or `max_steps < 1`.

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
                f"Reversible, or a Lineax solver, got {self.linear_solver!r}; pass an instance, "
                f"for instance deqjax.Broyden() or lineax.GMRES(rtol=1e-6, atol=1e-6)."
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
        max_steps: int,
        rank: int,
    ) -> tuple[PyTree, dict[str, Any]]:
        del known
        solver = self.linear_solver
        # In the convention of b, which is a tangent or a cotangent.
        y0 = as_real(conjugate(self.y0) if transpose else self.y0)
        if isinstance(solver, lineax.AbstractLinearSolver):
            y, stats = by_lineax(solver, matvec, b, y0, self.tol, rank=rank)
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
    condition: bool = False,
) -> tuple[tuple[PyTree, PyTree], dict[str, Any]]:
    """The backward pass of an implicit adjoint as a plain function, with its outcome.

    With g the cotangent and J the Jacobian of `fn` at the fixed point `z`:
    `(df/dtheta)^T (I - J)^-T g`, for the arrays theta of `fn` and of `args`.

    **Arguments:**

    - `fn`, `z`, `args`: `fn(z, args)` is approximately `z`, a pytree of float arrays, real or
        complex.
    - `cotangent`: of the structure, shapes and dtypes of `z`.
    - `adjoint`: a `deqjax.ImplicitAdjoint` or a `deqjax.PositiveConcaveAdjoint`; with
        `on_failure="keep"` a failure is only reported.
    - `max_steps`, `batched`: as in `deqjax.fixed_point`.
    - `condition`: whether to estimate the error of the gradient.

    **Returns:** `((d_fn, d_args), stats)`. If `fn` is a pytree with inexact arrays (an Equinox
    module), `d_fn` has its structure, with `None` for the other leaves. If `fn` is a plain
    function, `d_fn` is a list of the cotangents of the inexact arrays that it closes over, in order
    of first use. `stats` has `"num_steps"`, `"residual"` and `"result"`, one entry per problem:
    steps of the solve, its relative residual (see `tol`; of the worst leaf) and its outcome; and
    `"solution"`, y. With a `deqjax.PositiveConcaveAdjoint` also `"error_bound"`.

    With `condition=True` also `"condition"`, an estimate of `||(I - J)^-1||_1` from below, mostly
    exact; and `"error_estimate"`, an estimate of `max |y - y*| / max |y*|` in the worst leaf, with
    y* the exact solution for the Jacobian at z; the gradient is linear in y. Both are infinite if a
    solve fails.

    **Cost:** one evaluation of `fn` with its linearisation, one VJP per term, one for the term that
    meets the tolerance and one for the arrays of `fn` and `args`. `condition=True` takes 8 to 16
    more solves, a third of them with JVPs.

    **When not to use it:** with `condition=True`, if `fn` holds a `jax.custom_vjp` function: JAX
    raises its `TypeError`.

    **Raises:** `ValueError` if `fn` both holds and closes over inexact arrays, if the cotangent is
    not shaped like `z`, or for `max_steps < 1`.

    Reference: Higham, FORTRAN codes for estimating the one-norm of a real or complex matrix, ACM
    Trans. Math. Softw. 14 (1988), algorithm 4.1, for the condition; Kenney and Laub, Small-sample
    statistical condition estimates, SIAM J. Sci. Comput. 15 (1994), for the error.
    """
    if not isinstance(adjoint, AbstractImplicitAdjoint):
        raise ValueError(
            f"implicit_vjp expects a deqjax.ImplicitAdjoint or a deqjax.PositiveConcaveAdjoint, "
            f"got {adjoint!r}; use one of these, as the others solve no linear system to report on."
        )
    z, cotangent = float_state(z), strong(cotangent)
    check_cotangent("implicit_vjp", z, cotangent)
    max_steps = check_int(
        "implicit_vjp", "max_steps", max_steps, "pass the ceiling of the linear solve."
    )
    own, form = arrays_of("implicit_vjp", fn, z, args)
    inputs = (own, z, cotangent, adjoint, max_steps, int(batched), condition)
    d, stats = run(_implicit_vjp, *inputs)
    return form(d), stats


def _implicit_vjp(own, z, cotangent, adjoint, max_steps, rank, condition):
    moving, still = eqx.partition(own, eqx.is_inexact_array)

    # A function of real numbers, also for a complex z.
    def f(moving, x):
        at = eqx.combine(moving, still)
        return as_real(at.call(at.own, from_real(x, z), at.args))

    x = as_real(z)
    _, pull = jax.vjp(f, moving, x)
    transposed = lambda v: lincomb(1, v, -1, pull(v)[1])
    # Not linearised beforehand: an adjoint that needs no JVP then accepts an f without one.
    push = lambda v: jax.jvp(lambda x: f(moving, x), (x,), (v,))[1]
    plain = lambda v: lincomb(1, v, -1, push(v))
    known = adjoint.known(plain, z, rank)
    options = dict(max_steps=max_steps, rank=rank)

    # Solve, and estimate the error by more solves.
    b = as_real(conjugate(cotangent))
    y, stats = adjoint.solve(transposed, b, known, transpose=True, **options)
    stats["solution"] = conjugate(from_real(y, z))
    if condition:
        cold = {"y0": None} if isinstance(adjoint, ImplicitAdjoint) else {}
        free = dataclasses.replace(adjoint, on_failure="keep", **cold)

        def solve(b, transpose):
            matvec = transposed if transpose else plain
            return free.solve(matvec, b, known, transpose=transpose, **options)

        size = one_norm_of_inverse(solve, plain, x, rank)
        error = error_estimate(solve, transposed, y, b, rank)
        unknown = (stats["result"] != RESULTS.successful) | jnp.isinf(error)
        stats["condition"] = jnp.where(unknown, jnp.inf, size)
        stats["error_estimate"] = jnp.where(unknown, jnp.inf, error)
    return pull(y)[0], stats

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jaxtyping import PyTree

from .._iterate import lax_while
from .._linear import LinearMap, by_lineax, series
from .._solution import RESULTS
from .._tree import lincomb, mesh_axes, scale, select, vary
from ._base import (
    AbstractAdjoint,
    arrays_of,
    check_cotangent,
    no_gradient,
    stop_gradient,
    strong,
    tangent_of_extras,
    unpack,
)


class ImplicitAdjoint(AbstractAdjoint):
    """Differentiates the fixed point by the implicit function theorem, matrix-free.

    With J the Jacobian of `f` with respect to z at the solution, and g the cotangent of `z*`,

        dz* = (I - J)^-1 (df/dtheta) dtheta,        dtheta = (df/dtheta)^T (I - J)^-T g,

    and the inverse is applied by products with J or its transpose alone. `z0` and the
    solver's own fields have derivative zero.

    **Arguments:**

    - `linear_solver`: `None` sums the Neumann series `y <- g + J^T y`, which converges at the rate
        of the spectral radius of J; each problem of a batch stops by itself. Or any Lineax solver
        (`lineax.GMRES(rtol=..., atol=...)`), for which a batch is one system.
    - `tol`: relative tolerance of the series' last term, a float: the gradient's error is then
        about `tol / (1 - rho(J))`. `None` is 10 eps of float32 or of the state's dtype, whichever
        is wider; 2 eps of a half precision state, whose products are no better. The ceiling on the
        terms is `max_steps` of the call (256, if that is more, with an Optimistix solver): a call
        that allows the solve very few steps allows the gradient no more.
    - `on_failure`: what a linear solve that fails gives: `"nan"`, `"keep"` its best value,
        `"raise"` a run-time error. The series has failed if it does not meet its tolerance and what
        is left of it, extrapolated from the last two terms, is above 100 times that (or 4 eps of
        the state's dtype, if that is more); a Lineax solver if it says so.

    **Cost:** one evaluation of `f` with its linearisation, one Jacobian product a term; three
    copies of `z`. The number of terms to a tolerance t is about `log(t) / log(rho(J))`.

    **When not to use it:** away from a fixed point (a fixed small number of steps): it then
    differentiates a point that the solve did not reach; `deqjax.ReversibleAdjoint` and
    `deqjax.RecursiveCheckpointAdjoint` differentiate the steps taken. Where rho(J) is 1 or more,
    which Newton's method does not mind, pass a Lineax solver.

    Forward mode, higher derivatives, and `jax.shard_map` hold for the series; a Lineax solver
    raises `ValueError` inside `jax.shard_map`. Through an `f` that holds a `jax.custom_vjp`
    function, JAX allows reverse mode alone, and no `jax.vmap` around it (`batched=True` does hold).

    Reference: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019, theorem 1.
    """

    linear_solver: lineax.AbstractLinearSolver | None = None
    tol: float | None = None
    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True, default="nan")

    def __check_init__(self):
        if self.on_failure not in ("nan", "keep", "raise"):
            raise ValueError(
                f'ImplicitAdjoint expects on_failure="nan", "keep" or "raise", got '
                f"{self.on_failure!r}; choose one of the three."
            )
        if self.tol is not None and not (isinstance(self.tol, float) and self.tol > 0):
            raise ValueError(
                f"ImplicitAdjoint expects a float tolerance above 0, got tol={self.tol}; "
                f"None chooses one."
            )

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        """See `deqjax.adjoints`."""
        del tags
        out = primal_fn((*stop_gradient(inputs), lax_while))
        z, extras = _attach(out, inputs, rewrite_fn, self)
        return z, no_gradient(extras)

    def solve(
        self, matvec: LinearMap, b: PyTree, *, max_steps: int | None, rank: int
    ) -> tuple[PyTree, dict[str, Any]]:
        """`y` with `matvec(y) = b`, where `matvec` is `I - J` or its transpose; and its stats."""
        if self.linear_solver is None:
            y, stats = series(matvec, b, self.tol, max_steps=max_steps, rank=rank)
        else:
            y, stats = by_lineax(self.linear_solver, matvec, b)
        failed = stats["result"] != RESULTS.successful
        if self.on_failure == "nan":
            y = select(failed, jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), y), y)
        elif self.on_failure == "raise":
            message = "ImplicitAdjoint: the linear solve of the implicit function theorem failed."
            y = eqx.error_if(y, jnp.any(failed), message)
        return y, stats


@eqx.filter_custom_jvp
def _attach(out: PyTree, inputs: tuple, rewrite_fn: Callable, adjoint: ImplicitAdjoint) -> PyTree:
    """`out = (z, extras)` itself, z with the derivative of the implicit function theorem."""
    del inputs, rewrite_fn, adjoint
    return out


@_attach.def_jvp
def _attach_jvp(primals, tangents):
    out, inputs, rewrite_fn, adjoint = primals
    _, t_inputs, _, _ = tangents
    z, extras = _attach(out, inputs, rewrite_fn, adjoint)  # so that z has a derivative here too
    is_none = lambda x: x is None
    moved = jax.tree.map(lambda t: t is not None, t_inputs, is_leaf=is_none)
    moving, still = eqx.partition(inputs, moved, is_leaf=is_none)

    def residual(z, moving):
        return rewrite_fn(z, None, eqx.combine(moving, still))

    _, b = jax.jvp(lambda moving: residual(z, moving), (moving,), (t_inputs,))
    # Linearised once, outside the loop: and then no product needs f again, nor, inside shard_map,
    # a cast of its constants whose transpose would sum over devices.
    _, product = jax.linearize(lambda z: residual(z, moving), z)
    problem = unpack(inputs)
    options = {"max_steps": problem.max_steps, "rank": problem.rank}
    solve = lambda matvec, b: adjoint.solve(matvec, b, **options)[0]
    matvec = lambda v: scale(-1, product(v))
    b = vary(b, mesh_axes(z))
    t_z = jax.lax.custom_linear_solve(matvec, b, solve, transpose_solve=solve)
    return (z, extras), (t_z, tangent_of_extras(extras, b))


def implicit_vjp(
    fn: Callable[[PyTree, PyTree], PyTree],
    z: PyTree,
    args: PyTree,
    cotangent: PyTree,
    *,
    adjoint: ImplicitAdjoint = ImplicitAdjoint(),
    max_steps: int = 256,
    batched: bool = False,
) -> tuple[tuple[PyTree, PyTree], dict[str, Any]]:
    """The backward pass of `deqjax.ImplicitAdjoint` as a plain function, with its outcome.

    With g the cotangent and J the Jacobian of `fn` at the fixed point `z`:
    `(df/dtheta)^T (I - J)^-T g`, for the arrays theta of `fn` and of `args`.

    **Arguments:**

    - `fn`, `z`, `args`: `fn(z, args)` is approximately `z`, a pytree of float arrays.
    - `cotangent`: of the structure, shapes and dtypes of `z`.
    - `adjoint`, `max_steps`, `batched`: as in `deqjax.fixed_point`.

    **Returns:** `((d_fn, d_args), stats)`. `d_fn` has the structure of `fn` if that is a pytree
    with inexact arrays (an Equinox module), `None` elsewhere; if `fn` is a plain function, it is a
    list of the cotangents of the inexact arrays it closes over, in order of first use. `stats` has
    `"num_steps"`, `"residual"` and `"result"`, one entry per problem: terms of the series, size of
    the last term relative to the sum (of a Lineax solver: its steps, and `||b - A y|| / ||b||`).

    **Cost:** one evaluation of `fn` with its linearisation, one VJP a term, one for the term that
    meets the tolerance and one for the arrays of `fn` and `args`.

    **Raises:** `ValueError` if `fn` both holds and closes over inexact arrays, if the cotangent is
    not shaped like `z`, or for `max_steps < 1`.
    """
    z, cotangent = strong(z), strong(cotangent)
    check_cotangent("implicit_vjp", z, cotangent)
    if max_steps < 1:
        raise ValueError(f"implicit_vjp expects max_steps of at least 1, got {max_steps}.")
    return _implicit_vjp(fn, z, args, cotangent, adjoint, max_steps, batched)


@eqx.filter_jit
def _implicit_vjp(fn, z, args, cotangent, adjoint, max_steps, batched):
    own, call = arrays_of(fn, z, args)
    hidden, body = eqx.partition(call, eqx.is_inexact_array)
    moving, still = eqx.partition(args, eqx.is_inexact_array)

    def f(own, hidden, moving, z):
        return eqx.combine(hidden, body)(own, z, eqx.combine(moving, still))

    _, pull = jax.vjp(f, own, hidden, moving, z)
    matvec = lambda v: lincomb(1, v, -1, pull(v)[3])
    y, stats = adjoint.solve(matvec, cotangent, max_steps=max_steps, rank=int(batched))
    d_own, d_hidden, d_args, _ = pull(y)
    return (d_own if jax.tree.leaves(own) else jax.tree.leaves(d_hidden), d_args), stats

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Int, PyTree

from .._iterate import lax_while
from .._step import evaluate
from .._tree import add, cast, dot, lincomb, mesh_axes, scale, select, vary, widen
from ..solvers import Reversible
from ._base import AbstractAdjoint, no_gradient, unpack


class ReversibleAdjoint(AbstractAdjoint):
    """Differentiates the steps of `deqjax.Reversible` by running them backwards.

    With `g[k]` the cotangent of the iterate `s[k]`, a step is undone, its `f` evaluated where it
    was, and the step's transpose applied, for k = n, ..., 1:

        s[k-2]  = (s[k] - beta f(s[k-1])) / (1 - beta)
        g[k-1] += beta J(s[k-1])^T g[k]
        g[k-2] += (1 - beta) g[k]

    and the cotangents of everything that `f` depends on are summed on the way. The gradient is that
    of the steps taken, up to the rounding that reversal amplifies: see `deqjax.Reversible` for how
    far it can be trusted.

    **Cost:** one evaluation of `f` with its VJP a step; five copies of `z` and one of the
    parameters, whatever the number of steps.

    **When not to use it:** with more steps than the bound in `deqjax.Reversible`; in forward mode,
    which JAX refuses through it (`deqjax.ImplicitAdjoint` supports it).

    **Raises:** `ValueError` with a solver other than `deqjax.Reversible`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the backward pass of section 3.
    """

    def apply(self, primal_fn: Callable, rewrite_fn: Callable, inputs: tuple, tags) -> PyTree:
        """See `deqjax.adjoints`."""
        del rewrite_fn, tags
        p = unpack(inputs)
        # The class itself: a subclass may mix by another rule, which would be undone wrongly.
        if type(p.solver) is not Reversible:
            raise ValueError(
                f"ReversibleAdjoint expects the solver deqjax.Reversible, got "
                f"{type(p.solver).__name__}; use deqjax.Reversible(...), or "
                f"deqjax.ImplicitAdjoint() or deqjax.RecursiveCheckpointAdjoint() with this solver."
            )
        z, extras = _solve((p.fn, p.solver, p.z0, p.args), primal_fn, p.rest)
        return z, no_gradient(extras)


class _Sweep(NamedTuple):
    k: Int[Array, ""]  # the step to undo
    y: PyTree  # s[k-1]
    z: PyTree  # s[k]
    gy: PyTree  # their cotangents
    gz: PyTree
    gp: PyTree  # cotangents of the arrays in fn and args
    gbeta: Inexact[Array, ""]


@eqx.filter_custom_vjp
def _solve(vjp_arg, primal_fn, rest):
    return primal_fn((*vjp_arg, *rest, lax_while))


@_solve.def_fwd
def _forward(perturbed, vjp_arg, primal_fn, rest):
    del perturbed
    out = _solve(vjp_arg, primal_fn, rest)
    z, (num_steps, _, state, *_) = out
    return out, (z, state.memory, num_steps)


@_solve.def_bwd
def _backward(residuals, g_out, perturbed, vjp_arg, primal_fn, rest):
    del primal_fn, rest
    z, y, num_steps = residuals
    fn, solver, z0, args = vjp_arg
    params, others = eqx.partition((fn, args), (perturbed[0], perturbed[3]))
    zeros = ft.partial(jax.tree.map, jnp.zeros_like)
    # An output that the loss does not use arrives as None.
    gz = jax.tree.map(lambda x, g: jnp.zeros_like(x) if g is None else g, z, g_out[0])

    axes = mesh_axes(vjp_arg, residuals)
    # Inside shard_map the VJP of f sums over devices what f closes over and what does not vary:
    # then all devices have to take part in each, so they sweep as often as the slowest.
    collective = any(mesh_axes(x) != axes for x in jax.tree.leaves(params))
    total = jnp.max(num_steps, initial=0)
    total = jax.lax.pmax(total, tuple(axes)) if collective else total
    masked = collective or num_steps.ndim > 0

    def f(params, y):
        fn, args = eqx.combine(params, others)
        return evaluate(fn, y, args)[0]

    def body(c: _Sweep) -> _Sweep:
        live = c.k <= num_steps  # a problem that stopped earlier waits for its own last step
        gz = select(live, c.gz, zeros(c.gz)) if masked else c.gz
        fy, pull = jax.vjp(f, params, c.y)
        dp, dy = pull(scale(solver.beta, gz))
        # s[0] = s[-1] = z0 is known, and where reversal has amplified rounding the most.
        before = select(c.k <= 2, z0, solver.unmix(c.z, fy))
        new = (before, c.y, scale(1 - solver.beta, gz), add(c.gy, dy))
        new = select(live, new, (c.y, c.z, c.gy, c.gz)) if masked else new
        gbeta = c.gbeta + dot(gz, lincomb(1, fy, -1, before))
        y, z, gy, gz = vary(new, axes)
        return _Sweep(c.k - 1, y, z, gy, gz, add(c.gp, dp), vary(gbeta, axes))

    # Sums over steps are kept in float32 or wider, and like the sums over devices inside f.
    gp = jax.tree.map(lambda x: vary(jnp.zeros_like(widen(x)), mesh_axes(x)), params)
    gbeta = vary(jnp.zeros_like(dot(gz, gz)), axes)
    y, z, gy, gz = vary((y, z, zeros(gz), gz), axes)
    init = _Sweep(total, y, z, gy, gz, gp, gbeta)
    end = lax_while(lambda c: c.k > 0, body, init)

    g_fn, g_args = cast(end.gp, params)
    g_solver = jax.tree.map(
        lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, solver
    )
    if eqx.is_array(solver.beta):
        g_beta = end.gbeta.astype(solver.beta.dtype)
        g_solver = eqx.tree_at(lambda s: s.beta, g_solver, g_beta)
    return g_fn, g_solver, add(end.gy, end.gz), g_args

"""The ways of differentiating that are compared, each on the same steps of the same block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

import deqjax

from bench.blocks import Args, Cell
from bench.ways import Method

TEXTBOOK = deqjax.ReversibleAdjoint(segment=None, on_failure="keep")
REVERSIBLE: dict[Method, deqjax.ReversibleAdjoint] = {
    "exact": deqjax.ReversibleAdjoint(),
    "isolated": deqjax.ReversibleAdjoint(),
    "float": TEXTBOOK,
    "float64 state": TEXTBOOK,
    "segmented": deqjax.ReversibleAdjoint(),
}
OTHERS: dict[Method, Any] = {
    "checkpointed": deqjax.RecursiveCheckpointAdjoint(),
    "implicit": deqjax.ImplicitAdjoint(on_failure="keep"),
    "phantom": deqjax.ImplicitAdjoint(),  # of what is not differentiated
}
ADJOINTS = REVERSIBLE | OTHERS


def solver(method: str, d: float | Array, **options: Any) -> deqjax.Reversible:
    """A solver that takes all steps that are asked for, at `1 - beta = 1 / d`."""
    exact, guard = method in ("exact", "isolated"), 0 if method == "isolated" else None
    how: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "beta": 1 - 1 / d, **options}
    return deqjax.Reversible(**how, exact=exact, guard_bits=guard)


def state(method: Method, cell: Cell) -> tuple[Callable[[Any, Any], Any], Array]:
    """`(fn, z0)`: the cell's own, or, with a float64 state, cast to it and back around the cell."""
    if method != "float64 state":
        return cell.fn, cell.z0
    dtype = cell.z0.dtype
    return lambda z, args: cell.fn(z.astype(dtype), args).astype(float), cell.z0.astype(float)


def solve(
    method: Method, cell: Cell, d: float | Array, max_steps: int, **options: Any
) -> Float[Array, "..."]:
    """The iterate after `max_steps` (or the option `steps`) evaluations, differentiably."""
    fn, z0 = state(method, cell)
    args = jax.lax.stop_gradient(cell.args) if method == "phantom" else cell.args
    options = {"batched": True, "max_steps": max_steps, "adjoint": ADJOINTS[method]} | options
    z = deqjax.fixed_point(fn, solver(method, d), z0, args, **options).value
    for _ in range(5 if method == "phantom" else 0):
        z = 0.5 * z + 0.5 * fn(z, cell.args)
    return z


def gradient(
    method: Method, cell: Cell, d: float | Array, max_steps: int, steps: Int[Array, ""]
) -> tuple[PyTree, Array, Array]:
    """The cotangents of parameters and input, the reversal residual and the share of the guard.

    NaN: has none.
    """
    if method in REVERSIBLE:
        fn, z0 = state(method, cell)
        (_, d_args, _), stats = deqjax.reversible_vjp(
            fn,
            solver(method, d),
            z0,
            cell.args,
            cell.cotangent.astype(z0.dtype),
            adjoint=REVERSIBLE[method],
            max_steps=max_steps,
            steps=steps,
            batched=True,
        )
        guard = stats["guard"] if method == "exact" else jnp.asarray(jnp.nan)
        return d_args, jnp.max(stats["reversal_residual"]), jnp.max(guard)

    def value(args: Args) -> Float[Array, "..."]:
        return solve(method, cell._replace(args=args), d, max_steps, steps=steps)

    _, pull = jax.vjp(value, cell.args)
    none = jnp.asarray(jnp.nan)
    return pull(cell.cotangent)[0], none, none


def value_and_grad(
    method: Method, cell: Cell, d: float, max_steps: int
) -> Callable[[Array, Args, Array], Any]:
    """A loss and its gradient in parameters and input as in training."""

    def loss(args: Args, z0: Array, cotangent: Array) -> Float[Array, ""]:
        z = solve(method, cell._replace(args=args, z0=z0), d, max_steps)
        return jnp.sum(z * cotangent.astype(z.dtype))

    return lambda z0, args, cotangent: jax.value_and_grad(loss)(args, z0, cotangent)

"""The parts that a gradient can't do without, and the published scheme, to be compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bench.blocks import Args, Cell


def pieces(cell: Cell, evaluations: int) -> dict[str, tuple[Any, ...]]:
    """The parts that a gradient can't do without, as functions followed by their arguments.

    One f; one f with its VJP in state, parameters and input, their cotangents added up; and both
    so many times in a loop, which does without the new memory that each alone has to be given.
    """

    def once(z: Array, args: Args, cotangent: Array, total: PyTree):
        fz, pull = jax.vjp(cell.fn, z, args)
        dz, d_args = pull(cotangent)
        return fz, dz, jax.tree.map(jnp.add, total, d_args)

    loop = lambda body, c: jax.lax.fori_loop(0, evaluations, lambda _, c: body(c), c)

    def repeat(z: Array, args: Args, cotangent: Array, total: PyTree):
        return loop(lambda c: once(c[0], args, *c[1:]), (z, cotangent, total))

    z0, args = cell.z0, cell.args
    inputs = (z0, args, cell.cotangent, jax.tree.map(jnp.zeros_like, args))
    return {
        "f": (cell.fn, z0, args),
        "vjp": (once, *inputs),
        "f in a loop": (lambda z, args: loop(lambda z: cell.fn(z, args), z), z0, args),
        "vjp in a loop": (repeat, *inputs),
    }


def reversal(fn: Callable[[Any, Any], Any], d: int, evaluations: int) -> Callable[..., Any]:
    """The reference's algorithm, with nothing around it: pairs of steps, a float state, no check.

    The result is a function of `(args, z0)`.

    A step takes (y, z) to (y', z') = ((1 - b) y + b f(z), (1 - b) z + b f(y')).
    """
    b = 1 - 1 / d

    @jax.custom_vjp
    def run(args, z0):
        return forward(args, z0)[0]

    def forward(args, z0):
        def step(_, pair):
            y, z = pair
            y = (1 - b) * y + b * fn(z, args)
            return y, (1 - b) * z + b * fn(y, args)

        y, z = jax.lax.fori_loop(0, evaluations // 2, step, (z0, z0))
        return z, (args, y, z)

    def backward(kept, gz):
        args, y, z = kept

        def undo(_, c):
            y, z, gy, gz, total = c
            fy, pull = jax.vjp(fn, y, args)
            dy, da = pull(b * gz)
            z, gz, gy = (z - b * fy) / (1 - b), (1 - b) * gz, gy + dy
            total = jax.tree.map(jnp.add, total, da)
            fz, pull = jax.vjp(fn, z, args)
            dz, da = pull(b * gy)
            y, gy, gz = (y - b * fz) / (1 - b), (1 - b) * gy, gz + dz
            return y, z, gy, gz, jax.tree.map(jnp.add, total, da)

        zeros = jax.tree.map(jnp.zeros_like, (y, args))
        carry = (y, z, zeros[0], gz, zeros[1])
        *_, gy, gz, total = jax.lax.fori_loop(0, evaluations // 2, undo, carry)
        return total, gy + gz

    run.defvjp(forward, backward)
    return run


def published(cell: Cell, d: int, evaluations: int) -> Callable[..., Any]:
    """Value and gradient by `reversal`."""
    run = reversal(cell.fn, d, evaluations)

    def value_and_grad(z0, args, cotangent):
        return jax.value_and_grad(lambda args: jnp.sum(run(args, z0) * cotangent))(args)

    return value_and_grad

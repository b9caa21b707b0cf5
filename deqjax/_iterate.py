"""The only loop: step after step; it counts, freezes and stops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from ._step import step
from ._tree import mesh_axes, per_problem, select, vary

WhileLoop = Callable[..., Any]


class Budget(eqx.Module):
    """How long to iterate, and whether axis 0 of the state is a batch of problems."""

    max_steps: int = eqx.field(static=True)
    limit: Int[Array, "..."]  # mixes allowed, shape () or (batch,), at most max_steps
    batched: bool = eqx.field(static=True)
    fixed: bool = eqx.field(static=True)  # both tolerances are zero: take exactly `limit` steps


class Memory(eqx.Module):
    """What the solver remembers after the last step, where Optimistix keeps it too."""

    memory: PyTree


class _Carry(NamedTuple):
    z: PyTree
    memory: PyTree
    num_steps: Int[Array, "..."]
    small: Bool[Array, "..."]  # met its tolerance at z
    stopped: Bool[Array, "..."]  # that, or f(z) is beyond use


def lax_while(cond: Callable, body: Callable, init: Any, *, max_steps: int | None = None) -> Any:
    """`jax.lax.while_loop` with the signature of `equinox.internal.while_loop`.

    Equinox's own raises a carry-type error inside `jax.shard_map`, whatever the carries.
    """
    if max_steps is None:
        return jax.lax.while_loop(cond, body, init)
    going = lambda c: (c[0] < max_steps) & cond(c[1])
    return jax.lax.while_loop(going, lambda c: (c[0] + 1, body(c[1])), (jnp.asarray(0), init))[1]


def problems(z: PyTree, batched: bool) -> tuple[int, ...]:
    """The shape of an array with one entry per problem: `(batch,)` or `()`."""
    return jax.tree.leaves(z)[0].shape[:1] if batched else ()


def iterate(inputs: tuple) -> tuple[PyTree, tuple[Any, Any, Memory]]:
    """Iterates `solver` on `fn` from `z0`: `((fn, solver, z0, args, budget, while_loop))`.

    Returns `z_n` and `(num_steps, small, Memory)`, in the places where Optimistix's own loop keeps
    them, so that an adjoint reads both alike. A problem that has met its tolerance, or whose f(z)
    is beyond use, keeps its state from then on, whatever its batch-mates do.
    """
    fn, solver, z0, args, budget, while_loop = inputs
    axes = mesh_axes(fn, solver, z0, args, budget)
    batched, limit = budget.batched, budget.limit
    shape = problems(z0, batched)
    # Every problem then takes every step of the loop: nothing to freeze.
    uniform = budget.fixed and limit.ndim == 0

    def cond(c: _Carry):
        return jnp.any(~c.stopped & (c.num_steps < limit))

    def body(c: _Carry) -> _Carry:
        out = step(fn, solver, c.z, args, c.memory, batched=batched)
        # At a fixed depth no measurement is used, and the compiler drops it.
        small = c.small if budget.fixed else c.small | out.small
        stopped = c.stopped if budget.fixed else c.stopped | out.small | out.broken
        go = ~stopped & (c.num_steps < limit)
        new = (out.z, out.memory)
        z, memory = new if uniform else select(go, new, (c.z, c.memory))
        return vary(_Carry(z, memory, c.num_steps + go.astype(jnp.int32), small, stopped), axes)

    no = jnp.zeros(shape, bool)
    memory = per_problem(solver.memory, batched)(z0)
    init = vary(_Carry(z0, memory, jnp.zeros(shape, jnp.int32), no, no), axes)
    out = while_loop(cond, body, init, max_steps=budget.max_steps)
    return out.z, (out.num_steps, out.small, Memory(out.memory))

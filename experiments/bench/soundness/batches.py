"""The programs around a reversible solve of several examples; see `bench.soundness.contexts`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

import deqjax

from bench.soundness.problem import EXAMPLES, STEPS, Problem, dot, fixed_steps, solve


def jit_pull_batch(p: Problem):
    value = lambda w, x, z0: solve(p, w, x, z0, batched=True).value
    _, pull = jax.vjp(value, p.w, p.x, p.z0)
    return *jax.jit(pull)(p.g), fixed_steps(EXAMPLES)


def vmap_of_grad(p: Problem):
    loss = lambda w, x, z0, g: dot(solve(p, w, x, z0).value, g)
    take = jax.vmap(jax.grad(loss, (0, 1, 2)), (None, 0, 0, 0))
    w, x, z0 = jax.jit(take)(p.w, p.x, p.z0, p.g)
    return jax.tree.map(lambda v: v.sum(0), w), x, z0, fixed_steps(EXAMPLES)


def _over_batch(p: Problem, value: Callable):
    """The gradient of all examples; `value(w, x, z0) -> (values, steps)`."""

    def loss(w, x, z0):
        values, steps = value(w, x, z0)
        return dot(values, p.g), steps

    out, steps = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(p.w, p.x, p.z0)
    return *out, np.asarray(steps)


def _of(sol):
    return sol.value, sol.stats["num_steps"]


def grad_of_vmap(p: Problem, tol: float = 0.0):
    one = lambda w, x, z0: _of(solve(p, w, x, z0, tol))
    return _over_batch(p, jax.vmap(one, (None, 0, 0)))


def batched(p: Problem, tol: float = 0.0, **more):
    return _over_batch(p, lambda w, x, z0: _of(solve(p, w, x, z0, tol, batched=True, **more)))


def scanned(p: Problem):
    def value(w, x, z0):
        step = lambda carry, v: (carry, solve(p, w, *v).value)
        return jax.lax.scan(step, 0, (x, z0))[1], fixed_steps(EXAMPLES)

    return _over_batch(p, value)


def budget(p: Problem):
    return batched(p, steps=jnp.array([3, 6]))


def _mesh():
    return jax.make_mesh((EXAMPLES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def shard_map(p: Problem):
    value = lambda w, x, z0: solve(p, w, x, z0, batched=True).value
    split = jax.shard_map(value, mesh=_mesh(), in_specs=(P(), P("d"), P("d")), out_specs=P("d"))
    return _over_batch(p, lambda *a: (split(*a), fixed_steps(EXAMPLES)))


def sharded(p: Problem):
    split = NamedSharding(_mesh(), P("d"))
    return batched(p._replace(x=jax.device_put(p.x, split), z0=jax.device_put(p.z0, split)))


def pmap(p: Problem):
    loss = lambda w, x, z0, g: dot(solve(p, w, x, z0).value, g)
    take = jax.pmap(jax.grad(loss, (0, 1, 2)), in_axes=(None, 0, 0, 0))
    w, x, z0 = jax.tree.map(np.asarray, take(p.w, p.x, p.z0, p.g))
    return jax.tree.map(lambda v: v.sum(0), w), x, z0, fixed_steps(EXAMPLES)


class _Module(eqx.Module):
    fn: Callable = eqx.field(static=True)
    w: Any

    def __call__(self, z, x):
        return self.fn(z, self.w, x)


def layer(p: Problem):
    def loss(both, z0):
        cell, x = both
        deq = deqjax.nn.DEQ(cell, p.solver(), deqjax.ReversibleAdjoint(), STEPS)
        return dot(deq.batch(x, z0)[1].value, p.g)

    both, z0 = (_Module(p.fn, p.w), p.x), p.z0
    d_cell, d_x = eqx.filter_jit(eqx.filter_grad(loss))(both, z0)
    return d_cell.w, d_x, None, fixed_steps(EXAMPLES)

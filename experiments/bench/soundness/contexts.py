"""The programs around a reversible solve in which its gradient is taken.

Each takes a `Problem` and returns the cotangents of `(w, x, z0)`, those of x and z0 with an axis of
examples, and the steps of each example; None stands for what it does not differentiate.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jax.sharding import NamedSharding, PartitionSpec as P

import deqjax

from bench.soundness.problem import EXAMPLES, OPTIONS, STEPS, Problem, dot

_STOP = 3e-2  # a tolerance that is met at different steps
_ALL = (0, 1, 2)
_STEPS = np.full(EXAMPLES, STEPS)

# --- the first example alone


def _value(p: Problem) -> Callable[..., Any]:
    return lambda w, x, z0: p.solve(w, x, z0).value


def _loss(p: Problem, value: Callable) -> Callable[..., Any]:
    return lambda *a: dot(value(*a), p.g[0])


def _alone(w: Any, x: Any, z0: Any) -> tuple[Any, ...]:
    """Adds the axis of examples and the steps."""
    batch = lambda v: None if v is None else v[None]
    return w, batch(x), batch(z0), np.array([STEPS])


def _gradient(p: Problem, value: Callable, compiled: Callable = jax.jit):
    """Differentiates `value(w, x, z0)`, a solution."""
    return _alone(*compiled(jax.grad(_loss(p, value), _ALL))(*p.first))


def _arguments(p: Problem):
    return _gradient(p, _value(p))


def _closed(p: Problem):
    def value(w, x, z0):
        return deqjax.fixed_point(lambda z, _: p.fn(z, w, x), p.solver(), z0, **OPTIONS).value

    return _gradient(p, value)


def _constant(p: Problem):
    """Makes the parameters constants of the program, x and z0 its arguments."""
    w, x, z0 = p.first
    return _alone(None, *jax.jit(jax.grad(partial(_loss(p, _value(p)), w), (0, 1)))(x, z0))


def _value_and_grad(p: Problem):
    return _alone(*jax.jit(jax.value_and_grad(_loss(p, _value(p)), _ALL))(*p.first)[1])


def _jit_pull(p: Problem):
    _, pull = jax.vjp(_value(p), *p.first)
    return _alone(*jax.jit(pull)(p.g[0]))


def _two_programs(p: Problem):
    _, pull = jax.jit(lambda *a: jax.vjp(_value(p), *a))(*p.first)
    return _alone(*jax.jit(lambda pull, g: pull(g))(pull, p.g[0]))


def _vmapped_pull(p: Problem):
    """Pulls two cotangents at once; the gradient is that of the first."""
    _, pull = jax.vjp(_value(p), *p.first)
    out = jax.jit(jax.vmap(pull))(jnp.stack([p.g[0], -p.g[0]]))
    return _alone(*jax.tree.map(lambda v: v[0], out))


def _branch(p: Problem):
    small = lambda z0: jnp.sum(z0) < 1e6
    solve, keep = _value(p), lambda w, x, z0: z0
    return _gradient(p, lambda *a: jax.lax.cond(small(a[2]), solve, keep, *a))


def _pytree(p: Problem):
    """Cuts the state in two along its first axis."""

    def value(w, x, z0):
        k = len(z0) // 2
        cut = lambda v: {"a": v[:k], "b": (v[k:],)}
        join = lambda t: jnp.concatenate([t["a"], *t["b"]])
        f = lambda t, a: cut(p.fn(join(t), *a))
        return join(deqjax.fixed_point(f, p.solver(), cut(z0), (w, x), **OPTIONS).value)

    return _gradient(p, value)


def _optimistix(p: Problem):
    def value(w, x, z0):
        fn = lambda z, a: p.fn(z, *a)
        options: Any = OPTIONS | {"throw": False}
        return optimistix.fixed_point(fn, p.solver(), z0, (w, x), **options).value

    return _gradient(p, value)


def _plain(p: Problem):
    w, x, z0 = p.first
    (_, (d_w, d_x), d_z0), stats = deqjax.reversible_vjp(
        lambda z, a: p.fn(z, *a), p.solver(), z0, (w, x), p.g[0], max_steps=STEPS
    )
    assert stats["trusted"]
    return _alone(d_w, d_x, d_z0)


class Along(NamedTuple):
    """Derivatives along `tangents`, in the place of cotangents."""

    values: Any


def tangents(at: Any) -> Any:
    return jax.tree.map(jnp.cos, at)


def _forward(p: Problem):
    """Takes derivatives along three directions, one for each argument, as `tangents` says."""
    zero = partial(jax.tree.map, jnp.zeros_like)

    def take(at, along):
        only = lambda i: tuple(v if i == j else zero(v) for j, v in enumerate(along))
        return [jax.jvp(_loss(p, _value(p)), at, only(i))[1] for i in _ALL]

    return Along(jax.jit(take)(p.first, tangents(p.first))), np.array([STEPS])


# --- all examples


def _jit_pull_batch(p: Problem):
    value = lambda w, x, z0: p.solve(w, x, z0, batched=True).value
    _, pull = jax.vjp(value, p.w, p.x, p.z0)
    return *jax.jit(pull)(p.g), _STEPS


def _each(p: Problem, mapped: Callable[..., Any]):
    """Maps the gradient of an example by `mapped(fn, axes)`, and sums that in w."""
    loss = lambda w, x, z0, g: dot(p.solve(w, x, z0).value, g)
    w, x, z0 = mapped(jax.grad(loss, _ALL), (None, 0, 0, 0))(p.w, p.x, p.z0, p.g)
    return jax.tree.map(lambda v: np.asarray(v).sum(0), w), x, z0, _STEPS


def _over_batch(p: Problem, value: Callable):
    """The gradient of all examples; `value(w, x, z0) -> (values, steps)`."""

    def loss(w, x, z0):
        values, steps = value(w, x, z0)
        return dot(values, p.g), steps

    out, steps = jax.jit(jax.grad(loss, _ALL, has_aux=True))(p.w, p.x, p.z0)
    return *out, np.asarray(steps)


def _of(sol):
    return sol.value, sol.stats["num_steps"]


def _grad_of_vmap(p: Problem, tol: float = 0.0):
    return _over_batch(p, jax.vmap(lambda *a: _of(p.solve(*a, tol=tol)), (None, 0, 0)))


def _batched(p: Problem, tol: float = 0.0, **more):
    return _over_batch(p, lambda *a: _of(p.solve(*a, tol=tol, batched=True, **more)))


def _scanned(p: Problem):
    def value(w, x, z0):
        step = lambda carry, v: (carry, p.solve(w, *v).value)
        return jax.lax.scan(step, 0, (x, z0))[1], _STEPS

    return _over_batch(p, value)


def _mesh():
    return jax.make_mesh((EXAMPLES,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def _shard_map(p: Problem):
    value = lambda w, x, z0: p.solve(w, x, z0, batched=True).value
    split = jax.shard_map(value, mesh=_mesh(), in_specs=(P(), P("d"), P("d")), out_specs=P("d"))
    return _over_batch(p, lambda *a: (split(*a), _STEPS))


def _sharded(p: Problem):
    split = NamedSharding(_mesh(), P("d"))
    return _batched(p._replace(x=jax.device_put(p.x, split), z0=jax.device_put(p.z0, split)))


class _Module(eqx.Module):
    fn: Callable = eqx.field(static=True)
    w: Any

    def __call__(self, z, x):
        return self.fn(z, self.w, x)


def _layer(p: Problem):
    def loss(both, z0):
        cell, x = both
        deq = deqjax.nn.DEQ(cell, p.solver(), deqjax.ReversibleAdjoint(), STEPS)
        return dot(deq.batch(x, z0)[1].value, p.g)

    d_cell, d_x = eqx.filter_jit(eqx.filter_grad(loss))((_Module(p.fn, p.w), p.x), p.z0)
    return d_cell.w, d_x, None, _STEPS


class Context(NamedTuple):
    """A program around the solve, and its dtype."""

    take: Callable[[Problem], Any]
    dtype: str = "float32"


CONTEXTS: dict[str, Context] = {
    "jit(grad), arguments": Context(_arguments),
    "jit(grad), closed over": Context(_closed),
    "jit(grad), parameters constant": Context(_constant),
    "grad, eager": Context(lambda p: _gradient(p, _value(p), lambda take: take)),
    "jit(value_and_grad)": Context(_value_and_grad),
    "jit(pull)": Context(_jit_pull),
    "jit(pull), batched": Context(_jit_pull_batch),
    "jit(vmap(pull))": Context(_vmapped_pull),
    "vjp and pull in two programs": Context(_two_programs),
    "vmap(grad)": Context(lambda p: _each(p, lambda take, axes: jax.jit(jax.vmap(take, axes)))),
    "grad(vmap)": Context(_grad_of_vmap),
    "grad(vmap), own stopping": Context(partial(_grad_of_vmap, tol=_STOP)),
    "batched": Context(_batched),
    "batched, own stopping": Context(partial(_batched, tol=_STOP)),
    "batched, own budgets": Context(lambda p: _batched(p, steps=jnp.array([3, 6]))),
    "remat": Context(lambda p: _gradient(p, jax.checkpoint(_value(p)))),
    "scan over solves": Context(_scanned),
    "in a branch": Context(_branch),
    "state a pytree": Context(_pytree),
    "shard_map": Context(_shard_map),
    "sharded batch": Context(_sharded),
    "pmap": Context(lambda p: _each(p, lambda take, axes: jax.pmap(take, in_axes=axes))),
    "reversible_vjp": Context(_plain),
    "Optimistix's door": Context(_optimistix),
    "nn.DEQ": Context(_layer),
    "forward mode": Context(_forward),
    "bfloat16": Context(_arguments, "bfloat16"),
    "float16": Context(_batched, "float16"),
    "float64": Context(_arguments, "float64"),
    "float64, jit(pull)": Context(_jit_pull, "float64"),
}

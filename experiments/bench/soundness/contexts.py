"""The programs around a reversible solve in which its gradient is taken.

Each takes a `Problem` and returns the cotangents of `(w, x, z0)`, those of x and z0 with an axis of
examples, and the steps of each example; None stands for what it does not differentiate.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optimistix

import deqjax

from bench.soundness.batches import (
    batched,
    budget,
    grad_of_vmap,
    jit_pull_batch,
    layer,
    pmap,
    scanned,
    shard_map,
    sharded,
    vmap_of_grad,
)
from bench.soundness.problem import STEPS, Problem, dot, first_example, loss_of, of_first, solve

_STOP = 3e-2  # a tolerance that is met at different steps


def _arguments(p: Problem):
    return of_first(jax.jit(jax.grad(functools.partial(loss_of, p), (0, 1, 2)))(*first_example(p)))


def _closed(p: Problem):
    def loss(w, x, z0):
        f = lambda z, _: p.fn(z, w, x)
        options: Any = dict(max_steps=STEPS, adjoint=deqjax.ReversibleAdjoint())
        return dot(deqjax.fixed_point(f, p.solver(), z0, **options).value, p.g[0])

    return of_first(jax.jit(jax.grad(loss, (0, 1, 2)))(*first_example(p)))


def _constant(p: Problem):
    """Parameters are constants of the program, x and z0 are its arguments."""
    w, x, z0 = first_example(p)
    d_x, d_z0 = jax.jit(jax.grad(functools.partial(loss_of, p, w), (0, 1)))(x, z0)
    return of_first((None, d_x, d_z0))


def _eager(p: Problem):
    return of_first(jax.grad(functools.partial(loss_of, p), (0, 1, 2))(*first_example(p)))


def _value_and_grad(p: Problem):
    take = jax.value_and_grad(functools.partial(loss_of, p), (0, 1, 2))
    return of_first(jax.jit(take)(*first_example(p))[1])


def _value(p: Problem, w, x, z0):
    return solve(p, w, x, z0).value


def _jit_pull(p: Problem):
    _, pull = jax.vjp(functools.partial(_value, p), *first_example(p))
    return of_first(jax.jit(pull)(p.g[0]))


def _two_programs(p: Problem):
    _, pull = jax.jit(lambda *a: jax.vjp(functools.partial(_value, p), *a))(*first_example(p))
    return of_first(jax.jit(lambda pull, g: pull(g))(pull, p.g[0]))


def _vmapped_pull(p: Problem):
    """Two cotangents at once; the gradient is that of the first."""
    _, pull = jax.vjp(functools.partial(_value, p), *first_example(p))
    out = jax.jit(jax.vmap(pull))(jnp.stack([p.g[0], -p.g[0]]))
    return of_first(jax.tree.map(lambda v: v[0], out))


def _remat(p: Problem):
    inner = jax.checkpoint(lambda w, x, z0: solve(p, w, x, z0).value)
    loss = lambda w, x, z0: dot(inner(w, x, z0), p.g[0])
    return of_first(jax.jit(jax.grad(loss, (0, 1, 2)))(*first_example(p)))


def _branch(p: Problem):
    def loss(w, x, z0):
        value = jax.lax.cond(
            jnp.sum(z0) < 1e6, functools.partial(_value, p), lambda w, x, z0: z0, w, x, z0
        )
        return dot(value, p.g[0])

    return of_first(jax.jit(jax.grad(loss, (0, 1, 2)))(*first_example(p)))


def _pytree(p: Problem):
    """The state is cut in two along its first axis."""

    def loss(w, x, z0):
        k = len(z0) // 2
        cut = lambda v: {"a": v[:k], "b": (v[k:],)}
        join = lambda t: jnp.concatenate([t["a"], *t["b"]])
        f = lambda t, a: cut(p.fn(join(t), *a))
        options: Any = dict(max_steps=STEPS, adjoint=deqjax.ReversibleAdjoint())
        sol = deqjax.fixed_point(f, p.solver(), cut(z0), (w, x), **options)
        return dot(join(sol.value), p.g[0])

    return of_first(jax.jit(jax.grad(loss, (0, 1, 2)))(*first_example(p)))


def _plain(p: Problem):
    fn = lambda z, a: p.fn(z, *a)
    w, x, z0 = first_example(p)
    (_, d_args, d_z0), stats = deqjax.reversible_vjp(
        fn, p.solver(), z0, (w, x), p.g[0], max_steps=STEPS
    )
    assert stats["trusted"]
    return of_first((*d_args, d_z0))


def _optimistix(p: Problem):
    def loss(w, x, z0):
        sol = optimistix.fixed_point(
            lambda z, a: p.fn(z, *a), p.solver(), z0, (w, x), max_steps=STEPS, throw=False,
            adjoint=deqjax.ReversibleAdjoint(),
        )  # fmt: skip
        return dot(sol.value, p.g[0])

    return of_first(jax.jit(jax.grad(loss, (0, 1, 2)))(*first_example(p)))


def _forward(p: Problem):
    """Along three directions, one for each argument, as `tangents` says."""
    value = lambda *a: dot(solve(p, *a).value, p.g[0])
    at, along = first_example(p), tangents(first_example(p))
    take = jax.jit(lambda at, along: [
        jax.jvp(value, at, tuple(v if i == j else jax.tree.map(jnp.zeros_like, v)
                                 for j, v in enumerate(along)))[1] for i in range(3)
    ])  # fmt: skip
    return Along(take(at, along)), np.array([STEPS])


class Along(NamedTuple):
    """Derivatives along `tangents`, in the place of cotangents."""

    values: Any


def tangents(at: Any) -> Any:
    return jax.tree.map(jnp.cos, at)


class Context(NamedTuple):
    take: Callable[[Problem], Any]
    dtype: str = "float32"


CONTEXTS: dict[str, Context] = {
    "jit(grad), arguments": Context(_arguments),
    "jit(grad), closed over": Context(_closed),
    "jit(grad), parameters constant": Context(_constant),
    "grad, eager": Context(_eager),
    "jit(value_and_grad)": Context(_value_and_grad),
    "jit(pull)": Context(_jit_pull),
    "jit(pull), batched": Context(jit_pull_batch),
    "jit(vmap(pull))": Context(_vmapped_pull),
    "vjp and pull in two programs": Context(_two_programs),
    "vmap(grad)": Context(vmap_of_grad),
    "grad(vmap)": Context(grad_of_vmap),
    "grad(vmap), own stopping": Context(functools.partial(grad_of_vmap, tol=_STOP)),
    "batched": Context(batched),
    "batched, own stopping": Context(functools.partial(batched, tol=_STOP)),
    "batched, own budgets": Context(budget),
    "remat": Context(_remat),
    "scan over solves": Context(scanned),
    "in a branch": Context(_branch),
    "state a pytree": Context(_pytree),
    "shard_map": Context(shard_map),
    "sharded batch": Context(sharded),
    "pmap": Context(pmap),
    "reversible_vjp": Context(_plain),
    "Optimistix's door": Context(_optimistix),
    "nn.DEQ": Context(layer),
    "forward mode": Context(_forward),
    "bfloat16": Context(_arguments, "bfloat16"),
    "float16": Context(batched, "float16"),
    "float64": Context(_arguments, "float64"),
    "float64, jit(pull)": Context(_jit_pull, "float64"),
}

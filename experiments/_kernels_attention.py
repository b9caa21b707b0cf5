"""Value and gradient of a reversible solve of an attention block, over a loop written by hand."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
from _compare_time import median_ratio
from _fidelity_cells import attention_shapes, normalise
from _fidelity_memory import compiled, temporary_bytes
from _fidelity_time import Calls, interleaved
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax

BETA = 0.5


def block(z: Array, args: tuple[PyTree, Array], *, heads: int) -> Array:
    """As one writes it: of (..., length, width), with plain products."""
    params, x = args
    *batch, length, width = z.shape
    z = z + x
    parts = (normalise(z, -1) @ params["qkv"]).reshape(*batch, length, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(parts, -3, 0)
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / (width // heads) ** 0.5
    causal = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
    mixed = jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(z.shape)
    z = z + mixed @ params["out"]
    z = z + jax.nn.gelu(normalise(z, -1) @ params["up"]) @ params["down"]
    return normalise(z, -1)


def by_hand(fn: Any, pairs: int, params: PyTree, x: Array) -> Array:
    """Pairs of steps in floating point, and the sweep that undoes them."""

    @jax.custom_vjp
    def solve(params, x):
        return run(params, x)[1]

    def run(params, x):
        def pair(_, state):
            y, z = state
            y = (1 - BETA) * y + BETA * fn(z, (params, x))
            return y, (1 - BETA) * z + BETA * fn(y, (params, x))

        return jax.lax.fori_loop(0, pairs, pair, (jnp.zeros_like(x), jnp.zeros_like(x)))

    def forward(params, x):
        y, z = run(params, x)
        return z, (y, z, params, x)

    def backward(saved, g):
        y, z, *args = saved

        def undo(a, b, ga, gb, total):
            fa, pull = jax.vjp(lambda a, *args: fn(a, args), a, *args)
            da, *d_args = pull(BETA * gb)
            total = jax.tree.map(jnp.add, total, d_args)
            return (b - BETA * fa) / (1 - BETA), ga + da, (1 - BETA) * gb, total

        def pair(_, state):
            y, z, gy, gz, total = state
            z, gy, gz, total = undo(y, z, gy, gz, total)
            y, gz, gy, total = undo(z, y, gz, gy, total)
            return y, z, gy, gz, total

        start = (y, z, jnp.zeros_like(z), g, jax.tree.map(jnp.zeros_like, args))
        return tuple(jax.lax.fori_loop(0, pairs, pair, start)[-1])

    solve.defvjp(forward, backward)
    return solve(params, x)


def ours(fn: Any, pairs: int, params: PyTree, x: Array, *, exact: bool) -> Array:
    solver = deqjax.Reversible(0.0, 0.0, beta=BETA, exact=exact)
    adjoint = deqjax.ReversibleAdjoint()
    options = {"max_steps": 2 * pairs, "adjoint": adjoint}
    return deqjax.fixed_point(fn, solver, jnp.zeros_like(x), (params, x), **options).value


def attention(key: PRNGKeyArray, *, rounds: int, loop: int, smoke: bool) -> list[dict[str, Any]]:
    """One row a way, 2 * `loop` evaluations of the block each."""
    n, length, width, heads = (2, 4, 8, 2) if smoke else (8, 128, 256, 8)
    keys = iter(jax.random.split(key, 6))
    params = {
        name: 0.5 * jax.random.normal(next(keys), shape) / shape[0] ** 0.5
        for name, shape in attention_shapes(width).items()
    }
    x, cotangent = jax.random.normal(next(keys), (2, n, length, width))
    fn = ft.partial(block, heads=heads)
    mapped = lambda solve: jax.vmap(solve, (None, 0))
    ways = {
        "by hand": ft.partial(by_hand, fn, loop),
        "by hand, jax.vmap": mapped(ft.partial(by_hand, fn, loop)),
        "float": ft.partial(ours, fn, loop, exact=False),
        "float, jax.vmap": mapped(ft.partial(ours, fn, loop, exact=False)),
        "exact": ft.partial(ours, fn, loop, exact=True),
        "exact, jax.vmap": mapped(ft.partial(ours, fn, loop, exact=True)),
    }
    calls: Calls = {}
    sizes = {}
    for name, solve in ways.items():
        loss = lambda params, x, g, solve=solve: jnp.vdot(solve(params, x), g)
        inputs = (params, x, cotangent)
        program = compiled(jax.value_and_grad(loss, (0, 1)), *inputs)
        sizes[name] = temporary_bytes(program)
        calls[name] = lambda p=program, a=inputs: p(*a)
    found = interleaved(calls, rounds, {})
    first = found["by hand"]
    return [
        {
            "way": name,
            "seconds": sorted(seconds)[rounds // 2],
            "over by hand": median_ratio(seconds, first),
            "MiB": sizes[name] / 2**20,
        }
        for name, seconds in found.items()
    ]

"""Value and gradient of a reversible solve of an attention block, over a loop written by hand."""

import functools as ft
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax

from bench.blocks import attention_shapes, normalise
from bench.pieces import reversal
from bench.timing import Calls, interleaved, median_ratio, ready, temporary_bytes

D = 2  # 1 - beta = 1/2


def block(z: Array, args: tuple[PyTree, Array], *, heads: int) -> Array:
    """The block as one writes it: (..., length, width), with plain products."""
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
    """The published scheme from 0, without its solver or check."""
    return reversal(fn, D, 2 * pairs)((params, x), jnp.zeros_like(x))


def ours(fn: Any, pairs: int, params: PyTree, x: Array, *, exact: bool) -> Array:
    solver = deqjax.Reversible(0.0, 0.0, beta=1 - 1 / D, exact=exact)
    adjoint = deqjax.ReversibleAdjoint()
    options = {"max_steps": 2 * pairs, "adjoint": adjoint}
    return deqjax.fixed_point(fn, solver, jnp.zeros_like(x), (params, x), **options).value


def attention(key: PRNGKeyArray, *, rounds: int, loop: int, smoke: bool) -> list[dict[str, Any]]:
    """One row per way, 2 * `loop` evaluations of the block each."""
    n, length, width, heads = (2, 4, 8, 2) if smoke else (8, 128, 256, 8)
    keys = iter(jax.random.split(key, 6))
    params = {
        name: 0.5 * jax.random.normal(next(keys), shape) / shape[0] ** 0.5
        for name, shape in attention_shapes(width).items()
    }
    x, cotangent = jax.random.normal(next(keys), (2, n, length, width))
    fn = ft.partial(block, heads=heads)
    solves = {
        "by hand": ft.partial(by_hand, fn, loop),
        "float": ft.partial(ours, fn, loop, exact=False),
        "exact": ft.partial(ours, fn, loop, exact=True),
    }
    calls: Calls = {}
    for name, solve in solves.items():
        for title, way in ((name, solve), (f"{name}, jax.vmap", jax.vmap(solve, (None, 0)))):
            loss = lambda params, x, g, way=way: jnp.vdot(way(params, x), g)
            calls[title] = ready(jax.value_and_grad(loss, (0, 1)), params, x, cotangent)
    found = interleaved(calls, rounds)
    return [
        {
            "way": name,
            "seconds": statistics.median(seconds),
            "over by hand": median_ratio(seconds, found["by hand"]),
            "MiB": temporary_bytes(calls[name]) / 2**20,
        }
        for name, seconds in found.items()
    ]

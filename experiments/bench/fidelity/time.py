"""What a gradient costs, against what it can't do without; all of it in interleaved rounds."""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bench.blocks import Cell, attention_shapes
from bench.gradients import solve, value_and_grad
from bench.pieces import pieces, published
from bench.timing import Calls, compiled, interleaved, medians, temporary_bytes
from bench.ways import Method


def timing(
    cell: Cell, heads: int, d: int, evaluations: int, rounds: int, methods: Sequence[Method]
) -> dict[str, Any]:
    """Seconds and temporary bytes on the attention block."""
    inputs = (cell.z0, cell.args, cell.cotangent)
    calls: Calls = {}
    sizes: dict[str, int] = {}

    def add(name: str, fn: Callable[..., Any], *inputs: Any, wide: bool = False) -> None:
        with jax.enable_x64(wide):
            program = compiled(fn, *inputs)
        sizes[name] = temporary_bytes(program)

        def call() -> Any:
            with jax.enable_x64(wide):
                return program(*inputs)

        calls[name] = call

    for name, piece in pieces(cell, evaluations).items():
        add(name, *piece)
    left, right, grads = _factors(cell, heads)
    add(
        "products of f",
        lambda a, b: [jnp.matmul(x, y) for x, y in zip(a, b, strict=True)],
        left,
        right,
    )
    add("products of vjp", _products, left, right, grads)
    add("published scheme", published(cell, d, evaluations), *inputs)
    for method in methods:
        wide = method == "float64 state"
        add(method, value_and_grad(method, cell, d, evaluations), *inputs, wide=wide)
    # The short ones as often as they stand in a solve, so that they meet the same machine.
    short = ("f", "vjp", "products of f", "products of vjp")
    found = interleaved(calls, rounds, dict.fromkeys(short, evaluations))
    for name in ("f in a loop", "vjp in a loop"):
        found[name] = [x / evaluations for x in found[name]]
    measured = {"seconds": medians(found), "all_seconds": found, "bytes": sizes}
    return {"d": d, "evaluations": evaluations, **measured}


def _factors(cell: Cell, heads: int) -> tuple[list[Array], list[Array], list[Array]]:
    """Operands and cotangents of every matrix product in `attention`, in its shapes."""
    n, length, width = cell.z0.shape
    token = {name: (n * length, shape[0]) for name, shape in attention_shapes(width).items()}
    head, scores = (n * heads, length, width // heads), (n * heads, length, length)
    left = [*token.values(), head, scores]
    right = [*attention_shapes(width).values(), (head[0], head[2], head[1]), head]
    keys = iter(jax.random.split(jax.random.key(1), 3 * len(left)))
    normal = lambda shape: jax.random.normal(next(keys), shape, cell.z0.dtype)
    grads = [(*a[:-1], b[-1]) for a, b in zip(left, right, strict=True)]
    return [normal(s) for s in left], [normal(s) for s in right], [normal(s) for s in grads]


def _products(left: list[Array], right: list[Array], grads: list[Array]) -> list[Array]:
    turn = lambda x: x.swapaxes(-1, -2)
    triples = zip(left, right, grads, strict=True)
    return [y for a, b, g in triples for y in (a @ b, g @ turn(b), turn(a) @ g)]


def vmapped(
    cell: Cell, d: int, evaluations: int, rounds: int, methods: Sequence[Method]
) -> list[dict[str, Any]]:
    """`jax.vmap` of a solve of one example against one solve of the batch, weights shared."""
    calls: Calls = {}
    sizes: dict[str, int] = {}
    weight, x = cell.args

    def loss(weight: Array, z0: Array, x: Array, cotangent: Array, method: Method, apart: bool):
        def one(z0: Array, x: Array) -> Array:
            mine = cell._replace(z0=z0, args=(weight, x))
            return solve(method, mine, d, evaluations, batched=not apart)

        return jnp.sum((jax.vmap(one) if apart else one)(z0, x) * cotangent)

    for method in methods:
        for name in ("batched", "vmap"):
            inputs = (weight, cell.z0, x, cell.cotangent)
            fn = ft.partial(loss, method=method, apart=name == "vmap")
            program = compiled(jax.value_and_grad(fn), *inputs)
            sizes[f"{method}, {name}"] = temporary_bytes(program)
            calls[f"{method}, {name}"] = ft.partial(program, *inputs)
    median = medians(interleaved(calls, rounds, {}))
    return [
        {
            "method": method,
            "shape": list(cell.z0.shape),
            "seconds": [median[f"{method}, {name}"] for name in ("batched", "vmap")],
            "bytes": [sizes[f"{method}, {name}"] for name in ("batched", "vmap")],
        }
        for method in methods
    ]

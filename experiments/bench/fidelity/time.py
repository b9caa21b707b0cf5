"""The cost of a gradient over what it can't do without; all of it in interleaved rounds."""

import functools as ft
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bench.blocks import Cell, attention_shapes
from bench.gradients import solve, value_and_grad
from bench.pieces import pieces, published
from bench.timing import Calls, interleaved, medians, ready, temporary_bytes
from bench.ways import Method


def timing(
    cell: Cell, heads: int, d: int, evaluations: int, rounds: int, methods: Sequence[Method]
) -> dict[str, Any]:
    """Seconds and temporary bytes on the attention block."""
    inputs = (cell.z0, cell.args, cell.cotangent)
    left, right, grads = _factors(cell, heads)
    products = lambda a, b: [jnp.matmul(x, y) for x, y in zip(a, b, strict=True)]
    calls: Calls = {name: ready(*piece) for name, piece in pieces(cell, evaluations).items()}
    calls["products of f"] = ready(products, left, right)
    calls["products of vjp"] = ready(_products, left, right, grads)
    calls["published scheme"] = ready(published(cell, d, evaluations), *inputs)
    sizes = {name: temporary_bytes(call) for name, call in calls.items()}
    for method in methods:
        wide = method == "float64 state"
        with jax.enable_x64(wide):
            call = ready(value_and_grad(method, cell, d, evaluations), *inputs)
        sizes[method] = temporary_bytes(call)
        calls[method] = ft.partial(_in_precision, wide, call)
    # The short ones as often as they stand in a solve, so that they meet the same machine.
    short = ("f", "vjp", "products of f", "products of vjp")
    found = interleaved(calls, rounds, dict.fromkeys(short, evaluations))
    for name in ("f in a loop", "vjp in a loop"):
        found[name] = [x / evaluations for x in found[name]]
    measured = {"seconds": medians(found), "all_seconds": found, "bytes": sizes}
    return {"d": d, "evaluations": evaluations, **measured}


def _in_precision(wide: bool, call: Callable[[], Any]) -> Any:
    with jax.enable_x64(wide):
        return call()


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

    for method, apart in itertools.product(methods, (False, True)):
        fn = ft.partial(loss, method=method, apart=apart)
        call = ready(jax.value_and_grad(fn), weight, cell.z0, x, cell.cotangent)
        calls[f"{method}, {apart}"] = call
        sizes[f"{method}, {apart}"] = temporary_bytes(call)
    median = medians(interleaved(calls, rounds))
    rows = []
    for method in methods:
        both = [f"{method}, {apart}" for apart in (False, True)]
        found = {"seconds": [median[k] for k in both], "bytes": [sizes[k] for k in both]}
        rows.append({"method": method, "shape": list(cell.z0.shape)} | found)
    return rows

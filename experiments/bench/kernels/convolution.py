"""The convolution of `nn.Conv2d` over the stock one, with its cotangents, in a loop."""

import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from deqjax.nn._convolution import conv2d, stock

from bench.blocks import Cell
from bench.pieces import pieces
from bench.timing import Calls, interleaved, median_ratio, ready

# Images, pixels a side, channels.
SIZES = [(64, 28, 24), (64, 28, 32), (64, 28, 82), (64, 14, 48), (64, 7, 48),
         (16, 33, 64), (1, 32, 64), (64, 32, 128)]  # fmt: skip
TINY = [(1, 8, 33)]
# With stock cotangents an evaluation in a loop takes a second at the larger sizes.
STOCK = {(64, 14, 48), *TINY}


def sums(x: Array, kernel: Array) -> Array:
    """The convolution by direct sums, with our cotangents."""
    with jax.default_matmul_precision("highest"):
        return conv2d(x, kernel)


FORMS = {"ours": conv2d, "sums": sums, "stock": partial(stock, stride=1, precision=None)}


def convolution(key: PRNGKeyArray, *, rounds: int, loop: int, smoke: bool) -> list[dict[str, Any]]:
    """One row per size: seconds of an evaluation, and ratios."""
    rows = []
    for n, side, channels in TINY if smoke else SIZES:
        k1, k2, k3 = jax.random.split(key, 3)
        x, cotangent = jax.random.normal(k1, (2, n, side, side, channels))
        w = jax.random.normal(k2, (3, 3, channels, channels)) / (3 * channels**0.5)
        bias = jax.random.normal(k3, x.shape)
        calls: Calls = {}
        forms = {k: f for k, f in FORMS.items() if k != "stock" or (n, side, channels) in STOCK}
        for name, conv in forms.items():
            fn = lambda z, args, conv=conv: jnp.tanh(conv(z, args[0]) + args[1])
            made = pieces(Cell(name, fn, x, (w, bias), cotangent), loop)
            calls |= {f"{name} {part}": ready(*made[f"{part} in a loop"]) for part in ("f", "vjp")}
        found = interleaved(calls, rounds)
        row: dict[str, Any] = {"images": n, "pixels": side, "channels": channels}
        for part in ("f", "vjp"):
            ours = found[f"ours {part}"]
            row[f"{part}, ms"] = 1e3 * statistics.median(ours) / loop
            for other in ("sums", "stock"):
                peer = found.get(f"{other} {part}")
                row[f"{part}, ours / {other}"] = peer and median_ratio(ours, peer)
        rows.append(row)
    return rows

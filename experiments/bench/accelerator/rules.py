"""Rules that were chosen by what a CPU makes of them, against the stock ones, on this machine.

Each form is a plain function, written here or called as the library calls it, and runs eight times
in a loop: alone, and with its VJP. Where the stock form is the faster one by more than 5 %, the row
is a note: there this machine should be given the stock rule. Forms whose values or cotangents
differ by more than rounding are red.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from deqjax._bilinear import dense
from deqjax.models._base import max_pool
from deqjax.nn import GroupNorm, _convolution, _winograd

from bench.accelerator.run import (
    Compiled,
    Program,
    Run,
    Size,
    compiled,
    good,
    milliseconds,
    seconds,
)

Form = Callable[[Any, Any], Array]  # of z and what does not change
LOOP = 8
STOCK, FLIPPED = "stock", "flipped"
_SLOWER = 1.05
# Relative to the largest entry: products of TF32 or bfloat16 inputs may be summed in any order.
_ALLOWED = {"cpu": 1e-4}
_OTHERWISE = 2e-2

CHANNELS: dict[Size, tuple[int, ...]] = {
    "smoke": (4,), "reduced": (48, 128, 256), "full": (48, 128, 256),
}  # fmt: skip
IMAGE: dict[Size, tuple[int, int]] = {"smoke": (1, 4), "reduced": (2, 8), "full": (64, 32)}
TOKENS: dict[Size, tuple[int, int, int]] = {
    "smoke": (2, 3, 4), "reduced": (4, 64, 192), "full": (32, 448, 768),
}  # fmt: skip

# The convolution of stride 1, with the derivatives that JAX gives it.
stock_convolution = partial(_convolution.stock, stride=1, precision=None)


@jax.custom_vjp
def flipped(x: Array, kernel: Array) -> Array:
    """The same convolution, whose cotangents are one with the flipped kernel and nine products."""
    return stock_convolution(x, kernel)


def _turned(kernel: Array) -> Array:
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _flipped_back(kept, g):
    x, kernel = kept
    dw = _convolution.taps(x, g, size=kernel.shape[:2], stride=1, precision=None)
    return stock_convolution(g, _turned(kernel)), dw


flipped.defvjp(lambda x, kernel: (stock_convolution(x, kernel), (x, kernel)), _flipped_back)


@jax.custom_vjp
def filtered(x: Array, kernel: Array) -> Array:
    """The same convolution and its cotangents by minimal filtering."""
    return _winograd.convolve(x, kernel)


def _filtered_back(kept, g):
    x, kernel = kept
    return _winograd.convolve(g, _turned(kernel)), _winograd.kernel_cotangent(x, g)


filtered.defvjp(lambda x, kernel: (_winograd.convolve(x, kernel), (x, kernel)), _filtered_back)


def pooled(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """The maximum over 3 x 3 neighbourhoods, by the operation that is there for it."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (3, 3, 1), (1, 1, 1), "SAME")


def grouped(norm: GroupNorm, x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
    """Group norm with its means over space and the channels of a group at once."""
    y = x.reshape(-1, norm.groups, x.shape[-1] // norm.groups)
    mean = jnp.mean(y, (0, 2), keepdims=True)
    y = (y - mean) * lax.rsqrt(jnp.mean(jnp.square(y - mean), (0, 2), keepdims=True) + norm.eps)
    return y.reshape(x.shape) * norm.weight.reshape(1, 1, -1) + norm.bias.reshape(1, 1, -1)


def forms(size: Size, key: PRNGKeyArray) -> dict[str, tuple[dict[str, Form], Array, Any]]:
    """`(the stock form and ours, z, what does not change)` of each rule."""
    (n, side), (batch, length, width) = IMAGE[size], TOKENS[size]
    images = {c: jax.random.normal(key, (n, side, side, c)) for c in CHANNELS[size]}
    kernel = lambda c: jax.random.normal(key, (3, 3, c, c)) / (9 * c) ** 0.5
    each: dict[str, Form] = {STOCK: stock_convolution, FLIPPED: flipped}
    each["minimal filtering"] = filtered
    found = {f"convolution, {c} channels": (each, z, kernel(c)) for c, z in images.items()}
    tokens = jax.random.normal(key, (batch, length, width))
    weight = jax.random.normal(key, (width, width)) / width**0.5
    plain = lambda z, w: jax.vmap(lambda z: z @ w)(z)
    flat = lambda z, w: jax.vmap(lambda z: dense(z, w))(z)
    found["product under vmap"] = {STOCK: plain, "flat": flat}, tokens, weight
    c = CHANNELS[size][len(images) // 2]
    z, norm = images[c], GroupNorm(2 if size == "smoke" else 8, c)
    ours = lambda z, norm: jax.vmap(norm)(z)
    direct = lambda z, norm: jax.vmap(partial(grouped, norm))(z)
    found["group norm"] = {STOCK: direct, "space first": ours}, z, norm
    shifts = lambda z, x: jax.vmap(max_pool)(z) - x
    window = lambda z, x: jax.vmap(pooled)(z) - x
    found["max pool"] = {STOCK: window, "shifts": shifts}, z, 0.5 * jnp.abs(z)
    return found


def looped(form: Form, z: Array, rest: Any) -> dict[str, Program]:
    """The form in a loop, and in a loop with its VJP."""
    # Bounded, or eight in a row may end anywhere.
    f = lambda z, rest: jnp.tanh(form(z, rest))

    def forward(z, rest):
        return lax.fori_loop(0, LOOP, lambda _, z: f(z, rest), z)

    def both(z, rest, g):
        def step(_, c):
            z, g, total = c
            y, pull = jax.vjp(f, z, rest)
            dz, d = pull(g)
            return y, dz, jax.tree.map(jnp.add, total, d)

        return lax.fori_loop(0, LOOP, step, (z, g, jax.tree.map(jnp.zeros_like, rest)))

    return {"forward": (forward, (z, rest)), "VJP": (both, (z, rest, jnp.ones_like(z)))}


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    for rule, (each, z, rest) in forms(size, key).items():
        for name, form in each.items():
            yield from ((f"{rule}, {name}, {k}", p) for k, p in looped(form, z, rest).items())


def rules(run: Run) -> None:
    every = forms(run.size, run.key)
    run.cases({name: partial(compared, run, name, *rule) for name, rule in every.items()})


def compared(run: Run, rule: str, each: dict[str, Form], z: Array, rest: Any) -> None:
    # Forwards the flipped form is the stock one.
    kinds = {name: ("VJP",) if name == FLIPPED else ("forward", "VJP") for name in each}
    made = {(n, k): looped(form, z, rest)[k] for n, form in each.items() for k in kinds[n]}
    found: dict[Any, Compiled] = {name: good(p) for name, p in compiled(made).items()}
    calls = {name: p.call for name, p in found.items()}
    taken = seconds(calls, run.pick(1, 5, 15), max(run.left / 8, 0.5))
    allowed = _ALLOWED.get(jax.default_backend(), _OTHERWISE)
    for name in [name for name in each if name != STOCK]:
        said, slower = "", False
        for kind in kinds[name]:
            ours, theirs = (taken[form, kind] / LOOP for form in (name, STOCK))
            said += f"{kind} {milliseconds(ours)} / {milliseconds(theirs)} = {ours / theirs:.2f}; "
            slower |= ours > _SLOWER * theirs
        error = max(_gap(found[name, k].call(), found[STOCK, k].call()) for k in kinds[name])
        note = "note" if slower and error <= allowed else ""
        limit = f"{allowed:g}; {_SLOWER}" if note else f"{allowed:g}"
        said = f"ours / stock: {said}values differ by {error:.1e}"
        run.add(f"{rule}, {name}", said, limit=limit, ok=error <= allowed, note=note)


def _gap(a: Any, b: Any) -> float:
    """The largest difference of two pytrees, each array's over its largest entry."""
    gaps = [0.0]
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        gap = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1e-6)
        gaps.append(math.inf if np.isnan(gap) else float(gap))
    return max(gaps)

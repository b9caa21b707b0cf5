"""Six kinds of f whose reversal has to be exact: `f(z, params, x)` of one example.

Each is `x + g(z) / 4` with slopes of g that are hardly above 1, so that the iteration contracts and
forgets its rounding: the gradient of another program, which rounds otherwise, is then the same to
rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from deqjax.nn import CausalAttention, Conv2d, GroupNorm

from bench.accelerator.run import Size
from bench.blocks import normalise

_BATCH: dict[Size, int] = {"smoke": 3, "reduced": 4, "full": 8}
_LONG: dict[Size, int] = {"smoke": 16, "reduced": 1024, "full": 8192}  # rows of the softmax


class Kind(NamedTuple):
    """One of the six, with inputs for a batch."""

    one: Callable[[Array, Any, Array], Array]
    z0: Float[Array, "b ..."]
    params: PyTree
    x: Float[Array, "b ..."]
    cotangent: Float[Array, "b ..."]

    def astype(self, dtype: DTypeLike) -> "Kind":
        cast = lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x
        return Kind(self.one, *jax.tree.map(cast, tuple(self[1:])))


_mean_square = partial(normalise, eps=1e-2)


def _join(z: Array, g: Array, x: Array) -> Array:
    return (x + 0.25 * g).astype(z.dtype)


def _mlp(z, p, x):
    return _join(z, jax.nn.gelu(_mean_square(z @ p["in"])) @ p["out"], x)


def _convolution(z, p, x):
    up, norm, down = p
    return _join(z, down(jax.nn.relu(norm(up(z)))), x)


def _attention(z, p, x):
    return _join(z, p(_mean_square(z)), x)


def _scan(z, p, x):
    def step(h, row):
        h = jnp.tanh(h @ p["state"] + row @ p["row"])
        return h, h

    return _join(z, jax.lax.scan(step, jnp.zeros_like(z[0]), z)[1], x)


def _scatter(z, p, x):
    to, source = p["edges"]
    messages = jnp.tanh(z[source] @ p["weight"])
    return _join(z, jnp.zeros_like(z).at[to].add(messages) / 4, x)


def _softmax(z, p, x):
    return _join(z, jax.nn.softmax(z @ p["keys"], -1) @ p["values"], x)


class Form(NamedTuple):
    """A function, and the shapes of z of one example."""

    one: Callable[..., Array]
    smoke: tuple[int, ...]
    reduced: tuple[int, ...]
    full: tuple[int, ...]


FORMS: dict[str, Form] = {
    "MLP": Form(_mlp, (8,), (64,), (512,)),
    "convolution": Form(_convolution, (4, 4, 4), (8, 8, 16), (32, 32, 64)),
    "attention": Form(_attention, (4, 8), (32, 32), (256, 256)),
    "softmax": Form(_softmax, (2, 4), (8, 16), (64, 128)),
    "scan": Form(_scan, (3, 4), (8, 16), (8, 128)),
    # Last: deterministic scatters may be taken one entry after the other.
    "scatter": Form(_scatter, (6, 4), (64, 8), (256, 64)),
}


def kind(name: str, size: Size, key: PRNGKeyArray) -> Kind:
    form, batch = FORMS[name], _BATCH[size]
    shape = getattr(form, size)
    keys = jax.random.split(jax.random.fold_in(key, list(FORMS).index(name)), 8)
    # The examples differ in size, so that they stop at different steps.
    spread = jnp.linspace(0.5, 4.0, batch).reshape(batch, *(1,) * len(shape))
    normal = lambda k: jax.random.normal(k, (batch, *shape))
    z0, x, cotangent = 0.1 * normal(keys[0]), spread * normal(keys[1]), normal(keys[2])
    return Kind(form.one, z0, _params(name, size, shape, keys[3:]), x, cotangent)


def _params(name: str, size: Size, shape: tuple[int, ...], keys: PRNGKeyArray) -> Any:
    *rest, n = shape
    matrix = lambda i, *s: jax.random.normal(keys[i], s) / s[0] ** 0.5
    match name:
        case "MLP":
            return {"in": matrix(0, n, 2 * n), "out": matrix(1, 2 * n, n)}
        case "convolution":
            conv = lambda i, o, k: Conv2d(i, o, use_bias=False, key=k)
            return conv(n, 2 * n, keys[0]), GroupNorm(2, 2 * n), conv(2 * n, n, keys[1])
        case "attention":
            return CausalAttention(n, 2 if size == "smoke" else 4, key=keys[0])
        case "scan":
            return {"state": 0.5 * matrix(0, n, n), "row": matrix(1, n, n)}
        case "scatter":
            # Four edges a node on average, to few nodes each time, so that many add to the same.
            edges = np.random.default_rng(0).integers(0, rest[0], (2, 4 * rest[0]))
            edges[0] = edges[0] * edges[0] // rest[0]
            return {"edges": jnp.asarray(edges, jnp.int32), "weight": matrix(0, n, n)}
        case _:
            m = _LONG[size]
            return {"keys": 4 * matrix(0, n, m), "values": 8 * matrix(1, m, n)}

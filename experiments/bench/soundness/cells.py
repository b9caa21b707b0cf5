"""Kinds of cell whose solves are reversed: all that a user may write into f.

Each is `fn(z, w, x)` on one example, in any floating-point dtype, w being the arrays that examples
share. Many transform w or x in ways that do not depend on z, which a compiler may do elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import blocks

N = 8
_PERMUTATION = np.array([3, 0, 6, 1, 7, 2, 5, 4], np.int32)
_EDGES = np.array([0, 0, 1, 2, 2, 2, 3, 1], np.int32)


class Cell(NamedTuple):
    """A cell, and the shapes of its arrays; w of norm 0.7 where it is a square matrix."""

    name: str
    fn: Callable[[Any, Any, Any], Any]
    shapes: tuple[tuple[int, ...], ...] = ((N, N),)
    state: tuple[int, ...] = (N,)
    half: bool = True  # there is such an operation in two bytes too
    coarse: bool = False  # it rounds to bfloat16, whatever its dtype


normalise = functools.partial(blocks.normalise, eps=1e-3)


def _conv(z: Any, kernel: Any, layout: tuple[str, str, str]) -> Any:
    strides = (1,) * (z.ndim - 1)
    batch = jax.lax.conv_general_dilated(z[None], kernel, strides, "SAME", dimension_numbers=layout)
    return batch[0]


def _conv2d(z: Any, kernel: Any) -> Any:
    return _conv(z, kernel, ("NHWC", "HWIO", "NHWC"))


def _group_norm(v: Any) -> Any:
    split = v.reshape(*v.shape[:-1], 2, v.shape[-1] // 2)
    return normalise(split, (-4, -3, -1)).reshape(v.shape)


def _block(z: Any, w: Any, x: Any) -> Any:
    y = jax.nn.relu(_group_norm(_conv2d(z, w[0])))
    return _group_norm(jax.nn.relu(z + _group_norm(_conv2d(y, w[1]) + x)))


def _attention(z: Any, w: Any, x: Any) -> Any:
    qkv, out = w
    q, k, v = jnp.split(normalise(z + x) @ qkv, 3, -1)
    scores = q @ k.T / 2
    causal = np.tril(np.ones(scores.shape, bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e4), -1)
    return normalise(x + 0.5 * z + (weights @ v) @ out)


def _heads(z: Any, w: Any, x: Any) -> Any:
    q = (z @ w[0] + x).reshape(3, 2, 2)
    scores = jnp.einsum("qhd,khd->hqk", q, q)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, -1), q).reshape(3, 4)


def _mlp(z: Any, w: Any, x: Any) -> Any:
    return normalise(x + z + jax.nn.gelu(normalise(z) @ w[0]) @ w[1])


def _recurrent(z: Any, w: Any, x: Any) -> Any:
    step = lambda h, v: (jnp.tanh(w[0] @ h + v), h)
    _, hs = jax.lax.scan(step, z, jnp.stack([x, x / 2, -x]))
    return hs[2]


def _gated(z: Any, w: Any, x: Any) -> Any:
    gate = jax.nn.sigmoid(w[1] @ z + x)
    return gate * z / 2 + (1 - gate) * jnp.tanh(w[0] @ z + x)


@jax.custom_vjp
def _own_rule(u: Any) -> Any:
    return jnp.tanh(u)


_own_rule.defvjp(lambda u: (jnp.tanh(u), jnp.tanh(u)), lambda y, g: (g * (1 - y * y),))


@jax.custom_jvp
def _own_jvp(u: Any) -> Any:
    return jnp.arctan(u)


_own_jvp.defjvp(lambda primals, tangents: (_own_jvp(*primals), tangents[0] / (1 + primals[0] ** 2)))


def _fourier(z: Any, w: Any, x: Any) -> Any:
    u = (w[0] @ z + x).astype(jnp.promote_types(z.dtype, jnp.float32))
    return jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(u) / 2, N)).astype(z.dtype)


def _cast(z: Any, w: Any, x: Any) -> Any:
    product = w[0].astype(jnp.bfloat16) @ z.astype(jnp.bfloat16)
    return jnp.tanh(product.astype(z.dtype) + x)


def _dropped(z: Any, w: Any, x: Any) -> Any:
    mask = jax.random.bernoulli(jax.random.key(0), np.float32(0.7), z.shape)
    return jnp.tanh(w[0] @ jnp.where(mask, z / 0.7, 0) + x)


def _weight(change: Callable[[Any], Any], scale: float = 1.0) -> Callable[[Any, Any, Any], Any]:
    """`tanh(w' z + x)`, w' made of w inside f."""
    return lambda z, w, x: jnp.tanh(scale * (change(w[0]) @ z) + x)


def _act(sigma: Callable[[Any], Any]) -> Callable[[Any, Any, Any], Any]:
    return lambda z, w, x: sigma(w[0] @ z + x)


def _eye(w: Any) -> Any:
    return jnp.eye(len(w), dtype=w.dtype)


_ROWS: tuple[tuple[int, ...], ...] = ((4, 12), (4, 4))

CELLS: tuple[Cell, ...] = (
    Cell("tanh(W z + x)", _act(jnp.tanh)),
    Cell("tanh(W z + W x)", lambda z, w, x: jnp.tanh(w[0] @ z + w[0] @ x)),
    Cell("tanh(W (z + x))", lambda z, w, x: jnp.tanh(w[0] @ (z + x))),
    Cell("relu", _act(jax.nn.relu)),
    Cell("gelu", _act(jax.nn.gelu)),
    Cell("silu", _act(jax.nn.silu)),
    Cell("softplus", _act(jax.nn.softplus)),
    Cell("sin", _act(jnp.sin)),
    Cell("hard tanh", _act(lambda u: jnp.clip(u, -1, 1))),
    Cell("u / (1 + u^2)", _act(lambda u: u / (1 + jnp.square(u)))),
    Cell("u / sqrt(1 + u^2)", _act(lambda u: u / jnp.sqrt(1 + jnp.square(u)))),
    Cell("W W'", _weight(lambda w: w @ w.T)),
    Cell("W - W'", _weight(lambda w: (w - w.T) / 2)),
    Cell("exp(W)", _weight(jnp.exp, 0.1)),
    Cell("softmax(W)", _weight(lambda w: jax.nn.softmax(w, -1), 0.8)),
    Cell("W / norm", _weight(lambda w: w / jnp.linalg.norm(w), 1.5)),
    Cell("W / row norms", _weight(
        lambda w: w / jnp.sqrt(jnp.sum(jnp.square(w), 1, keepdims=True)), 0.5)),
    Cell("solve", _weight(lambda w: jnp.linalg.inv(2 * _eye(w) + w)), half=False),
    Cell("Cholesky", _weight(
        lambda w: jnp.linalg.cholesky(w @ w.T + _eye(w)), 0.5), half=False),
    Cell("QR", _weight(lambda w: jnp.linalg.qr(w)[0], 0.7), half=False),
    Cell("dropout by a key", _dropped),
    Cell("product in bfloat16", _cast, coarse=True),
    Cell("custom_vjp", _act(_own_rule)),
    Cell("custom_jvp", _act(_own_jvp)),
    Cell("convolution, 1-d", lambda z, w, x: jnp.tanh(
        _conv(z, w[0], ("NWC", "WIO", "NWC")) + x), ((3, 4, 4),), (5, 4)),
    Cell("convolution, group norm", _block, ((3, 3, 4, 4),) * 2, (3, 3, 4)),
    Cell("layer norm, MLP", _mlp, ((N, 2 * N), (2 * N, N))),
    Cell("RMS norm", lambda z, w, x: (lambda u: u / jnp.sqrt(jnp.mean(jnp.square(u)) + 1e-3))(
        w[0] @ z + x)),
    Cell("causal attention", _attention, _ROWS, (3, 4)),
    Cell("attention, two heads", _heads, ((4, 4),), (3, 4)),
    Cell("softmax(W z + x)", _act(jax.nn.softmax)),
    Cell("logsumexp", lambda z, w, x: jax.nn.logsumexp(w[0] * z[None, :], axis=1) / 4 + x),
    Cell("scan inside", _recurrent),
    Cell("loop inside", lambda z, w, x: jax.lax.fori_loop(
        0, 3, lambda i, v: jnp.tanh(w[0] @ v + x), z)),
    Cell("cond inside", lambda z, w, x: jax.lax.cond(
        jnp.sum(jnp.abs(x)) > 6, jnp.tanh, jnp.arctan, w[0] @ z + x)),
    Cell("where", _act(lambda u: jnp.where(u > 0, u, 0.1 * u))),
    Cell("gated", _gated, ((N, N), (N, N))),
    Cell("scatter-add", lambda z, w, x: jnp.tanh(
        (w[0] @ z + x).at[_EDGES].add(z / 4))),
    Cell("gather", lambda z, w, x: jnp.tanh(w[0] @ z[_PERMUTATION] + x)),
    Cell("segment sums", lambda z, w, x: jnp.tanh(
        jax.ops.segment_sum(w[0] @ z, _EDGES, 4)[_EDGES] / 2 + x)),
    Cell("sort", lambda z, w, x: jnp.sort(jnp.tanh(w[0] @ z + x))),
    Cell("top-k", lambda z, w, x: jnp.tanh(
        w[0] @ z + x + jnp.pad(jax.lax.top_k(z, 3)[0], (0, 5)) / 4)),
    Cell("cumsum", lambda z, w, x: jnp.tanh(jnp.cumsum(w[0] @ z) / 3 + x)),
    Cell("associative scan", lambda z, w, x: jnp.tanh(
        jax.lax.associative_scan(jnp.maximum, w[0] @ z) + x)),
    Cell("max pool", lambda z, w, x: jax.lax.reduce_window(
        jnp.tanh(w[0] @ z + x), np.array(-np.inf, z.dtype), jax.lax.max, (3,), (1,), "SAME")),
    Cell("mean and largest", lambda z, w, x: jnp.tanh(
        w[0] @ z + x + jnp.mean(z) / 4 + jnp.max(z) / 4)),
    Cell("einsum, two of z", lambda z, w, x: jnp.tanh(
        jnp.einsum("ijk,j,k->i", w[0], z, jnp.tanh(x)) + x), ((N, 3 + 5, N),)),
    Cell("Fourier", _fourier, half=False),
)  # fmt: skip


class Data(NamedTuple):
    """Arrays of float64 that are exact in the dtype of the program; axis 0: examples, but of w."""

    w: tuple[np.ndarray, ...]
    x: np.ndarray
    z0: np.ndarray
    g: np.ndarray


def data(cell: Cell, examples: int, dtype: Any, seed: list[int]) -> Data:
    rng = np.random.default_rng(seed)

    def weight(shape):
        w = rng.standard_normal(shape)
        if len(shape) == 2 and shape[0] == shape[1]:
            return 0.7 * w / np.linalg.norm(w, 2)
        return 0.7 * w / np.sqrt(np.prod(shape[:-1]))

    stored = lambda v: np.asarray(v.astype(jnp.dtype(dtype)).astype(float))
    w = tuple(stored(weight(shape)) for shape in cell.shapes)
    x, z0, g = (stored(rng.standard_normal((examples, *cell.state))) for _ in range(3))
    return Data(w, x, stored(z0 / 2), g)

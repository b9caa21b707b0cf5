"""The blocks whose gradients are measured: `fn(z, (params, x)) -> z`, axis 0 being the batch.

All are normalised by `x / jnp.sqrt(v)`, on purpose: XLA may turn that into `x * rsqrt(v)` in one
program and not in another, which is the rounding that a reversal must survive.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

import deqjax

Args = tuple[PyTree, Array]


class Cell(NamedTuple):
    """A block with all that a solve and its gradient need."""

    name: str
    fn: Callable[[Any, Any], Any]
    z0: Array
    args: Args  # parameters, injected input
    cotangent: Array  # of the solution: a fixed one, so that no loss adds rounding of its own

    def astype(self, dtype: DTypeLike) -> "Cell":
        """The same numbers, rounded to `dtype`."""
        arrays = (self.z0, self.args, self.cotangent)
        z0, args, cotangent = jax.tree.map(lambda v: v.astype(dtype), arrays)
        return self._replace(z0=z0, args=args, cotangent=cotangent)


def normalise(
    v: Float[Array, "..."], axes: int | tuple[int, ...] = -1, eps: float = 1e-5
) -> Float[Array, "..."]:
    """Mean 0 and variance 1 over `axes`."""
    v = v - jnp.mean(v, axes, keepdims=True)
    return v / jnp.sqrt(jnp.mean(jnp.square(v), axes, keepdims=True) + eps)


def group_normalise(v: Float[Array, "n h w c"], groups: int) -> Float[Array, "n h w c"]:
    """Mean 0 and variance 1 over an example's pixels and the channels of a group."""
    return normalise(v.reshape(v.shape[0], -1, groups, v.shape[3] // groups), (1, 3)).reshape(
        v.shape
    )


def mlp(z: Float[Array, "n d"], args: Args) -> Float[Array, "n d"]:
    """Two layers and a skip connection, layer-normalised."""
    params, x = args
    hidden = jax.nn.gelu(normalise(z @ params["up"] + x @ params["inject"], -1))
    return normalise(x + z + hidden @ params["down"], -1)


def conv(z: Float[Array, "n h w c"], args: Args) -> Float[Array, "n h w c"]:
    """Two 3 x 3 convolutions and a skip connection, group-normalised."""
    params, x = args
    hidden = jax.nn.gelu(group_normalise(jax.vmap(params["up"])(z), 4))
    return group_normalise(x + z + jax.vmap(params["down"])(hidden), 4)


def attention(z: Float[Array, "n l d"], args: Args, *, heads: int) -> Float[Array, "n l d"]:
    """Causal attention, then a two-layer perceptron, each with a skip connection."""
    params, x = args
    n, length, width = z.shape
    # Two axes: a CPU's matrix product of a two-dimensional operand is the faster one.
    z = (z + x).reshape(n * length, width)
    parts = (normalise(z, -1) @ params["qkv"]).reshape(n, length, 3, heads, width // heads)
    q, k, v = jnp.moveaxis(parts, (2, 3), (0, 2)).reshape(3, n * heads, length, width // heads)
    scores = jnp.matmul(q, k.swapaxes(1, 2)) / (width // heads) ** 0.5
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
    mixed = jnp.matmul(weights, v).reshape(n, heads, length, -1).swapaxes(1, 2)
    z = z + mixed.reshape(n * length, width) @ params["out"]
    z = z + jax.nn.gelu(normalise(z, -1) @ params["up"]) @ params["down"]
    return normalise(z, -1).reshape(n, length, width)


def tanh(z: Float[Array, "... d"], args: Args) -> Float[Array, "... d"]:
    """tanh(W z + x): nothing but weights."""
    weight, x = args
    return jnp.tanh(z @ weight + x)


def make_mlp(batch: int, width: int, key: PRNGKeyArray) -> Cell:
    shapes = {"up": (width, 2 * width), "inject": (width, 2 * width), "down": (2 * width, width)}
    k1, k2 = jax.random.split(key)
    params = _matrices(shapes, k1, down=0.5)
    return _cell("MLP", mlp, params, (batch, width), k2)


def make_conv(batch: int, size: int, channels: int, key: PRNGKeyArray) -> Cell:
    k1, k2, k3 = jax.random.split(key, 3)
    params = {
        "up": deqjax.nn.Conv2d(channels, 2 * channels, use_bias=False, key=k1),
        "down": deqjax.nn.Conv2d(2 * channels, channels, use_bias=False, key=k2),
    }
    return _cell("convolution", conv, params, (batch, size, size, channels), k3)


def make_attention(batch: int, length: int, width: int, heads: int, key: PRNGKeyArray) -> Cell:
    k1, k2 = jax.random.split(key)
    fn = jax.tree_util.Partial(attention, heads=heads)
    params = _matrices(attention_shapes(width), k1, out=0.5, down=0.5)
    return _cell("attention", fn, params, (batch, length, width), k2)


def attention_shapes(width: int) -> dict[str, tuple[int, int]]:
    """The parameters of `attention`."""
    qkv, out = (width, 3 * width), (width, width)
    return {"qkv": qkv, "out": out, "up": (width, 4 * width), "down": (4 * width, width)}


def make_tanh(batch: int, width: int, key: PRNGKeyArray) -> Cell:
    k1, k2 = jax.random.split(key)
    # A Gaussian matrix of this scale has a spectral radius of 1/2.
    weight = 0.5 * jax.random.normal(k1, (width, width)) / width**0.5
    return _cell("tanh(W z + x)", tanh, weight, (batch, width), k2)


def _matrices(
    shapes: dict[str, tuple[int, int]], key: PRNGKeyArray, **scales: float
) -> dict[str, Array]:
    """Gaussian; outputs of variance `scale`^2. What joins a skip connection is the smaller."""
    keys = jax.random.split(key, len(shapes))
    scale = {name: scales.get(name, 1.0) / shape[0] ** 0.5 for name, shape in shapes.items()}
    return {
        name: scale[name] * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _cell(name: str, fn: Any, params: PyTree, shape: tuple[int, ...], key: PRNGKeyArray) -> Cell:
    x, z0, cotangent = (jax.random.normal(k, shape) for k in jax.random.split(key, 3))
    # z0 isn't zero, so that no residual of a solve is taken for it.
    return Cell(name, fn, 0.1 * z0, (params, 0.5 * x), cotangent)

"""Causal self-attention, and the transformer block that is the cell of a language model."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._tree import widen
from ._linear import Linear


class AttentionCache(NamedTuple):
    """Keys and values of a prefix; positions that are not yet reached are never attended to."""

    keys: Float[Array, "s heads d"]
    values: Float[Array, "s heads d"]


class CausalAttention(eqx.Module):
    """Multi-head causal self-attention over one sequence.

        y = softmax(Q K^T / sqrt(d) + causal mask) V W_out,    Q, K, V = x W_qkv

    by `jax.nn.dot_product_attention`, which takes the softmax in float32.

    **Arguments:**

    - `width`: length of the last axis; `heads` divides it.
    - `rotary`: whether queries and keys are rotated by angles proportional to their position, in
        pairs of entries d/2 apart, with frequencies 10,000^(-2i/d); d = width / heads is then even.
    - `scale`: of the initial output weights.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial weights.

    **Call:** `attention(x)` with x of shape (L, width), any float dtype. Returns the same shape and
    dtype. `attention.extend(x, cache, start)` takes x for positions start, start + 1, ... only.
    `jax.nn.dot_product_attention` refuses bfloat16 under JAX's strict dtype promotion, and float16
    on a CPU.

    **Cost:** 8 L width^2 + 4 L^2 width operations.

    **When not to use it:** to attend to later positions, or across sequences.

    **Raises:** `ValueError` if `heads` does not divide `width`, or rotary with an odd quotient.

    Reference: Vaswani et al., Attention is all you need, NeurIPS 2017, equation 1; Su et al.,
    RoFormer, arXiv 2104.09864, equation 34.
    """

    qkv: Linear
    out: Linear
    heads: int = eqx.field(static=True)
    rotary: bool = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rotary: bool = False,
        scale: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        if heads < 1 or width % heads or (rotary and width // heads % 2):
            raise ValueError(
                f"CausalAttention expects heads to divide width, with an even quotient for rotary "
                f"positions, got width={width}, heads={heads}, rotary={rotary}; choose for "
                f"instance heads = width / 64."
            )
        qkv_key, out_key = jax.random.split(key)
        self.qkv = Linear(width, 3 * width, use_bias=False, dtype=dtype, key=qkv_key)
        self.out = Linear(width, width, scale=scale, use_bias=False, dtype=dtype, key=out_key)
        self.heads = heads
        self.rotary = rotary

    def _project(self, x, start):
        qkv = self.qkv(x).reshape(x.shape[0], 3, self.heads, -1)
        q, k, v = (qkv[:, i] for i in range(3))
        if self.rotary:
            position = start + jnp.arange(x.shape[0])
            q, k = _turned(q, position), _turned(k, position)
        return q, k, v

    def __call__(self, x: Float[Array, "l width"]) -> Float[Array, "l width"]:
        """Attends within one sequence."""
        q, k, v = self._project(x, 0)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))

    def extend(
        self, x: Float[Array, "t width"], cache: AttentionCache, start: Int[Array, ""]
    ) -> tuple[Float[Array, "t width"], AttentionCache]:
        """Attends from positions `start`, `start + 1`, ... to these and all earlier ones.

        The cache needs room for these positions: beyond it, earlier ones would be overwritten."""
        q, k, v = self._project(x, start)
        write = lambda whole, part: jax.lax.dynamic_update_slice(whole, part, (start, 0, 0))
        cache = AttentionCache(write(cache.keys, k), write(cache.values, v))
        to, of = start + jnp.arange(x.shape[0])[:, None], jnp.arange(cache.keys.shape[0])[None]
        return self.out(
            jax.nn.dot_product_attention(q, *cache, mask=(of <= to)[None]).reshape(x.shape)
        ), cache


class TransformerCell(eqx.Module):
    """The pre-norm transformer block of the reversible DEQ paper, x injected before attention.

        h = z + attention(LN(z + x));    f(z, x) = h + MLP(LN(h))

    z and x are sums of residuals and keep their dtype. Norms are computed in float32, attention and
    MLP in `compute_dtype`. With x = 0 the cell is the explicit block. z is added without being
    normalised, and grows with the number of steps: see `fraction_bits` of `deqjax.Reversible`.

    **Arguments:**

    - `width`, `heads`, `rotary`: as for `nn.CausalAttention`.
    - `hidden`: widths of the MLP's inner layers, each with a GELU.
    - `scale`: of the initial weights that add to the residual sum.
    - `compute_dtype`: of products and attention; default: that of z.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial weights.

    **Call:** `cell(z, x)`, both (L, width), returns the same shape and dtype. `cell.extend(z, x,
    cache, start)` does so for positions from start on, and returns `(f, cache)`.

    **Cost:** one attention and one MLP.

    **When not to use it:** if the fixed point itself matters: nothing makes this cell contract.

    **Raises:** as `nn.CausalAttention`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the language model.
    """

    attention: CausalAttention
    mlp: tuple[Linear, ...]
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    compute_dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: tuple[int, ...],
        *,
        rotary: bool = False,
        scale: float = 1.0,
        compute_dtype: DTypeLike | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        attention_key, *keys = jax.random.split(key, len(hidden) + 2)
        options = {"scale": scale, "dtype": dtype}
        self.attention = CausalAttention(width, heads, rotary=rotary, key=attention_key, **options)
        sizes = [width, *hidden]
        inner = [
            Linear(i, o, dtype=dtype, key=k) for i, o, k in zip(sizes, hidden, keys, strict=False)
        ]
        self.mlp = (*inner, Linear(sizes[-1], width, key=keys[-1], **options))
        self.norm1 = eqx.nn.LayerNorm(width, dtype=dtype)
        self.norm2 = eqx.nn.LayerNorm(width, dtype=dtype)
        self.compute_dtype = compute_dtype

    def _normalised(self, norm, h):
        h = jax.vmap(norm)(h)
        return h if self.compute_dtype is None else h.astype(self.compute_dtype)

    def _feed_forward(self, h):
        y = self._normalised(self.norm2, h)
        for layer in self.mlp[:-1]:
            y = jax.nn.gelu(layer(y))
        return h + self.mlp[-1](y).astype(h.dtype)

    def __call__(self, z: Float[Array, "l width"], x: Float[Array, "l width"]):
        """Evaluates the cell on one sequence."""
        h = z + self.attention(self._normalised(self.norm1, z + x)).astype(z.dtype)
        return self._feed_forward(h)

    def extend(
        self, z: Float[Array, "t width"], x: Float[Array, "t width"], cache: AttentionCache, start
    ):
        """Evaluates the cell for positions `start`, `start + 1`, ... after a prefix in `cache`."""
        y, cache = self.attention.extend(self._normalised(self.norm1, z + x), cache, start)
        return self._feed_forward(z + y.astype(z.dtype)), cache

    def cache(self, length: int, dtype: DTypeLike) -> AttentionCache:
        """An empty cache for the keys and values of `length` positions, with z of `dtype`."""
        heads, width = self.attention.heads, self.attention.out.weight.shape[0]
        dtype = dtype if self.compute_dtype is None else self.compute_dtype
        empty = jnp.zeros((length, heads, width // heads), dtype)
        return AttentionCache(empty, empty)


def _turned(x: Float[Array, "t heads d"], position: Int[Array, " t"]) -> Float[Array, "t heads d"]:
    # In float32 for every x: a bfloat16 cannot hold a position above 256.
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None, None] * rate[None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(widen(x), 2, -1)
    sin, cos = sin.astype(a.dtype), cos.astype(a.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)

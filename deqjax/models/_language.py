"""Parts of every language model: its two ends, and the continuation of a prompt."""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from .._bilinear import dense
from .._checks import check_size, number
from .._tree import widen


class Vocabulary(eqx.Module):
    """Tokens to vectors, and vectors to logits: both ends of a language model.

        x = sqrt(width) table[token] + positions;    logits = head(LN(h))

    **Arguments:**

    - `size`, `width`: of the table; normal, of standard deviation 1 / sqrt(width).
    - `length`: the number of learned positions, of standard deviation 1; `None`: there are none.
    - `tied`: whether the head is the transposed table.
    - `compute_dtype`: of the head's product, which is summed in float32 or wider.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial parameters.

    Reference: Vaswani et al., Attention is all you need, NeurIPS 2017, section 3.4.
    """

    table: Float[Array, "v width"]
    positions: Float[Array, "l width"] | None
    norm: eqx.nn.LayerNorm
    head: Float[Array, "width v"] | None
    compute_dtype: DTypeLike | None = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        width: int,
        length: int | None,
        *,
        tied: bool,
        compute_dtype: DTypeLike | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        for name, value in (("size", size), ("width", width), ("length", length or 1)):
            check_size(name, value)
        table_key, position_key, head_key = jax.random.split(key, 3)
        scale = 1 / math.sqrt(width)
        self.table = scale * jax.random.normal(table_key, (size, width), dtype)
        self.positions = None
        if length is not None:
            self.positions = jax.random.normal(position_key, (length, width), dtype)
        self.norm = eqx.nn.LayerNorm(width, dtype=dtype)
        self.head = None if tied else scale * jax.random.normal(head_key, (width, size), dtype)
        self.compute_dtype = compute_dtype

    def embed(self, tokens: Int[Array, "*b t"], start: Any = 0) -> Float[Array, "*b t width"]:
        """Vectors of tokens at positions start, start + 1, ...; NaN for an invalid token."""
        size, width = self.table.shape
        tokens = jnp.where(tokens < 0, size, tokens)  # negative ones would count from the end
        x = math.sqrt(width) * self.table.at[tokens].get(mode="fill", fill_value=jnp.nan)
        if self.positions is None:
            return x
        rows = jax.lax.dynamic_slice_in_dim(self.positions, start, tokens.shape[-1])
        return x + rows.reshape((1,) * (x.ndim - 2) + rows.shape)

    def logits(self, h: Float[Array, "*b width"]) -> Float[Array, "*b v"]:
        """Logits of the next token."""
        norm = self.norm
        for _ in h.shape[:-1]:
            norm = jax.vmap(norm)
        y, out = norm(h), widen(h).dtype
        head = self.table.T if self.head is None else self.head
        return dense(y if self.compute_dtype is None else y.astype(self.compute_dtype), head, out)


class AbstractLanguageModel(eqx.Module):
    """A causal model of token sequences that can continue from a cached prefix."""

    vocabulary: AbstractVar[Vocabulary]

    @abc.abstractmethod
    def caches(self, length: int) -> PyTree:
        """Empty caches for `length` positions."""

    @abc.abstractmethod
    def extend(
        self, tokens: Int[Array, " t"], caches: PyTree, start: Int[Array, ""]
    ) -> tuple[Float[Array, "t width"], PyTree]:
        """The last hidden vectors at positions start, start + 1, ..., after those in `caches`.

        The caches need room for them: beyond it, earlier positions would be overwritten."""

    def generate(
        self,
        prompt: Int[Array, " t"],
        length: int,
        *,
        temperature: float = 0.0,
        key: PRNGKeyArray | None = None,
    ) -> Int[Array, " length"]:
        """Continues a prompt, one token after the other.

        The keys and values that each evaluation of a block computed for earlier positions are kept
        and never computed again, because causal attention cannot change them.

        **Arguments:**

        - `prompt`: at least one token.
        - `length`: the number of tokens to add.
        - `temperature`: 0 takes the likeliest token each time; otherwise logits are divided by the
            temperature, and a token is drawn.
        - `key`: for drawing; needed if the temperature is not 0.

        **When not to use it:** beyond the length for which rotary positions were trained: they are
        computed there, but mean little.

        **Returns:** the new tokens; -1 from the token at which a solve left the range of its
        integers, or its numbers were not finite.

        **Cost:** per token as many evaluations of its blocks, on one position each, as a position
        costs in training; copies of keys and values for each of these evaluations.

        **Raises:** `ValueError` for a prompt that is not integers of shape (t,), t at least 1;
            beyond the learned positions; for a negative temperature or a missing key; with an
            equilibrium layer that stops on a tolerance (later positions would then change earlier
            ones), or that mixes iterates of all positions.
        """
        # Check the arguments.
        integers = jnp.issubdtype(prompt.dtype, jnp.integer)
        if prompt.ndim != 1 or prompt.shape[0] < 1 or not integers:
            raise ValueError(
                f"generate expects a prompt of integers of shape (t,), at least one token, got "
                f"{prompt.shape} of {prompt.dtype}; for a batch of prompts use jax.vmap."
            )
        temperature = number(temperature)
        if length < 1 or not temperature >= 0:
            raise ValueError(
                f"generate expects a length of at least 1 and a temperature that is a number of "
                f"at least 0, not traced, got {length} and {temperature}; pass 0 for the likeliest."
            )
        positions, total = self.vocabulary.positions, prompt.shape[0] + length
        # With a smaller temperature the quotients would overflow; the limit is the likeliest token.
        temperature = temperature if temperature > 1e-30 else 0.0
        if temperature > 0 and key is None:
            raise ValueError(
                f"generate expects a key for temperature {temperature}, got None; pass "
                f"key=jax.random.key(0), or temperature=0 for the likeliest tokens."
            )
        if positions is not None and total > positions.shape[0]:
            raise ValueError(
                f"generate expects at most {positions.shape[0]} positions, the learned ones, got "
                f"{total} with the prompt; shorten it, or build the model with rotary=True."
            )

        # Generate; without a temperature the keys are not used.
        keys = jax.random.split(jax.random.key(0) if key is None else key, length)
        return _generate(self, prompt, keys, temperature)


@eqx.filter_jit
def _generate(model, prompt, keys, temperature):
    def distribution(h):
        return model.vocabulary.logits(h[-1])

    def body(carry, key):
        caches, logits, at, ok = carry
        ok = ok & jnp.all(jnp.isfinite(logits))
        draw = lambda: jax.random.categorical(key, logits / temperature)
        token = draw() if temperature > 0 else jnp.argmax(logits)
        token = token.astype(prompt.dtype)
        h, caches = model.extend(token[None], caches, at)
        return (caches, distribution(h), at + 1, ok), jnp.where(ok, token, -1)

    caches = model.caches(prompt.shape[0] + keys.shape[0])
    h, caches = model.extend(prompt, caches, jnp.asarray(0))
    start = jnp.asarray(prompt.shape[0])
    init = (caches, distribution(h), start, jnp.asarray(True))
    return jax.lax.scan(body, init, keys)[1]

"""Language models: the transformer of the reversible DEQ paper, and its explicit counterpart."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, DTypeLike, Int, PRNGKeyArray

from .._iterate import unrolled
from .._problem import OptimistixSolver
from ..adjoints import AbstractAdjoint, ReversibleAdjoint
from ..nn import DEQ, TransformerCell
from ..solvers import FixedPointIteration, Reversible
from ._base import Predicted, Solve
from ._language import AbstractLanguageModel, Vocabulary

_FIXED_DEPTH = Reversible(beta=0.5, rtol=0.0, atol=0.0, fraction_bits=20)


class ReversibleTransformer(AbstractLanguageModel):
    """A language model with one equilibrium layer, whose cell is a transformer block.

        x = sqrt(width) table[tokens] + positions;    logits = head(LN(DEQ(x)))

    with the cell `nn.TransformerCell`.

    **Arguments:**

    - `size`: of the vocabulary.
    - `length`: that of the longest sequence, and the number of learned positions.
    - `width`, `heads`, `hidden`, `scale`: as in `nn.TransformerCell`.
    - `rotary`: rotate queries and keys by their positions, instead of adding a learned vector.
    - `tied`: whether the head is the transposed table.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`. The default takes four
        reversible pairs, that is eight steps, whatever the residual, with 20 fraction bits: a
        range of +-2,048 at a spacing of 1e-6.
    - `compute_dtype`: of products and attention, for instance `jnp.bfloat16`; default: `dtype`.
    - `dtype`: of the parameters and the state; default: JAX's default float.
    - `key`: for the initial parameters.

    **Call:** `logits, solves = model(tokens)` with integer tokens (B, L), L at most `length`.
    logits has shape (B, L, size), float32 or wider, position i for token i + 1; solves is
    `((x, sol),)`, and `model.deqs[0].batch(x)` repeats the solve. `model(tokens, steps=n)` takes a
    budget of n steps, which may be traced. `model.generate` continues a prompt.

    **Cost:** one batched solve; eight evaluations of the cell with the defaults, and one more if
    `sol.result` or the residual is used.

    **When not to use it:** if the state would leave the range: the cell adds to z without
    normalising it. `jnp.max(jnp.abs(sol.value))` shows this, and `sol.result` if it happened.

    **Raises:** `ValueError` for tokens that are not integers (B, L) with L at most `length`, and as
    `nn.CausalAttention`. A token outside the vocabulary gives NaN.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the language model.
    """

    vocabulary: Vocabulary
    deq: DEQ
    length: int = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        length: int,
        *,
        width: int = 256,
        heads: int = 4,
        hidden: tuple[int, ...] = (1024,),
        scale: float = 1.0,
        rotary: bool = False,
        tied: bool = False,
        solver: OptimistixSolver = _FIXED_DEPTH,
        adjoint: AbstractAdjoint = ReversibleAdjoint(),
        max_steps: int = 8,
        compute_dtype: DTypeLike | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        sizes, dtypes = (size, length, width, heads, hidden), (compute_dtype, dtype)
        self.vocabulary, (cell,) = _parts(1, sizes, rotary, scale, tied, dtypes, key)
        self.deq = DEQ(cell, solver, adjoint, max_steps=max_steps)
        self.length = length

    @classmethod
    def paper(
        cls,
        size: int = 50_304,
        *,
        solver: OptimistixSolver = _FIXED_DEPTH,
        compute_dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ) -> "ReversibleTransformer":
        """The paper's model: width 768, 12 heads, MLP 768-3072-3072-768, 448 positions, untied.

        It has 94.1 M parameters. The authors count 96.1 M: they project queries, keys and values a
        second time (1.8 M, which adds nothing, as the product of two matrices is a matrix), and
        count their causal mask."""
        options = {"width": 768, "heads": 12, "hidden": (3072, 3072)}
        return cls(size, 448, solver=solver, compute_dtype=compute_dtype, key=key, **options)

    @property
    def deqs(self) -> tuple[DEQ, ...]:
        """The equilibrium layer."""
        return (self.deq,)

    def __call__(
        self, tokens: Int[Array, "b l"], *, steps: int | Int[Array, "..."] | None = None
    ) -> Predicted:
        """Logits of each next token of a batch of sequences."""
        _check_tokens(tokens, self.length)
        x = self.vocabulary.embed(tokens)
        z, sol = self.deq.batch(x, steps=steps)
        return Predicted(self.vocabulary.logits(z), (Solve(x, sol),))

    def caches(self, length: int):
        """One cache per evaluation of the cell."""
        dtype = self.vocabulary.table.dtype
        cell: Any = paramax.unwrap(self.deq.cell)
        one = lambda _: cell.cache(length, dtype)
        return jax.vmap(one)(jnp.arange(self.deq.max_steps))

    def extend(self, tokens, caches, start):
        solver: Any = paramax.unwrap(self.deq.solver)
        zero = lambda tolerance: isinstance(tolerance, int | float) and tolerance == 0
        if not isinstance(solver, Reversible | FixedPointIteration) or not (
            zero(solver.rtol) and zero(solver.atol)
        ):
            raise ValueError(
                f"generate expects a fixed number of steps of Reversible or FixedPointIteration, "
                f"rtol=0 and atol=0, got {solver}; otherwise later positions change earlier ones: "
                f"evaluate the model on the whole sequence for each token."
            )
        if self.deq.predictor is not None:
            raise ValueError(
                "generate expects a layer that starts from zero, got one with a predictor; "
                "evaluate the model on the whole sequence for each token."
            )
        cell: Any = paramax.unwrap(self.deq.cell)
        x = self.vocabulary.embed(tokens, start)
        fn = lambda z, cache: cell.extend(z, x, cache, start)
        z, caches, bad = unrolled(fn, solver, jnp.zeros_like(x), caches)
        return jnp.where(bad, jnp.nan, z), caches


class Transformer(AbstractLanguageModel):
    """The explicit counterpart: the same blocks, each with its own parameters, evaluated once.

        h[0] = x;    h[i+1] = block[i](h[i], 0);    logits = head(LN(h[n]))

    With one block it has as many parameters as `ReversibleTransformer`; with `max_steps` blocks it
    makes as many evaluations.

    **Arguments:** those of `ReversibleTransformer`, except for the solve, and

    - `blocks`: the number of blocks.
    - `checkpoint`: whether the backward pass evaluates each block again instead of storing it.

    **Call:** as `ReversibleTransformer`; solves is empty.

    **Cost:** `blocks` evaluations; memory in proportion to them.

    **When not to use it:** if memory is short: `ReversibleTransformer` takes that of one block.

    **Raises:** as `ReversibleTransformer`, and for `blocks` below 1.

    Reference: Radford et al., Language models are unsupervised multitask learners, 2019.
    """

    vocabulary: Vocabulary
    blocks: tuple[TransformerCell, ...]
    length: int = eqx.field(static=True)
    checkpoint: bool = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        length: int,
        *,
        blocks: int = 1,
        width: int = 256,
        heads: int = 4,
        hidden: tuple[int, ...] = (1024,),
        scale: float = 1.0,
        rotary: bool = False,
        tied: bool = False,
        checkpoint: bool = False,
        compute_dtype: DTypeLike | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        if blocks < 1:
            raise ValueError(f"Transformer expects at least one block, got {blocks}; pass 1.")
        sizes, dtypes = (size, length, width, heads, hidden), (compute_dtype, dtype)
        self.vocabulary, self.blocks = _parts(blocks, sizes, rotary, scale, tied, dtypes, key)
        self.length = length
        self.checkpoint = checkpoint

    @property
    def deqs(self) -> tuple[()]:
        """There is no equilibrium layer."""
        return ()

    def __call__(self, tokens: Int[Array, "b l"]) -> Predicted:
        """Logits of each next token of a batch of sequences."""
        _check_tokens(tokens, self.length)
        h = self.vocabulary.embed(tokens)
        for block in self.blocks:
            apply = lambda block, h: jax.vmap(block)(h, jnp.zeros_like(h))
            h = (jax.checkpoint(apply) if self.checkpoint else apply)(block, h)
        return Predicted(self.vocabulary.logits(h), ())

    def caches(self, length: int):
        """One cache per block."""
        return [block.cache(length, self.vocabulary.table.dtype) for block in self.blocks]

    def extend(self, tokens, caches, start):
        h = self.vocabulary.embed(tokens, start)
        extended = []
        for block, cache in zip(self.blocks, caches, strict=True):
            h, cache = block.extend(h, jnp.zeros_like(h), cache, start)
            extended.append(cache)
        return h, extended


def _parts(
    blocks: int, sizes: tuple, rotary: bool, scale: float, tied: bool, dtypes: tuple, key
) -> tuple[Vocabulary, tuple[TransformerCell, ...]]:
    size, length, width, heads, hidden = sizes
    options: dict[str, Any] = dict(zip(("compute_dtype", "dtype"), dtypes, strict=True))
    ends_key, *keys = jax.random.split(key, blocks + 1)
    learned = None if rotary else length
    ends = Vocabulary(size, width, learned, tied=tied, key=ends_key, **options)
    options |= {"rotary": rotary, "scale": scale}
    return ends, tuple(TransformerCell(width, heads, hidden, key=k, **options) for k in keys)


def _check_tokens(tokens: Int[Array, "b l"], length: int) -> None:
    integers = jnp.issubdtype(tokens.dtype, jnp.integer)
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= length or not integers:
        raise ValueError(
            f"The model expects integer tokens of shape (batch, at most {length}), at least one "
            f"token, got {tokens.shape} of {tokens.dtype}; add the batch axis, cut the sequences, "
            f"or build the model for this length."
        )

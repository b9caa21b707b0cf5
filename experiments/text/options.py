"""All options of `language_modelling.py`."""

import dataclasses
from typing import Annotated, Literal

from training.flags import Beta, Count, Nonnegative, Only, Positive, Range, Whole
from training.options import Session, Training

Name = Literal["pydoc", "tiny_shakespeare", "wikitext-2", "wikitext-103", "text"]
Kind = Literal["bytes", "bpe", "words"]
Model = Literal["reversible", "explicit", "explicit-deep"]
SOLVED = Only("model", ("reversible",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSession(Session):
    """Options of language models that leave what is computed as it is."""

    cache_dir: str | None = None
    """Folder of tokenised text; None: the user's cache."""
    sample: Whole = 300
    """Tokens of text to generate at the end, as far as a window is long; 0: none."""
    temperature: Nonnegative = 0.8
    """The logits of that text are divided by it; 0: the likeliest token each time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextSession, Training):
    """Trains language models on text. Options left at None: the preset's."""

    corpus: Name = "pydoc"
    """pydoc: the language reference that comes with Python; text: a folder of text files."""
    preset: Literal["paper"] | None = None
    """paper: the network of the RevDEQ paper; None: one for minutes on two cores."""
    model: Model | None = None
    """reversible: a RevDEQ; explicit: its block, evaluated once; explicit-deep: as many blocks,
    each with parameters of its own, as the RevDEQ takes steps. None: the first two."""
    tokenizer: Kind | None = None
    """bytes; bpe: pieces of words, learned from the training text; words: WikiText's own."""
    vocabulary: Annotated[int | None, Range(257, 2**31 - 1), Only("tokenizer", ("bpe",))] = None
    """Tokens of bpe, the 256 bytes among them."""

    width: Count | None = None
    """Width of the residual sum."""
    heads: Count | None = None
    """Heads of the attention."""
    hidden: tuple[Count, ...] | None = None
    """Widths of the MLP's inner layers."""
    rotary: bool | None = None
    """Turns queries and keys by their positions, instead of adding a learned vector for each."""
    tied: bool | None = None
    """One table for both ends of the model."""
    length: Count | None = None
    """Tokens of a window."""
    max_steps: Annotated[Count | None, Only("model", ("reversible", "explicit-deep"))] = None
    """Steps of the solve of reversible, one evaluation of the block each; blocks of
    explicit-deep."""
    beta: Annotated[Beta, SOLVED] = 0.5
    """Relaxation of reversible, the paper's; 1 - beta is 1/d or -1/d, d an integer."""
    retention: Annotated[Literal["fixed", "learned"], SOLVED] = "fixed"
    """learned: beta is one number per channel, from --beta on, by a sigmoid."""
    last: Annotated[Count | None, SOLVED] = None
    """Evaluations, the last ones, that the gradient of reversible goes through; None: all."""
    random_depth: Annotated[bool, SOLVED] = False
    """Draws the steps of reversible anew in each training step, from half of them to one and a half
    times as many."""
    fraction_bits: Annotated[int, Range(8, 30), SOLVED, Only("exact", (True,))] = 20
    """Bits of the exact state behind the point: its range is 2^(31 - bits), 2,048; state_peak in
    the metrics says how much is used."""
    exact: Annotated[bool, SOLVED] = True
    """Keeps the state of reversible as integers, undone bit for bit; else in floating point."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of products and attention; parameters and the residual sum stay float32."""

    epochs: Positive | None = None
    """Passes over the training split."""
    steps: Count | None = None
    """Steps to take instead of epochs."""
    batch_size: Count | None = None
    """Windows per step, over all devices."""
    warmup: Whole = 100
    """Steps from a rate of 0 to its peak, at most a tenth of all; then a cosine down to a tenth."""
    epsilon: Positive = 1e-8
    """AdamW's, added to the root of the mean square gradient."""

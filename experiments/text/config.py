"""All options of `language_modelling.py`, and the presets that fill in what is left out."""

import dataclasses
from typing import Annotated, Any, Literal

from training.flags import (
    Count,
    Nonnegative,
    Only,
    Positive,
    Range,
    Seed,
    Whole,
    check,
    check_read,
    without_unread,
)
from training.options import Session, check_names, filled

Name = Literal["pydoc", "tiny_shakespeare", "wikitext-2", "wikitext-103", "text"]
Kind = Literal["bytes", "bpe", "words"]
Model = Literal["reversible", "explicit", "explicit-deep"]
MODELS: tuple[Model, ...] = ("reversible", "explicit", "explicit-deep")
SOLVED = Only("model", ("reversible",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSession(Session):
    """Likewise, of language models."""

    cache_dir: str | None = None
    """Of tokenised text; None: the user's cache."""
    sample: Whole = 300
    """Tokens of text to generate at the end, as far as a window is long; 0: none."""
    temperature: Nonnegative = 0.8
    """The logits of that text are divided by it; 0: the likeliest token each time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TextSession):
    """Train language models on text. What is left at None: the preset's."""

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
    """Of the residual sum."""
    heads: Count | None = None
    """Of the attention."""
    hidden: tuple[Count, ...] | None = None
    """Widths of the MLP's inner layers."""
    rotary: bool | None = None
    """Turn queries and keys by their positions, instead of adding a learned vector for each."""
    tied: bool | None = None
    """One table for both ends of the model."""
    length: Count | None = None
    """Tokens of a window."""
    max_steps: Annotated[Count | None, Only("model", ("reversible", "explicit-deep"))] = None
    """Of reversible, steps of the solve, one evaluation of the block each; of explicit-deep,
    blocks."""
    beta: Annotated[float, Range(0, 2, but=(0, 1, 2)), SOLVED] = 0.5
    """Relaxation of reversible, the paper's; 1 - beta is 1/d or -1/d, d an integer."""
    fraction_bits: Annotated[int, Range(8, 30), SOLVED, Only("exact", (True,))] = 20
    """Of the exact state: its range is 2^(31 - bits), 2,048; state_peak in the metrics is what it
    comes to."""
    exact: Annotated[bool, SOLVED] = True
    """Of reversible: keep the state as integers, undone bit for bit; else in floating point."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of products and attention; parameters and the residual sum stay float32."""

    seed: Seed = 0
    """Of parameters and the order of the data."""
    epochs: Positive | None = None
    """Passes over the training split."""
    steps: Count | None = None
    """Instead of epochs."""
    batch_size: Count | None = None
    """Windows a step, over all devices."""
    accumulate: Count = 1
    """Parts in which a batch is taken, one after another, for the memory of one."""
    learning_rate: Positive | None = None
    """Peak of AdamW's, reached after the warm-up, from where a cosine leads down to a tenth."""
    warmup: Whole = 100
    """Steps from a rate of 0 to the peak, at most a tenth of all."""
    weight_decay: Nonnegative | None = None
    """AdamW's: a step shrinks matrices by learning rate x this."""
    epsilon: Positive = 1e-8
    """AdamW's, added to the root of the mean square gradient."""
    clip: Positive = 1.0
    """Ceiling on the gradient's norm."""
    smoke: bool = False
    """A tiny network, text and number of steps: everything is run through, nothing learned."""


# For two cores, an hour of them at most.
DEFAULTS: dict[str, Any] = dict(
    tokenizer="bytes", vocabulary=4096, width=192, heads=4, hidden=(768,), rotary=True,
    tied=False, length=128, max_steps=6, batch_size=16, learning_rate=2e-3, weight_decay=0.1,
)  # fmt: skip
CORPORA: dict[str, dict[str, Any]] = {
    "pydoc": dict(width=128, hidden=(512,), epochs=4),
    "tiny_shakespeare": dict(epochs=3),
    "wikitext-2": dict(tokenizer="words", tied=True, epochs=1),
    "wikitext-103": dict(tokenizer="words", tied=True, epochs=1),
    "text": dict(tokenizer="bpe", vocabulary=16_384, tied=True, epochs=1),
}
# The paper's network and rate (arXiv 2509.12917; its schedule, on a plateau, is not kept).
PAPER: dict[str, Any] = dict(
    width=768, heads=12, hidden=(3072, 3072), rotary=False, tied=False, length=448,
    max_steps=8, batch_size=32, learning_rate=3e-4, weight_decay=1e-2, epochs=10,
)  # fmt: skip
SMOKE: dict[str, Any] = dict(
    vocabulary=300, width=16, heads=2, hidden=(32,), length=16, max_steps=2, batch_size=8,
    epochs=None, steps=12,
)  # fmt: skip


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with everything filled in; what does not fit is refused."""
    models = MODELS[:2] if config.model is None else [config.model]
    each = [without_unread(dataclasses.replace(config, model=model)) for model in models]
    runs = [_resolve(run, alone=len(each) == 1) for run in each]
    check_read(config, runs)
    check_names(runs)
    return runs


def _resolve(config: Config, alone: bool) -> Config:
    values = DEFAULTS | CORPORA[config.corpus]
    if config.preset == "paper":
        values |= PAPER
    if config.smoke:
        config = dataclasses.replace(config, sample=min(config.sample, 8), log_every=2)
        values |= SMOKE
    if config.steps is not None or config.epochs is not None:
        values |= {"epochs": config.epochs, "steps": config.steps}
    preset = "" if config.preset is None else f"-{config.preset}"
    default = f"{config.corpus}{preset}-{config.model}-{config.seed}"
    default += "-smoke" if config.smoke else ""
    name = default if config.name is None else config.name
    if config.name is not None and not alone:  # one prefix for two folders
        name = f"{config.name}-{default}"
    config = filled(dataclasses.replace(config, name=name), values)
    check(config)
    if (config.epochs is None) == (config.steps is None):
        raise SystemExit(
            f"Expected either --epochs or --steps, got {config.epochs} and {config.steps}. Leave "
            f"one of them out."
        )
    return config


def title(config: Config) -> str:
    match config.model:
        case "reversible":
            return f"RevDEQ, {config.max_steps} steps"
        case "explicit":
            return "explicit, 1 block"
        case _:
            return f"explicit, {config.max_steps} blocks"

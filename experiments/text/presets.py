"""The configurations that `language_modelling.py` has by name, each of them complete."""

from dataclasses import replace

from text.options import Config, Name

# For two cores, an hour of them at most.
_SMALL = Config(
    tokenizer="bytes", vocabulary=4096, width=192, heads=4, hidden=(768,), rotary=True, tied=False,
    length=128, max_steps=6, batch_size=16, learning_rate=2e-3, weight_decay=0.1,
)  # fmt: skip
_WORDS = replace(_SMALL, tokenizer="words", tied=True, epochs=1)
CORPORA: dict[Name, Config] = {
    "pydoc": replace(_SMALL, corpus="pydoc", width=128, hidden=(512,), epochs=4),
    "tiny_shakespeare": replace(_SMALL, corpus="tiny_shakespeare", epochs=3),
    "wikitext-2": replace(_WORDS, corpus="wikitext-2"),
    "wikitext-103": replace(_WORDS, corpus="wikitext-103"),
    "text": replace(_SMALL, corpus="text", tokenizer="bpe", vocabulary=16_384, tied=True, epochs=1),
}
# The paper's network and rate (arXiv 2509.12917; its schedule, on a plateau, is not kept).
PAPER: dict[Name, Config] = {
    name: replace(
        config, preset="paper", width=768, heads=12, hidden=(3072, 3072), rotary=False, tied=False,
        length=448, max_steps=8, batch_size=32, learning_rate=3e-4, weight_decay=1e-2, epochs=10,
    )
    for name, config in CORPORA.items()
}  # fmt: skip


def smallest(config: Config) -> Config:
    """The configuration of a smoke run."""
    return replace(
        config, vocabulary=300, width=16, heads=2, hidden=(32,), length=16, max_steps=2,
        batch_size=8, epochs=None, steps=12,
    )  # fmt: skip

"""Text for language models: two splits of ids, and how they are cut into windows.

Training takes windows at random, a batch being a function of seed and step. A validation figure
counts every token but the first once (`windows`). Per word it is exp of the summed loss over
`valid_words`, which no choice of tokens changes, so that it can be compared between tokenizers.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from text.sources import Lines, Source, digests_of, source
from text.tokenizers import Kind, Tokenizer, restore, train


class Corpus(NamedTuple):
    """Ids of a training and a validation split, (n,) each, memory-mapped from the cache.

    `valid_words` counts what stands between white space; for WikiText, as published, an <eos> for
    every line too, whatever the tokenizer.
    """

    name: str
    tokenizer: Tokenizer
    train: np.ndarray
    valid: np.ndarray
    valid_words: int
    about: str
    digest: str = ""  # of the ids: what a run has to find again when it is resumed

    def steps_per_epoch(self, size: int, length: int) -> int:
        """Whole batches of the windows that there are whatever the epoch's offset."""
        steps = (len(self.train) // length - 1) // size
        if steps < 1:
            raise SystemExit(
                f"Expected at least {(size + 1) * length:,} training ids of {self.name}, which is "
                f"a batch of {size} windows of {length} after a random offset; got "
                f"{len(self.train):,}. Choose a smaller batch, shorter windows or more text."
            )
        return steps

    def batch(self, step: int, size: int, length: int, seed: int) -> np.ndarray:
        """Inputs [:, :-1] and targets [:, 1:], (size, length + 1) int32, of seed and step alone.

        An epoch has an offset below `length` and takes the windows from there on in random order.
        """
        epoch, i = divmod(step, self.steps_per_epoch(size, length))
        starts = _order(len(self.train), length, seed, epoch)[i * size : (i + 1) * size]
        return np.asarray(self.train)[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def windows(ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows (n, length + 1) int32 and a mask (n, length) of the targets that count.

    Every id but the first is the target of one place: a window starts with the last target of the
    one before. The last is filled up with id 0, which the mask leaves out.
    """
    n = -(-(len(ids) - 1) // length)
    padded = np.zeros(n * length + 1, np.int32)
    padded[: len(ids)] = ids
    at = np.arange(n)[:, None] * length + np.arange(length + 1)
    return padded[at], at[:, 1:] < len(ids)


@lru_cache(maxsize=1)
def _order(n: int, length: int, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(length)
    return offset + length * rng.permutation((n - 1 - offset) // length)


def load(
    name: str,
    *,
    tokenizer: Kind,
    vocabulary: int = 4096,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    download: bool = False,
    limit: int | None = None,
) -> Corpus:
    """Reads a corpus; `limit` keeps the first so many characters of each split (smoke runs).

    The tokenizer is trained on the training split alone; `vocabulary` is that of bpe.
    """
    if tokenizer == "words" and not name.startswith("wikitext"):
        raise SystemExit(
            f"Expected --tokenizer bytes or bpe for {name}, got words: only WikiText is published "
            "as words, with a vocabulary. Choose one of the two."
        )
    if tokenizer == "bpe" and vocabulary <= 256:
        raise SystemExit(
            f"Expected a vocabulary above the 256 bytes for bpe, got {vocabulary}. Pass a larger "
            "--vocabulary, or --tokenizer bytes."
        )
    found = source(name, data_dir, download)
    settings = {
        "format": 1,  # of the cache: to be raised with any change of what an id means
        "corpus": name,
        "tokenizer": tokenizer,
        "vocabulary": vocabulary if tokenizer == "bpe" else None,
        "tokenizers": tokenizers.__version__ if tokenizer == "bpe" else None,
        "limit": limit,
        "digests": found.digests,
    }
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(cache_dir) if cache_dir else Path(home) / "deqjax" / "text"
    folder = cache / f"{name}-{tokenizer}-{digest}"
    corpus = _read(folder, settings, found.about)
    if corpus is None:
        corpus = _build(settings, found)
        try:
            _write(folder, settings, corpus)
        except OSError as error:
            print(f"Not cached, so that it is kept in memory and made anew each time: {error}.")
        else:
            corpus = _read(folder, settings, found.about) or corpus
    ids = hashlib.sha256(corpus.train.data)
    ids.update(corpus.valid.data)
    return corpus._replace(digest=ids.hexdigest()[:16])


def _build(settings: dict[str, Any], found: Source) -> Corpus:
    name, kind, limit = settings["corpus"], settings["tokenizer"], settings["limit"]
    training, validation = (_first(split, limit) for split in (found.train, found.valid))
    tokenizer = train(kind, training(), settings["vocabulary"])
    train_ids, valid_ids = (tokenizer.encode_lines(split()) for split in (training, validation))
    ends = name.startswith("wikitext")
    words = sum(len(line.split()) + ends * line.count("\n") for line in validation())
    if len(train_ids) < 2 or len(valid_ids) < 2 or words < 1:
        raise SystemExit(
            f"Expected text in both splits of {name} ({found.about}); got {len(train_ids):,} "
            f"training ids and {len(valid_ids):,} for validation. Add text, or lines to cut it at."
        )
    return Corpus(name, tokenizer, train_ids, valid_ids, words, found.about)


def _first(lines: Lines, limit: int | None) -> Lines:
    if limit is None:
        return lines

    def first() -> Iterator[str]:
        left = limit
        for line in lines():
            yield line[:left]
            left -= len(line)
            if left <= 0:
                return

    return first


FILES = ("train.npy", "valid.npy", "tokenizer.json")


def _read(folder: Path, settings: dict[str, Any], about: str) -> Corpus | None:
    """The corpus in the cache, if every byte of it is as it was written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        found = digests_of(folder, [folder / file for file in FILES])
        if (meta["settings"], meta["digests"]) != (settings, found):
            return None
        words = int(meta["valid_words"])
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        train_ids = np.load(folder / "train.npy", mmap_mode="r")
        valid_ids = np.load(folder / "valid.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is built again, whatever is wrong with it
    tokenizer = restore(settings["tokenizer"], text)
    return Corpus(settings["corpus"], tokenizer, train_ids, valid_ids, words, about)


def _write(folder: Path, settings: dict[str, Any], corpus: Corpus) -> None:
    """Writes beside its place and renames, so that a folder of this name is always whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        np.save(made / "train.npy", corpus.train)
        np.save(made / "valid.npy", corpus.valid)
        (made / "tokenizer.json").write_text(corpus.tokenizer.to_json(), encoding="utf-8")
        meta = {
            "settings": settings,
            "valid_words": corpus.valid_words,
            "digests": digests_of(made, [made / file for file in FILES]),
        }
        (made / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():  # damaged, or another process was as quick
            shutil.move(folder, Path(beside) / "old")
        made.rename(folder)

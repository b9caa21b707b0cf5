"""Text to ids and back: bytes, byte-level BPE, and the words of a corpus that has its own.

All of them read text line by line, a line with the line feed that ends it, so that the ids of a
text are those of its lines one after another, whatever the size of the chunks it is read in.
"""

import abc
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import final

import numpy as np
from tqdm import tqdm

from text.options import Kind
from training.missing import not_installed

try:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
except ImportError as missing:
    raise not_installed(missing) from None


class Tokenizer(abc.ABC):
    """Text to ids and back: `decode(encode(text)) == text`, for words as far as they can.

    `name` is what a table calls it: a perplexity per token means nothing without it. Ids are 0 to
    `size` - 1.
    """

    name: str
    size: int

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids that are no valid UTF-8, as a model may sample them, give U+FFFD."""

    @abc.abstractmethod
    def to_json(self) -> str:
        """All that `restore` needs."""

    @abc.abstractmethod
    def _encode(self, lines: list[str]) -> np.ndarray: ...

    @property
    def dtype(self) -> np.dtype:
        """The smallest that holds every id."""
        small = (np.uint8, np.uint16, np.int32)
        return np.dtype(next(d for d in small if self.size - 1 <= np.iinfo(d).max))

    def encode(self, text: str) -> np.ndarray:
        # StringIO's default newline keeps every character, and ends lines at "\n" only.
        return self.encode_lines(io.StringIO(text))

    def encode_lines(self, lines: Iterable[str]) -> np.ndarray:
        """A chunk at a time: as Python objects the ids of a large text would take gigabytes."""
        chunks = [self._encode(chunk).astype(self.dtype) for chunk in _chunks(lines, "encoding")]
        return np.concatenate([np.zeros(0, self.dtype), *chunks])


@final
class Bytes(Tokenizer):
    """The bytes of UTF-8."""

    name, size = "bytes", 256

    def _encode(self, lines: list[str]) -> np.ndarray:
        return np.frombuffer("".join(lines).encode(), np.uint8)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return np.asarray(ids).astype(np.uint8).tobytes().decode(errors="replace")

    def to_json(self) -> str:
        return "null"


@final
class BPE(Tokenizer):
    """Byte pairs, merged within the words of GPT-2's pattern."""

    def __init__(self, pairs: tokenizers.Tokenizer):
        self._pairs, self.size = pairs, pairs.get_vocab_size()
        self.name = f"BPE of {self.size:,}"

    @classmethod
    def train(cls, lines: Iterable[str], vocabulary: int) -> "BPE":
        """Learns so many ids, the 256 bytes among them; fewer where the text has no more pairs."""
        pairs = tokenizers.Tokenizer(models.BPE())
        # No space is put in front, and no id is special: every text is given back as it was.
        pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pairs.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False
        )
        pairs.train_from_iterator(_chunks(lines, "counting pairs"), trainer)
        return cls(pairs)

    def _encode(self, lines: list[str]) -> np.ndarray:
        encoded = self._pairs.encode_batch_fast(lines, add_special_tokens=False)
        return np.concatenate([np.asarray(line.ids, np.int32) for line in encoded])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._pairs.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._pairs.to_str()


@final
class Words(Tokenizer):
    """Words between white space, and <eos> for the line feed: WikiText's own tokens.

    Decoded, each line has one space before every word and before its end, as WikiText has it.
    """

    def __init__(self, words: list[str]):
        self._words, self.size = words, len(words)
        self._ids = {word: i for i, word in enumerate(words)}
        self.name = f"{self.size:,} words"

    @classmethod
    def train(cls, lines: Iterable[str]) -> "Words":
        """Every word of the text, the most frequent first; of equals, the one seen first."""
        counts = Counter()
        for chunk in _chunks(lines, "counting words"):
            counts.update(_words(chunk))
        return cls([word for word, _ in counts.most_common()])

    def _encode(self, lines: list[str]) -> np.ndarray:
        words, unknown = _words(lines), self._ids.get("<unk>")
        ids = [unknown if i is None else i for i in map(self._ids.get, words)]
        if None in ids:
            word = words[ids.index(None)]
            raise SystemExit(
                f"Expected words of the training text, which has no <unk> for others; got {word!r}."
                " Choose --tokenizer bpe or bytes, which read any text."
            )
        return np.array(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        words = (self._words[i] for i in np.asarray(ids).tolist())
        return "".join(" \n" if word == "<eos>" else f" {word}" for word in words)

    def to_json(self) -> str:
        return json.dumps(self._words, ensure_ascii=False)


def train(kind: Kind, lines: Iterable[str], vocabulary: int) -> Tokenizer:
    """A tokenizer of this text; `vocabulary` is that of BPE alone."""
    if kind == "bytes":
        return Bytes()
    return BPE.train(lines, vocabulary) if kind == "bpe" else Words.train(lines)


def restore(kind: Kind, text: str) -> Tokenizer:
    """The tokenizer from which `to_json` made this text."""
    if kind == "bytes":
        return Bytes()
    if kind == "bpe":
        return BPE(tokenizers.Tokenizer.from_str(text))
    return Words(json.loads(text))


def _words(lines: list[str]) -> list[str]:
    return " ".join(lines).replace("\n", " <eos> ").split()


def _chunks(lines: Iterable[str], doing: str) -> Iterator[list[str]]:
    """Lists of lines of about a million characters; work of more than two seconds shows a bar."""
    chunk, length = [], 0
    with tqdm(desc=doing, unit="char", unit_scale=True, delay=2, mininterval=1, leave=False) as bar:
        for line in lines:
            chunk.append(line)
            length += len(line)
            if length >= 2**20:
                bar.update(length)
                yield chunk
                chunk, length = [], 0
        if chunk:
            yield chunk

"""Sources of text: the lines of a training and a validation split, read as often as needed.

Nothing is held here but small texts: a large one is read a line at a time. Lines end at "\\n" alone
and keep it, so that "".join(lines) is the text of the files, byte for byte.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import platform
import re
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, get_args

from text.options import Name
from training.files import digest
from training.tfds import records

Lines = Callable[[], Iterator[str]]

OPEN: dict[str, Callable[..., Any]] = {"": open, ".xz": lzma.open, ".gz": gzip.open}
OPEN[".bz2"] = bz2.open
if sys.version_info >= (3, 14):
    from compression import zstd

    OPEN[".zst"] = zstd.open

HELD_OUT = 0.05  # of the last training file, where no file says that it is for validation


class Source(NamedTuple):
    """Two disjoint splits, what they are in words, and what they are in digests."""

    train: Lines
    valid: Lines
    about: str
    digests: dict[str, str]


def source(name: str, data_dir: str | None, download: bool) -> Source:
    match name:
        case "pydoc":
            return _pydoc()
        case "tiny_shakespeare":
            return _tiny_shakespeare(data_dir, download)
        case "wikitext-2" | "wikitext-103":
            return _wikitext(name, data_dir)
        case "text":
            return _folder(data_dir)
    raise SystemExit(
        f"Expected one of the corpora {', '.join(get_args(Name))}; got {name!r}. Choose another "
        "--corpus."
    )


def _pydoc() -> Source:
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    cut = text.index("\n\n", len(text) * 9 // 10) + 2
    return _held(
        {"train": text[:cut], "validation": text[cut:]},
        # Figures compare within one version of the text only, so the version is named.
        f"pydoc_data.topics of CPython {platform.python_version()} (its text differs from version "
        "to version); validation: the last tenth, from a paragraph on",
    )


def _tiny_shakespeare(data_dir: str | None, download: bool) -> Source:
    texts = {}
    for split in ("train", "validation"):
        where: Any = {"data_dir": data_dir, "download": download, "instead": "--corpus pydoc"}
        (record,) = records("tiny_shakespeare", split, **where)
        texts[split] = record["text"].decode()
    return _held(texts, "the splits of TensorFlow Datasets")


def _held(texts: dict[str, str], about: str) -> Source:
    train, valid = (lambda text=text: iter(io.StringIO(text)) for text in texts.values())
    digests = {k: hashlib.sha256(text.encode()).hexdigest() for k, text in texts.items()}
    return Source(train, valid, about, digests)


def _wikitext(name: str, data_dir: str | None) -> Source:
    folder = _existing(data_dir, name, "wiki.train.tokens and wiki.valid.tokens, plain or .xz")
    files = []
    for split in ("train", "valid"):
        plain = folder / f"wiki.{split}.tokens"
        found = [p for suffix in OPEN if (p := Path(f"{plain}{suffix}")).is_file()]
        if not found:
            raise SystemExit(
                f"Expected {plain}, plain or ending in {_suffixes()}; there is none. Point "
                f"--data-dir at the folder of the token files of {name}."
            )
        files.append(found[0])
    train, valid = (lambda file=file: _lines([file]) for file in files)
    about = " and ".join(file.name for file in files)
    return Source(train, valid, about, digests_of(folder, files))


def _folder(data_dir: str | None) -> Source:
    """All .txt of a folder and those below it, plain or compressed, in the order of their paths.

    One with the word valid, validation or test in its name is of that split, and the rest are for
    training. Where one file is there both plain and compressed, it is read once.
    """
    folder = _existing(data_dir, "text", ".txt files, plain or compressed")
    found: dict[Path, Path] = {}
    for file in sorted(path for path in folder.rglob("*.txt*") if path.is_file()):
        if file.suffix in (".zst", ".zip", ".lzma", ".7z") and file.suffix not in OPEN:
            raise SystemExit(
                f"Expected text that is plain or ends in {_suffixes()}; got {file}, which this "
                "version of Python does not read. Compress it another way, or take it out."
            )
        if file.suffix == ".txt":
            found.setdefault(file, file)
        elif file.suffix in OPEN and file.with_suffix("").suffix == ".txt":
            found.setdefault(file.with_suffix(""), file)
    splits: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for plain, file in found.items():
        words = re.findall("[a-z]+", plain.stem.lower())
        held = {"valid": "valid", "validation": "valid", "test": "test"}
        splits[next((held[word] for word in words if word in held), "train")].append(file)
    train, valid = splits["train"], splits["valid"]
    if not train:
        raise SystemExit(
            f"Expected .txt files to train on under {folder}, plain or ending in {_suffixes()}, "
            f"without valid or test in their names; there are none, and {len(found)} others. Point "
            "--data-dir at a folder that has some."
        )
    digests = digests_of(folder, train + valid)
    number = f"{len(train)} training file{'s' if len(train) > 1 else ''}"
    if valid:
        names = ", ".join(file.name for file in valid)
        about = f"{number}; validation: {names}"
        return Source(lambda: _lines(train), lambda: _lines(valid), about, digests)

    def training() -> Iterator[str]:
        yield from _lines(train[:-1])
        yield from islice(_lines(train[-1:]), _cut(train[-1]))

    validation = lambda: islice(_lines(train[-1:]), _cut(train[-1]), None)
    share = f"the last {HELD_OUT:.0%} of {train[-1].name}, held out"
    return Source(training, validation, f"{number}; validation: {share}", digests)


def _cut(file: Path) -> int:
    """The number of lines in front of the first that starts in the share that is held out."""
    starts = [0, *accumulate(len(line.encode()) for line in _lines([file]))]
    return next(i for i, start in enumerate(starts) if start >= (1 - HELD_OUT) * starts[-1])


def _lines(files: list[Path]) -> Iterator[str]:
    """The lines of all files; one that does not end its last line gets a line feed there."""
    for file in files:
        opened = OPEN.get(file.suffix, open)
        line = "\n"
        try:
            with opened(file, "rt", encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    yield line
        except Exception as error:  # each compression has an exception of its own
            raise SystemExit(
                f"Expected {file} to be text in UTF-8, whole and readable; got "
                f"{type(error).__name__}: {error}. Repair it, or take it out of the folder."
            ) from None
        if not line.endswith("\n"):
            yield "\n"


def digests_of(folder: Path, files: list[Path]) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def _existing(data_dir: str | None, name: str, what: str) -> Path:
    if data_dir is None or not Path(data_dir).is_dir():
        raise SystemExit(
            f"Expected --data-dir with the folder of {name}, which holds {what}; got {data_dir}. "
            "Pass one that exists; --corpus pydoc needs none."
        )
    return Path(data_dir)


def _suffixes() -> str:
    return ", ".join(suffix for suffix in OPEN if suffix)

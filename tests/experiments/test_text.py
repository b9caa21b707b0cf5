"""Corpora, tokenizers, windows and the cache of `experiments/language_modelling.py`."""

import bz2
import gzip
import json
import lzma
import os
import platform
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from text import corpus as _text
from text.corpus import Corpus, load, windows
from text.tokenizers import BPE, Bytes, Words, restore

seeded = settings(deadline=None, derandomize=True)
LINES = [f"{i} squared is {i * i}, café – \U0001f40d\n" for i in range(200)]
WIKITEXT = " \n = A title = \n \n The <unk> sat @-@ on a mat . \n The <unk> again , \n"
PUBLISHED = Path(os.environ.get("TFDS_DATA_DIR", "")).parent / "wikitext-2"


@pytest.fixture(scope="module")
def bpe():
    return BPE.train(LINES, 300)


@pytest.fixture
def read(tmp_path):
    """`load` with a cache and a data folder of its own."""

    def read(name="text", tokenizer="bytes", **options):
        folders = {"cache_dir": str(tmp_path / "cache"), "data_dir": str(tmp_path / "data")}
        return load(name, tokenizer=tokenizer, **folders | options)

    return read


def write(folder, **files):
    """Text files, the bytes as they are; a name has __ for its points."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("__", ".")).write_bytes(data)


def same(a: Corpus, b: Corpus):
    np.testing.assert_array_equal(a.train, b.train)
    np.testing.assert_array_equal(a.valid, b.valid)
    assert (a.valid_words, a.tokenizer.to_json()) == (b.valid_words, b.tokenizer.to_json())


# --- tokenizers


@seeded
@given(st.text(), st.text())
@example(
    "a\r\nb\rc\x00\x0b\x1c\x85\u2028\ufeff \n\n  <|endoftext|> ", "\U0001f468‍\U0001f469 e\u0301"
)
def test_any_text_comes_back_and_lines_are_encoded_by_themselves(bpe, first, second):
    for tokenizer in (Bytes(), bpe):
        text = first + "\n" + second
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        parts = [tokenizer.encode(first + "\n"), tokenizer.encode(second)]
        np.testing.assert_array_equal(ids, np.concatenate(parts))
        assert ids.dtype == tokenizer.dtype and np.all(ids < tokenizer.size)
    assert (Bytes().name, bpe.name) == ("bytes", "BPE of 300")
    assert (Bytes().dtype, bpe.dtype) == (np.uint8, np.uint16)


def test_bpe_is_the_same_twice_and_shortens(bpe):
    again = BPE.train(iter(LINES), 300)
    assert again.to_json() == bpe.to_json()
    text = "".join(LINES)
    ids = bpe.encode(text)
    np.testing.assert_array_equal(restore("bpe", again.to_json()).encode(text), ids)
    assert len(ids) < 0.7 * len(text.encode())


def test_chunks_do_not_show(bpe):
    text = "".join(LINES) * 200
    assert len(text) > 2**20  # more than one chunk
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode("".join(LINES))
        np.testing.assert_array_equal(tokenizer.encode(text), np.tile(ids, 200))


def test_ids_that_are_no_text_decode_to_the_replacement_character(bpe):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode("ж")
        assert len(ids) == 2 and tokenizer.decode(ids[:1]) == "\ufffd"


def test_words_are_those_published():
    words = Words.train(WIKITEXT.splitlines(keepends=True))
    assert words.decode(range(words.size)).startswith(" \n = The <unk> A title")  # 5, 2, 2, 2, 1, 1
    assert words.size == 14 and words.name == "14 words"
    assert words.decode(words.encode(WIKITEXT)) == WIKITEXT
    ids = words.encode("The zebra")  # no line feed, no <eos>
    assert words.decode(ids) == " The <unk>"
    with pytest.raises(SystemExit, match="Expected words of the training text.*'zebra'"):
        Words(["The", "<eos>"]).encode("The zebra\n")


def test_ids_take_the_smallest_dtype():
    sizes = {256: np.uint8, 257: np.uint16, 65_536: np.uint16, 65_537: np.int32}
    for size, dtype in sizes.items():
        assert Words([str(i) for i in range(size)]).dtype == dtype


# --- batches and windows


@pytest.mark.parametrize(("n", "size", "length"), [(1_000, 3, 7), (32, 3, 8), (500, 4, 1)])
def test_an_epoch_takes_each_window_at_most_once(n, size, length):
    ids = np.arange(n, dtype=np.uint16)
    corpus = Corpus("numbers", Bytes(), ids, ids, 0, "")
    steps = corpus.steps_per_epoch(size, length)
    offsets = set()
    for epoch in range(12):
        batches = [corpus.batch(epoch * steps + i, size, length, 0) for i in range(steps)]
        taken = np.concatenate(batches)
        assert taken.shape == (steps * size, length + 1) and taken.dtype == np.int32
        starts = taken[:, 0]
        np.testing.assert_array_equal(taken, starts[:, None] + np.arange(length + 1))
        (offset,) = set(starts % length)
        # Only what fills no batch, and one window that the offset may cost, is left out.
        assert len(set(starts)) == len(starts) > (n - 1 - offset) // length - size - 1
        offsets.add(offset)
    assert len(offsets) > min(length, 4) - 1


def test_a_batch_is_a_function_of_seed_and_step():
    ids = np.arange(1_000, dtype=np.uint16)
    corpus = Corpus("numbers", Bytes(), ids, ids, 0, "")
    last = 3 * corpus.steps_per_epoch(4, 10)
    first = {step: corpus.batch(step, 4, 10, seed=1) for step in (0, 1, last)}
    for step in (last, 1, 0):  # in another order, with another seed in between
        assert not np.array_equal(corpus.batch(step, 4, 10, seed=2), first[step])
        np.testing.assert_array_equal(corpus.batch(step, 4, 10, seed=1), first[step])
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[last])


def test_a_corpus_shorter_than_a_batch_is_refused():
    least = np.arange((3 + 1) * 8, dtype=np.uint16)
    assert Corpus("numbers", Bytes(), least, least, 0, "").steps_per_epoch(3, 8) == 1
    corpus = Corpus("numbers", Bytes(), least[:-1], least, 0, "")
    with pytest.raises(SystemExit, match="Expected at least 32 training ids of numbers.*got 31"):
        corpus.batch(0, 3, 8, 0)


@seeded
@given(st.integers(1, 200), st.integers(1, 40))
def test_every_id_but_the_first_is_a_target_once(n, length):
    ids = np.arange(n, dtype=np.uint8)
    cut, counted = windows(ids, length)
    assert cut.dtype == np.int32 and cut.shape[1] == length + 1 and len(cut) == len(counted)
    np.testing.assert_array_equal(cut[:, 1:][counted], ids[1:])
    np.testing.assert_array_equal(cut[:, :-1][counted], ids[:-1])
    assert counted.any(1).all()  # no window for nothing


# --- corpora


def test_pydoc_is_whole_and_names_its_python(read):
    corpus = read("pydoc")
    text = "\n\n".join(topics[topic] for topic in sorted(topics))
    train, valid = (corpus.tokenizer.decode(ids) for ids in (corpus.train, corpus.valid))
    assert train + valid == text and train.endswith("\n\n")
    assert 0.9 * len(text) <= len(train) < 0.92 * len(text)
    assert corpus.valid_words == len(valid.split()) and platform.python_version() in corpus.about


def test_the_tokenizer_has_seen_the_training_split_alone(read, tmp_path):
    valid = "zyzzyva " * 500
    write(tmp_path / "data", train__txt="".join(LINES), valid__txt=valid)
    corpus = read(tokenizer="bpe", vocabulary=400)
    assert corpus.tokenizer.to_json() == BPE.train(LINES, 400).to_json()
    assert corpus.tokenizer.decode(corpus.valid) == valid + "\n"
    assert corpus.tokenizer.size <= 400


def test_tiny_shakespeare_is_read_or_explained(read, tmp_path):
    if "TFDS_DATA_DIR" in os.environ:
        corpus = read("tiny_shakespeare", data_dir=None)
        assert (len(corpus.train), len(corpus.valid)) == (1_003_854, 55_770)
        assert corpus.tokenizer.decode(corpus.train[:14]) == "First Citizen:"
    else:
        with pytest.raises(SystemExit, match="tiny_shakespeare prepared(.|\n)*`--corpus pydoc`"):
            read("tiny_shakespeare", data_dir=str(tmp_path))


def test_wikitext_has_the_published_counts(read, tmp_path):
    """The files themselves where they lie beside TFDS_DATA_DIR, else small ones of their form."""
    if PUBLISHED.is_dir():
        folder, numbers = PUBLISHED, (33_278, 2_088_628, 217_646)
    else:
        folder, numbers = tmp_path / "data", (14, 21, 21)
        write(folder, **{f"wiki__{split}__tokens": WIKITEXT for split in ("train", "valid")})
    corpus = read("wikitext-2", "words", data_dir=str(folder))
    assert (corpus.tokenizer.size, len(corpus.train), len(corpus.valid)) == numbers
    assert corpus.valid_words == len(corpus.valid)
    with open(folder / "wiki.valid.tokens", encoding="utf-8", newline="\n") as valid:
        assert corpus.tokenizer.decode(corpus.valid) == valid.read()


def test_the_words_of_wikitext_are_counted_alike_by_every_tokenizer(read, tmp_path):
    packed = lzma.compress(WIKITEXT.encode())
    write(tmp_path / "data", wiki__train__tokens__xz=packed, wiki__valid__tokens=WIKITEXT)
    corpora = [read("wikitext-103", kind, vocabulary=260) for kind in ("words", "bytes", "bpe")]
    assert [corpus.valid_words for corpus in corpora] == [21] * 3
    assert [corpus.tokenizer.decode(corpus.train) for corpus in corpora] == [WIKITEXT] * 3
    limited = read("wikitext-2", "words", limit=20)  # ends within a line
    assert limited.valid_words == len(limited.valid) == len(limited.train)


def test_compressed_files_are_read_as_plain_ones(read, tmp_path):
    a, b, valid = "one\r\ntwo\u2028\n", "no line feed at the end", "held out\n"
    write(tmp_path / "plain", a__txt=a, b__txt=b, c__txt=a, my_valid2__txt=valid, test__txt="no")
    write(
        tmp_path / "packed",
        a__txt__xz=lzma.compress(a.encode()),
        b__txt__gz=gzip.compress(b.encode()),
        c__txt=a,
        c__txt__bz2=b"the same, which is not opened",
        VALIDATION__txt__bz2=bz2.compress(valid.encode()),
        latest_txt="no text file",
    )
    plain, packed = (read(data_dir=str(tmp_path / folder)) for folder in ("plain", "packed"))
    same(plain, packed)
    assert plain.tokenizer.decode(plain.train) == a + b + "\n" + a
    assert plain.tokenizer.decode(plain.valid) == valid and plain.valid_words == 2
    assert packed.about == "3 training files; validation: VALIDATION.txt.bz2"


def test_without_a_validation_file_lines_are_held_out(read, tmp_path):
    lines = [f"line {i:03} ü\n" for i in range(100)]
    write(tmp_path / "data", a__txt="first\n", z__txt__gz=gzip.compress("".join(lines).encode()))
    corpus = read()
    assert corpus.tokenizer.decode(corpus.train) == "first\n" + "".join(lines[:95])
    assert corpus.tokenizer.decode(corpus.valid) == "".join(lines[95:])
    assert corpus.about == "2 training files; validation: the last 5% of z.txt.gz, held out"


def test_limit_keeps_the_first_characters_of_each_split(read):
    whole, part = read("pydoc"), read("pydoc", limit=1_000)
    decode = whole.tokenizer.decode
    assert decode(part.train) == decode(whole.train)[:1_000]
    assert decode(part.valid) == decode(whole.valid)[:1_000]
    assert part.valid_words == len(decode(part.valid).split())


# --- the cache


def only(folder):
    (found,) = folder.iterdir()
    return found


def test_the_cache_is_mapped_and_is_not_built_again(read, tmp_path, monkeypatch):
    first = read("pydoc", "bpe", vocabulary=300, limit=5_000)
    assert only(tmp_path / "cache").name.startswith("pydoc-bpe-")
    monkeypatch.setattr(_text, "_build", None)  # what is called now fails
    second = read("pydoc", "bpe", vocabulary=300, limit=5_000)
    same(first, second)
    for corpus in (first, second):
        assert isinstance(corpus.train, np.memmap) and isinstance(corpus.valid, np.memmap)
        assert corpus.train.dtype == np.uint16 and not corpus.train.flags.writeable
    assert type(second.batch(0, 2, 16, 0)) is np.ndarray


@pytest.mark.parametrize("file", ["train.npy", "valid.npy", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_built_again(read, tmp_path, file, harm):
    build = lambda: read("pydoc", "bpe", vocabulary=270, limit=3_000)
    first = build()
    path = only(tmp_path / "cache") / file
    data = path.read_bytes()
    changed = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    path.unlink()  # what is mapped stays as it was
    if harm != "gone":
        path.write_bytes(data[:-8] if harm == "cut" else changed)
    same(first, build())
    assert path.read_bytes() == data
    assert only(tmp_path / "cache") == path.parent  # nothing is left beside


def test_a_cache_of_other_settings_is_not_trusted(read, tmp_path):
    read("pydoc", limit=100)
    short = only(tmp_path / "cache")
    whole = read("pydoc")
    (folder,) = set((tmp_path / "cache").iterdir()) - {short}
    for file in list(folder.iterdir()):
        file.unlink()  # what is mapped stays as it was
        file.write_bytes((short / file.name).read_bytes())
    same(read("pydoc"), whole)
    assert json.loads((folder / "meta.json").read_text())["settings"]["limit"] is None


def test_changed_files_are_read_again(read, tmp_path):
    write(tmp_path / "data", a__txt="abc\n", valid__txt="abc\n")
    read()
    stat = (tmp_path / "data" / "a.txt").stat()
    write(tmp_path / "data", a__txt="abd\n")  # of the same size and time
    os.utime(tmp_path / "data" / "a.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    corpus = read()
    assert corpus.tokenizer.decode(corpus.train) == "abd\n"


def test_without_a_cache_it_is_kept_in_memory(read, tmp_path, capsys):
    (tmp_path / "file").touch()
    corpus = read("pydoc", cache_dir=str(tmp_path / "file"))
    assert "Not cached" in capsys.readouterr().out and not isinstance(corpus.train, np.memmap)
    same(corpus, read("pydoc"))


def test_the_users_cache_folder_is_the_default(read, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    read("pydoc", cache_dir=None, limit=100)
    assert only(tmp_path / "mine" / "deqjax" / "text").name.startswith("pydoc-bytes-")


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("enwik8", {}, "Expected one of the corpora pydoc, tiny_shakespeare, .*got 'enwik8'"),
        ("pydoc", {"tokenizer": "words"}, "Expected --tokenizer bytes or bpe for pydoc, got words"),
        ("pydoc", {"tokenizer": "bpe", "vocabulary": 256}, "above the 256 bytes for bpe, got 256"),
        ("wikitext-2", {"data_dir": None}, "Expected --data-dir with the folder of wikitext-2"),
        ("text", {"data_dir": "/no/such/folder"}, "Expected --data-dir .* got /no/such/folder"),
        ("wikitext-2", {}, "Expected .*wiki.train.tokens, plain or ending in .xz, .gz, .bz2"),
        ("text", {}, "Expected .txt files to train on under .* there are none, and 0 others"),
    ],
)
def test_what_is_not_there_is_said(read, tmp_path, name, options, said):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=said):
        read(name, **options)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a__txt": ""}, "Expected text in both splits of text .* got 0 training ids and 0"),
        ({"a__txt": "one line"}, "got 9 training ids and 0 for validation.*lines to cut it at"),
        ({"a__txt": b"caf\xe9\n"}, "Expected .*a.txt to be text in UTF-8.*UnicodeDecodeError"),
        ({"a__txt__xz": lzma.compress(b"a\n" * 99)[:-9]}, "a.txt.xz to be text.*EOFError"),
        ({"a__txt__gz": b"a\n"}, "a.txt.gz to be text.*BadGzipFile"),
        ({"a__txt": "a\n", "b__txt__zip": b""}, "b.txt.zip, which this version of Python does not"),
        ({"valid__txt": "a\n"}, "there are none, and 1 others"),
    ],
)
def test_files_that_are_no_text_are_refused(read, tmp_path, files, said):
    write(tmp_path / "data", **files)
    with pytest.raises(SystemExit, match=said):
        read()
    assert not (tmp_path / "cache").exists()

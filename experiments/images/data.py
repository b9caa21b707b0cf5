"""Image classification data: each split is one NumPy array of images and one of labels.

A split held whole and indexed with an array of positions is the fastest input there is for data
of this size; nothing is cached on disk. Reading prepared TFDS data needs no TensorFlow.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from training.missing import not_installed
from training.tfds import records

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as missing:
    raise not_installed(missing) from None


class Split(NamedTuple):
    """Images (n, height, width, channels) as uint8, labels (n,) as int32."""

    images: np.ndarray
    labels: np.ndarray

    def padded(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images in batches of `size`, the last one filled up, and the labels of each.

        With one shape for all there is one compilation; what fills up is to be cut off again.
        """
        for i in range(0, len(self.labels), size):
            images, labels = self.images[i : i + size], self.labels[i : i + size]
            yield np.pad(images, ((0, size - len(labels)), (0, 0), (0, 0), (0, 0))), labels

    def batch(self, step: int, size: int, seed: int) -> "Split":
        """The batch of a step: a function of seed and step, so that no position is to be stored."""
        epoch, i = divmod(step, len(self.labels) // size)
        at = _order(len(self.labels), seed, epoch)[i * size : (i + 1) * size]
        return Split(self.images[at], self.labels[at])


@lru_cache(maxsize=1)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


class Dataset(NamedTuple):
    """Two disjoint splits, and the words that say what the second one is."""

    train: Split
    test: Split
    test_name: str  # "test" or "held-out"
    about: str
    num_classes: int
    mirror: bool  # whether a mirrored image keeps its class: not so for digits

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.train.images.shape[1:]

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel of the training split, (1, 1, 1, c)."""
        axes, images = (0, 1, 2), self.train.images
        mean = images.mean(axes, dtype=np.float64, keepdims=True)
        # A chunk at a time: the float64 copy of a whole split would take gigabytes.
        square = lambda part: np.square(part, dtype=np.float64).sum(axes)
        squares = [square(part) for part in np.array_split(images, 50)]
        std = np.sqrt(np.sum(squares, 0) / images[..., 0].size - mean**2)
        return mean.astype(np.float32), std.astype(np.float32)


def load(name: str, *, data_dir: str | None, download: bool, limit: int | None) -> Dataset:
    """Reads a dataset; `limit` keeps the first so many examples of each split (smoke runs)."""
    if name == "digits":
        return _digits(limit)
    train = _tfds(name, "train", data_dir, download, limit)
    if name == "cifar10":
        # The training images are all that is needed, and they alone are split: whoever tunes on
        # the held-out ones has still not seen the test split.
        held = min(5_000, len(train.labels) // 4)
        test = Split(train.images[-held:], train.labels[-held:])
        train = Split(train.images[:-held], train.labels[:-held])
        return Dataset(train, test, "held-out", f"last {held:,} training images", 10, True)
    test = _tfds(name, "test", data_dir, download, limit)
    return Dataset(train, test, "test", "the official split", 10, False)


def _digits(limit: int | None) -> Dataset:
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.uint8).reshape(-1, 8, 8, 1)  # 0..16
    labels = np.asarray(labels, np.int32)
    # One split for all seeds, so that runs differ by their training alone.
    at = np.arange(len(labels))
    parts = train_test_split(at, test_size=360, stratify=labels, random_state=0)
    train, test = (Split(images[part[:limit]], labels[part[:limit]]) for part in parts)
    return Dataset(train, test, "test", "a stratified fifth", 10, False)


def _tfds(name: str, split: str, data_dir: str | None, download: bool, limit: int | None) -> Split:
    where: Any = {"data_dir": data_dir, "download": download, "instead": "--dataset digits"}
    read = records(name, split, limit=limit, **where)
    images = np.stack([record["image"] for record in read])
    return Split(images, np.array([record["label"] for record in read], np.int32))

"""A task as arrays: what is given, what is to be found, and what counts as found."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from puzzles import mazes, sequences, sudoku
from puzzles.options import SUDOKUS, Config
from training.missing import not_installed

try:
    from sklearn.datasets import load_digits
except ImportError as missing:
    raise not_installed(missing) from None

Examples = tuple[np.ndarray, np.ndarray]


class Task(NamedTuple):
    """Examples `(given, wanted)`: tokens and labels of the cells, or digits and pictures."""

    train: Examples
    test: Examples
    tokens: int  # kinds of a given cell; 0: a picture is wanted
    labels: int  # of a Sudoku with 0, which is no digit
    shuffle: Callable[..., Examples] | None  # to an equal example: rows, names, sides exchanged
    about: str

    def batch(self, step: int, size: int, seed: int) -> Examples:
        """The batch of a step: a function of seed and step, so that no position is to be stored."""
        given, wanted = self.train
        if not self.tokens:
            at = np.arange(size) % len(given)
            return given[at], wanted[at]
        rng = np.random.default_rng([seed, step])
        at = rng.integers(len(given), size=size)
        examples = given[at], wanted[at]
        return examples if self.shuffle is None else _int32(self.shuffle(*examples, rng))

    def loss(self, out: Float[Array, "b ..."], wanted: Any) -> Float[Array, " b"]:
        """Per example: cross-entropy in nats, or squared error over the variance between digits."""
        if self.tokens:
            wanted = wanted.reshape(out.shape[:-1])
            losses = optax.softmax_cross_entropy_with_integer_labels(out, wanted)
            return jnp.mean(losses.reshape(len(out), -1), 1)
        pictures = self.test[1]
        variance = float(np.mean((pictures - pictures.mean(0)) ** 2))
        return jnp.mean((out - wanted) ** 2, (1, 2)) / variance

    def solved(self, out: Float[Array, "b ..."], wanted: Any) -> Bool[Array, " b"]:
        """Whether every cell is right; of a picture, whether it is nearest to the right digit."""
        if self.tokens:
            right = jnp.argmax(out, -1) == wanted.reshape(out.shape[:-1])
            return jnp.all(right.reshape(len(out), -1), 1)
        errors = jnp.mean((out[:, None] - self.test[1][None]) ** 2, (2, 3))
        own = jnp.mean((out - wanted) ** 2, (1, 2))
        return own <= jnp.min(errors, 1) * (1 + 1e-5)


def load(config: Config) -> Task:
    """The task of a configuration, made from seed 0: runs differ by their training alone."""
    sizes = (config.size, config.clues, config.puzzles, config.held_out)
    return _made(config.task, *(n or 0 for n in sizes))


@functools.cache
def _made(name: str, size: int, clues: int, puzzles: int, held_out: int) -> Task:
    if name == "growth":
        return _growth(size)
    counts = {False: puzzles, True: held_out}
    shuffle: Any = None
    if name in SUDOKUS:
        side = int(name[-1])
        make = lambda **how: sudoku.puzzles(side, clues, **how)
        shuffle = lambda x, y, rng: sudoku.shuffled(side, x, y, rng)
        kinds, about = (side + 1, side + 1), f"Sudokus of {side} x {side} cells, {clues} given"
    elif name == "maze":
        make, shuffle = lambda **how: mazes.puzzles(size, **how), mazes.turned
        kinds, about = (3, 2), f"perfect mazes of {size} x {size} cells"
    else:
        make = lambda **how: getattr(sequences, name)(size, **how)
        shuffle = sequences.renamed if name == "permutations" else None
        kinds = (2, 2) if name == "parity" else (120, 120)
        about = f"running products of {size} {'signs' if name == 'parity' else 'permutations'}"
    train, test = (_int32(make(count=counts[t], test=t, seed=0)) for t in (False, True))
    return Task(train, test, *kinds, shuffle, about)


def _int32(examples: Examples) -> Examples:
    given, wanted = (np.ascontiguousarray(x, np.int32) for x in examples)
    return given, wanted


def _growth(side: int) -> Task:
    if side % 8:
        raise SystemExit(f"Expected --size of growth to be a multiple of 8, got {side}.")
    data: Any = load_digits()
    means = np.stack([data.images[data.target == digit].mean(0) / 16 for digit in range(10)])
    pictures = np.kron(means, np.ones((1, side // 8, side // 8))).astype(np.float32)
    examples = np.arange(10, dtype=np.int32), pictures
    about = f"ten digits of {side} x {side} cells, each grown from one cell; none is held out"
    return Task(examples, examples, 0, 0, None, about)

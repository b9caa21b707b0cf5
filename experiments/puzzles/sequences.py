"""Running products: of signs (parity) and of the permutations of five things."""

import itertools

import numpy as np

from puzzles.split import held_out

PERMUTATIONS = np.array(list(itertools.permutations(range(5))))
_PLACES = 5 ** np.arange(4, -1, -1)  # as numbers of five digits they are in ascending order
# Row p, column q: first p, then q.
_THEN = np.searchsorted(PERMUTATIONS @ _PLACES, (PERMUTATIONS[:, PERMUTATIONS] @ _PLACES).T)
_INVERSE = np.argmin(_THEN, 1)  # the identity is the first one
# Row g: each permutation with the five things renamed by g.
_RENAMED = np.array([_THEN[_THEN[_INVERSE[g]], g] for g in range(120)])


def parity(length: int, count: int, *, test: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the parity of all bits up to each: `(count, length)` each."""
    form = lambda bits: bits.tobytes()
    return _drawn(length, count, 2, np.array([[0, 1], [1, 0]]), form, test, seed)


def permutations(
    length: int, count: int, *, test: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of permutations, and the product of all up to each: the word problem of S5."""
    form = lambda word: min(renamed.tobytes() for renamed in _RENAMED[:, word])
    return _drawn(length, count, 120, _THEN, form, test, seed)


def _drawn(length, count, size, table, form, test, seed):
    rng, words = np.random.default_rng([seed, test]), []
    while len(words) < count:
        word = rng.integers(size, size=length).astype(np.uint8)
        words += [word] if held_out(form(word)) == test else []
    words = np.stack(words)
    products = [words[:, 0]]
    for i in range(1, length):
        products.append(table[products[-1], words[:, i]])
    return words, np.stack(products, 1).astype(np.uint8)


def renamed(words: np.ndarray, products: np.ndarray, rng: np.random.Generator):
    """The same words of permutations, with the five things renamed in one random way."""
    g = rng.integers(120)
    return _RENAMED[g][words].astype(np.uint8), _RENAMED[g][products].astype(np.uint8)

"""Sudokus of 4, 6 or 9 cells a side: solutions, puzzles with one solution, and their symmetries."""

import dataclasses
import functools as ft
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np

from puzzles.split import held_out

_MOST_TRIES = 500
Cells = list[int]  # row by row; 0 is an empty cell


@dataclasses.dataclass(frozen=True)
class Board:
    """A board of boxes with so many rows and columns."""

    rows: int
    columns: int

    @property
    def side(self) -> int:
        """Cells a side, and digits."""
        return self.rows * self.columns

    @ft.cached_property
    def units(self) -> list[tuple[int, int, int]]:
        """The row, the column and the box of each cell, numbered through."""
        n, cells = self.side, itertools.product(range(self.side), repeat=2)
        box = lambda r, c: r // self.rows * self.rows + c // self.columns
        return [(r, n + c, 2 * n + box(r, c)) for r, c in cells]


BOARDS = {4: Board(2, 2), 6: Board(2, 3), 9: Board(3, 3)}


def solutions(
    board: Board, cells: Sequence[int], rng: random.Random | None = None
) -> Iterator[Cells]:
    """All completions of `cells`, in random order if there is an `rng`.

    Depth first, always in the cell with the fewest digits left.
    """
    cells, units = list(cells), board.units
    free = [2**board.side - 1] * (3 * board.side)  # the digits left in each unit, as bits
    for cell, digit in enumerate(cells):
        for unit in units[cell] if digit else ():
            free[unit] &= ~(1 << digit - 1)

    def left(cell: int) -> int:
        row, column, box = units[cell]
        return free[row] & free[column] & free[box]

    def search(empty: list[int]) -> Iterator[Cells]:
        if not empty:
            yield cells.copy()
            return
        cell = min(empty, key=lambda cell: left(cell).bit_count())
        rest, bits = [c for c in empty if c != cell], left(cell)
        digits = [d for d in range(board.side) if bits >> d & 1]
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            cells[cell] = digit + 1
            for unit in units[cell]:
                free[unit] ^= 1 << digit
            yield from search(rest)
            for unit in units[cell]:
                free[unit] ^= 1 << digit
        cells[cell] = 0

    yield from search([cell for cell, digit in enumerate(cells) if not digit])


def puzzle(board: Board, solution: Cells, clues: int, rng: random.Random) -> Cells | None:
    """A puzzle with this solution alone and so many clues; None if this order leads to none."""
    cells, order = solution.copy(), list(range(len(solution)))
    rng.shuffle(order)
    for cell in order:
        if sum(map(bool, cells)) == clues:
            return cells
        digit, cells[cell] = cells[cell], 0
        if len(list(itertools.islice(solutions(board, cells), 2))) > 1:
            cells[cell] = digit
    return cells if sum(map(bool, cells)) == clues else None


def form(board: Board, solution: Sequence[int]) -> bytes:
    """The same for all solutions that differ by a symmetry of the board, or by the digits' names.

    Two rows define a permutation of the digits; its cycles do not depend on names, nor on the order
    of columns. The same with columns; on a board of square boxes the two are interchangeable.
    """
    grid = np.asarray(solution).reshape(board.side, board.side)

    def lines(grid: np.ndarray, band: int) -> list[tuple]:
        pairs = itertools.combinations(range(board.side), 2)
        return sorted((i // band == j // band, _cycles(grid[i], grid[j])) for i, j in pairs)

    both = [lines(grid, board.rows), lines(grid.T, board.columns)]
    return repr(sorted(both) if board.rows == board.columns else both).encode()


def _cycles(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """The lengths of the cycles of the permutation from a to b, sorted."""
    to, found = dict(zip(a.tolist(), b.tolist(), strict=True)), []
    while to:
        start, n = next(iter(to)), 0
        while start in to:
            start, n = to.pop(start), n + 1
        found.append(n)
    return tuple(sorted(found))


def puzzles(
    side: int, clues: int, count: int, *, test: bool, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` puzzles and their solutions, each of shape `(count, side^2)`, digits from 1."""
    board, rng, found, failed = BOARDS[side], random.Random(f"{seed} {test}"), [], 0
    while len(found) < count:
        solution = next(solutions(board, [0] * side**2, rng))
        if held_out(form(board, solution)) == test:
            cells = puzzle(board, solution, clues, rng)
            found += [(cells, solution)] if cells else []
            failed = 0 if cells else failed + 1
            if failed == _MOST_TRIES:
                raise SystemExit(
                    f"Expected --clues with which Sudokus of {side} x {side} cells have one "
                    f"solution, got {clues}, with which none was found in {_MOST_TRIES:,}. Pass "
                    f"another number."
                )
    cells, solved = np.asarray(found, np.int8).swapaxes(0, 1)
    return cells, solved


def shuffled(
    side: int, cells: np.ndarray, solution: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same puzzles with other names of digits, and rows and columns in another order."""
    board = BOARDS[side]
    names = np.pad(np.argsort(rng.random((len(cells), side))) + 1, ((0, 0), (1, 0)))

    def order(band: int) -> np.ndarray:
        bands = rng.permutation(side // band)
        return np.concatenate([b * band + rng.permutation(band) for b in bands])

    rows, columns = order(board.rows), order(board.columns)

    def move(x: np.ndarray) -> np.ndarray:
        renamed = np.take_along_axis(names, x.astype(int), 1).reshape(-1, side, side)
        return renamed[:, rows][:, :, columns].reshape(x.shape).astype(x.dtype)

    return move(cells), move(solution)

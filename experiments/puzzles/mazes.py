"""Perfect mazes: between any two rooms there is one way, and it is to be found."""

import itertools
import random

import numpy as np

from puzzles.split import held_out

WALL, FREE, END = 0, 1, 2
Room = tuple[int, int]


def maze(side: int, rng: random.Random) -> np.ndarray:
    """A uniformly random perfect maze, `(side, side)` of WALL and FREE, by Wilson's algorithm.

    Rooms are the cells with two odd coordinates; `side` is odd.
    """
    rooms = _rooms(side)
    grid, inside = np.full((side, side), WALL, np.int8), {rng.choice(rooms)}
    for room in rooms:
        # A random walk until it meets the maze; where it crosses itself, its loop is forgotten.
        way: dict[Room, Room] = {}
        at = room
        while at not in inside:
            way[at] = rng.choice(_neighbours(at, side))
            at = way[at]
        at = room
        while at not in inside:
            inside.add(at)
            (r, c), (s, d) = at, way[at]
            grid[(r + s) // 2, (c + d) // 2] = FREE
            at = way[at]
    for r, c in rooms:
        grid[r, c] = FREE
    return grid


def _rooms(side: int) -> list[Room]:
    return [(r, c) for r in range(1, side, 2) for c in range(1, side, 2)]


def _neighbours(room: Room, side: int) -> list[Room]:
    r, c = room
    around = ((r - 2, c), (r + 2, c), (r, c - 2), (r, c + 2))
    return [(s, d) for s, d in around if 0 < s < side and 0 < d < side]


def path(grid: np.ndarray, start: Room, end: Room) -> np.ndarray:
    """1 on the way from start to end, 0 elsewhere: what is left when dead ends are filled in."""
    open_ = grid != WALL
    while True:
        around = np.zeros(grid.shape, int)
        for axis, step in itertools.product((0, 1), (-1, 1)):
            around += np.roll(open_, step, axis)  # the border is wall
        dead = open_ & (around <= 1)
        dead[start] = dead[end] = False
        if not dead.any():
            return open_.astype(np.int8)
        open_ = open_ & ~dead


def symmetries(grid: np.ndarray) -> list[np.ndarray]:
    """The grid, turned and mirrored: 8 of them."""
    return [np.rot90(x, k) for x in (grid, grid.T) for k in range(4)]


def puzzles(side: int, count: int, *, test: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` mazes with two ends, and their ways: each of shape `(count, side, side)`."""
    rng, found = random.Random(f"{seed} {test}"), []
    while len(found) < count:
        grid = maze(side, rng)
        if held_out(min(x.tobytes() for x in symmetries(grid))) != test:
            continue
        # Two dead ends, so that ways are long.
        rooms = _rooms(side)
        doors = {(r, c): sum(grid[r + i, c + j] for i, j in ((0, 1), (1, 0), (0, -1), (-1, 0)))
                 for r, c in rooms}  # fmt: skip
        start, end = rng.sample([room for room in rooms if doors[room] == 1], 2)
        way = path(grid, start, end)
        grid[start] = grid[end] = END
        found.append((grid, way))
    grids, ways = zip(*found, strict=True)
    return np.stack(grids), np.stack(ways)


def turned(
    grids: np.ndarray, ways: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The same mazes, all turned and mirrored in one random way."""
    k, mirror = int(rng.integers(4)), rng.integers(2)
    move = lambda x: np.rot90(x.swapaxes(1, 2) if mirror else x, k, (1, 2))
    return move(grids), move(ways)

"""The generators: every answer is the only one, and no test example resembles a training one."""

import random
import re

import numpy as np
import pytest

from puzzles import mazes, sequences, sudoku
from puzzles.config import choose, resolved
from puzzles.law import CASES
from puzzles.measure import auc
from puzzles.options import Config
from puzzles.split import held_out
from puzzles.tasks import load


@pytest.mark.parametrize(("side", "clues"), [(4, 5), (6, 12), (9, 35)])
def test_a_sudoku_has_one_solution_and_the_test_has_others(side, clues):
    board, forms = sudoku.BOARDS[side], {}
    for test in (False, True):
        cells, solutions = sudoku.puzzles(side, clues, 6, test=test, seed=0)
        assert np.all(np.count_nonzero(cells, axis=1) == clues)
        for puzzle, solution in zip(cells.tolist(), solutions.tolist(), strict=True):
            assert list(sudoku.solutions(board, puzzle)) == [solution]
            assert held_out(sudoku.form(board, solution)) == test
            for unit in range(3 * side):
                inside = [
                    d for d, units in zip(solution, board.units, strict=True) if unit in units
                ]
                assert sorted(inside) == list(range(1, side + 1))
        forms[test] = {sudoku.form(board, solution) for solution in solutions.tolist()}
    assert not forms[False] & forms[True]


def test_the_form_of_a_sudoku_ignores_every_symmetry():
    rng = np.random.default_rng(0)
    for side, board in sudoku.BOARDS.items():
        solution = next(sudoku.solutions(board, [0] * side**2, random.Random(side)))
        cells = np.array([solution])
        form = sudoku.form(board, solution)
        for _ in range(5):
            _, moved = sudoku.shuffled(side, cells, cells, rng)
            assert sudoku.form(board, moved[0]) == form
            assert list(sudoku.solutions(board, moved[0])) == [moved[0].tolist()]
        if board.rows == board.columns:
            turned = np.reshape(solution, (side, side)).T.ravel()
            assert sudoku.form(board, turned) == form


@pytest.mark.parametrize("side", [7, 13])
def test_a_maze_has_one_way_and_the_test_has_other_walls(side):
    walls = {}
    for test in (False, True):
        grids, ways = mazes.puzzles(side, 20, test=test, seed=0)
        rooms = ((side - 1) // 2) ** 2
        for grid, way in zip(grids, ways, strict=True):
            # A tree: as many passages as rooms less one, and all of it is reached from one end.
            assert np.sum(grid != mazes.WALL) == 2 * rooms - 1
            start, end = map(tuple, np.argwhere(grid == mazes.END))
            reached, edge = {start: 0}, [start]
            for r, c in edge:
                for at in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
                    if grid[at] != mazes.WALL and at not in reached:
                        reached[at] = reached[r, c] + 1
                        edge.append(at)
            assert len(reached) == 2 * rooms - 1
            assert way.sum() == reached[end] + 1  # the shortest way, both ends with it
            assert way[start] and way[end] and not way[grid == mazes.WALL].any()
        plain = np.where(grids == mazes.WALL, mazes.WALL, mazes.FREE).astype(np.int8)
        walls[test] = {min(x.tobytes() for x in mazes.symmetries(grid)) for grid in plain}
        assert all(held_out(form) == test for form in walls[test])
    assert not walls[False] & walls[True]


def test_running_products():
    bits, parity = sequences.parity(9, 50, test=False, seed=0)
    assert np.array_equal(parity, np.cumsum(bits, 1) % 2)
    drawn = sequences.permutations(6, 50, test=True, seed=0)
    for words, products in (drawn, sequences.renamed(*drawn, np.random.default_rng(0))):
        for word, product in zip(words, products, strict=True):
            five = np.arange(5)
            for number, expected in zip(word, product, strict=True):
                five = sequences.PERMUTATIONS[number][five]
                assert np.array_equal(five, sequences.PERMUTATIONS[expected])


def test_words_of_the_test_are_no_renamed_ones_of_the_training():
    rng, forms = np.random.default_rng(0), {}
    for test in (False, True):
        words, products = sequences.permutations(2, 400, test=test, seed=0)
        renamed, _ = sequences.renamed(words, products, rng)
        both = {False: words, True: renamed}
        forms[test] = {x.tobytes() for x in both[test]}
        parity, _ = sequences.parity(8, 100, test=test, seed=0)
        assert all(held_out(bits.tobytes()) == test for bits in parity)
    assert not forms[False] & forms[True] and len(forms[False]) > 300


def test_a_batch_is_a_function_of_its_step():
    config = resolved(Config(smoke=True, task="maze"))
    task = load(config)
    first, again, later = task.batch(3, 8, 0), task.batch(3, 8, 0), task.batch(4, 8, 0)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], later[0])
    assert np.array_equal(load(config).test[0], task.test[0])


def test_the_area_under_the_curve():
    score, right = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auc(score, right) == 0.75
    assert auc(np.ones(4), right) == 0.5
    assert auc(score, right | True) is None


def test_the_runs_on_record_are_complete_and_have_names_of_their_own():
    configs = [case.config(depth, 0, False) for case in CASES for depth in case.depths]
    assert len({config.name for config in configs}) == len(configs)
    assert all(depth in case.depths for case in CASES for depth in case.timed)


@pytest.mark.parametrize(("options", "words"), [
    (dict(task="maze", size=8), "Expected an odd --size"),
    (dict(task="maze", size=5), "of at least 7"),
    (dict(law=True, noise=0.1), "Expected --law without options"),
    (dict(task="sudoku4", clues=2), "with which none was found in 500"),
    (dict(task="sudoku4", clues=17), "with which none was found in 500"),
    (dict(task="growth", size=12), "multiple of 8"),
    (dict(task="growth", width=8), "Expected --width of at least 11"),
    (dict(task="parity", width=30), "a multiple of the four heads"),
    (dict(task="sudoku6", mixing="automaton"), "Expected --mixing automaton for growth"),
    (dict(task="sudoku6", size=9), "Expected no --size"),
    (dict(task="sudoku6", fire=0.5), "Expected no --fire"),
    (dict(last=(17,)), "Expected --last of at most the 16 --evaluations"),
    (dict(adjoint="implicit", last=(3,)), "Expected no --last"),
    (dict(segments=2, accumulate=2), "Expected --segments 1"),
    (dict(adjoint="implicit", noise=0.1), "draw"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(words)):
        [load(config) for config in choose(Config(**options))]

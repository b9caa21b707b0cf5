"""`experiments/certificates.py`, run as a user does, with --smoke."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    path = tmp_path_factory.mktemp("certificates")
    run = measured(EXPERIMENTS / "certificates.py", path)
    assert run.returncode == 0, run.stderr
    assert (path / "out" / "table.md").read_text() in run.stdout
    return json.loads((path / "out" / "results.json").read_text()), path / "out"


@pytest.mark.slow
def test_every_promise_is_measured(smoke):
    results, _ = smoke
    table = {line["claim"]: line for line in results["claims"]}
    for line in table.values():
        known = line["bound"] is not None and line["measured"] is not None
        assert line["holds"] is (line["measured"] <= line["bound"] if known else None), line
    # Claims that neither the problem's size nor the machine's load can change.
    for text, bound in {
        "bounds of error that are too small": 0,
        "tanh, rho(W) 1, x about 0.0001, float32: share of examples said": 0,
        "certify, float64: violations": 0,
        "certify, float32: violations": 0,
        "PositiveConcaveSolver, float64: violations": 0,
        "PositiveConcaveSolver, float32: violations": 0,
        "Bracketing, float64: violations": 0,
        "Bracketing, float32: violations": 0,
        "maps without the theorem": 0,
        "certify, float32: arrays that batch-mates change": 0,
        "PositiveConcaveSolver, float32: arrays that batch-mates change": 0,
    }.items():
        (line,) = (line for claim, line in table.items() if claim.startswith(text))
        assert line["bound"] == bound and line["holds"] is True, line
    for text, bound in {
        "tanh, rho(W) 1, x about 0.065, float32: bound / true error": 1.5,
        "tanh, rho(W) 1, x about 0.065, float32: JVPs": 3,
        "tanh, rho(W) 1, x about 0.0001, float32: evaluations and JVPs to a certified 0.01": 60,
        "convolution tanh, 3 channels, 4 x 4, batch 6: time of value and gradient": 1.15,
    }.items():
        found = [line["bound"] for claim, line in table.items() if claim.startswith(text)]
        assert set(found) == {bound}, text


@pytest.mark.slow
def test_tables_and_plot(smoke):
    results, out = smoke
    table = (out / "table.md").read_text()
    for title in ("Tightness", "Hard problems", "Coverage", "Maps", "Time", "Batch-mates"):
        assert f"\n## {title}" in table
    assert "\n0 counterexamples." in table
    assert (out / "certificates.png").stat().st_size > 20_000
    assert all(row["false"] == 0 for row in results["tightness"])
    for row in results["tightness"]:
        assert row["low"] <= row["radius"] <= row["high"]


def test_a_violation_is_counted_and_shown(module):
    """Bounds that are wrong on purpose are found, and handed on with all that shows it."""
    coverage, cells = module("bench.certificates.coverage"), module("bench.certificates.cells")
    p = cells.dense("tanh", 1.0, 0.1, 3, 4, "float64")
    z = np.asarray(p.solution, float)
    wrong = coverage._false_ends(p, z * (1 + 1e-12), z * (1 - 1e-12))
    assert wrong["lower end"].all() and wrong["upper end"].all()
    right = coverage._false_ends(p, z * (1 - 1e-12), z * (1 + 1e-12))
    assert not (right["lower end"].any() or right["upper end"].any())
    assert not coverage._short(p, z * (1 + 1e-12), np.full(3, 1.1e-12)).any()
    assert coverage._short(p, z * (1 + 1e-12), np.array([1.1e-12, 0.9e-12, np.nan])).tolist() == [
        False,
        True,
        True,
    ]
    said = {"relative_error": np.zeros(3), "spectral_radius": np.zeros((2, 3))}
    row = coverage._about(p, "float64", "certify", {"lower end": wrong["lower end"]}, z, said)
    assert row["false"] == {"lower end": 3} and len(row["counterexamples"]) == 3
    json.dumps(row)


def test_references(module):
    """A solution that has a closed form, and radii of matrices that are known."""
    cells, random = module("bench.certificates.cells"), module("bench.certificates.random")
    assert cells.untested() == []
    # z = sqrt(w z + x): a quadratic equation.
    w, x = np.full((2, 1, 1), 2.0), np.array([[0.5], [3.0]])
    p = cells.solved("sqrt", w, x)
    long = x.astype(np.longdouble)
    np.testing.assert_array_less(np.abs(1 + np.sqrt(1 + long) - p.solution), p.doubt + 1e-18)
    low, high = random.radii(p)
    truth = np.asarray(1 / p.solution[:, 0])  # w / (2 z)
    assert np.all(low <= truth) and np.all(truth <= high) and np.all(high - low < 1e-14)
    # relu6 below its kink: J = W, whose radius is 0 if it is strictly triangular, 6 of ones.
    nilpotent = np.triu(np.full((1, 6, 6), 0.1), 1)
    low, high = random.radii(cells.solved("relu6", nilpotent, np.full((1, 6), 0.1)))
    assert low[0] == high[0] == 0
    ones = np.full((1, 6, 6), 0.1)
    low, high = random.radii(cells.solved("relu6", ones, np.full((1, 6), 0.1)))
    assert abs(low[0] - 0.6) < 1e-14 and abs(high[0] - 0.6) < 1e-14


def test_erf_in_long_double(module):
    erf = module("bench.certificates.cells")._erf
    u = np.array([1e-3, 0.5, 1.0, 3.0, 6.5])
    from scipy import special

    exact = erf(u.astype(np.longdouble))
    np.testing.assert_allclose(exact.astype(float), special.erf(u), rtol=3e-16)

"""`experiments/compare_solvers.py` and `compare_adjoints.py`, run as a user does, with --smoke."""

import json
import os
from pathlib import Path

import pytest
from processes import measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
OURS = {"Picard", "damped Picard", "Anderson", "Broyden"}
THEIRS = {"jaxopt Picard", "jaxopt Anderson"}
ADJOINTS = {
    "Implicit",
    "Implicit, series",
    "Implicit, Anderson",
    "Implicit, Broyden",
    "Implicit, GMRES",
    "Implicit, BiCGStab",
    "Phantom",
    "NeumannPhantom",
    "JacobianFree",
    "Broyden (SHINE)",
    "RecursiveCheckpoint",
    "Reversible, exact",
}


def smoke(script, path):
    """The results of a smoke run without jaxopt, installed or not, and what it printed."""
    (path / "without").mkdir()
    (path / "without" / "jaxopt.py").write_text("raise ImportError('simulated')\n")
    before = [str(path / "without"), os.environ.get("PYTHONPATH", "")]
    run = measured(EXPERIMENTS / script, path, PYTHONPATH=os.pathsep.join(filter(None, before)))
    assert run.returncode == 0, run.stderr
    out = path / "out"
    assert (out / "table.md").read_text() in run.stdout
    return json.loads((out / "results.json").read_text()), out


@pytest.fixture(scope="module")
def solvers(tmp_path_factory):
    return smoke("compare_solvers.py", tmp_path_factory.mktemp("solvers"))


@pytest.fixture(scope="module")
def adjoints(tmp_path_factory):
    return smoke("compare_adjoints.py", tmp_path_factory.mktemp("adjoints"))


def bounds(results):
    """The bound of each claim, which is checked to say what its numbers say."""
    for line in results["claims"]:
        known = None not in (line["bound"], line["measured"])
        assert line["holds"] is (line["measured"] <= line["bound"] if known else None), line
    return {line["claim"]: line["bound"] for line in results["claims"]}


def begins(table, text):
    found = {bound for claim, bound in table.items() if claim.startswith(text)}
    assert found, text
    return found


@pytest.mark.slow
def test_every_promise_of_the_solvers_is_measured(solvers):
    results, _ = solvers
    table = bounds(results)
    for text, bound in {
        "Anderson: evaluations on tanh, rho(J) 0.996": 100,
        "Broyden: evaluations on tanh, rho(J) 0.996": 100,
        "Anderson: evaluations - max(1.2 Picard": 0,
        "Broyden: evaluations - max(1.2 Picard": 0,
        "mixed batch: residual / tolerance": 1,
        "mixed batch: evaluations of an example": 0,
        "evaluations of Picard / of jaxopt Picard": 1,
        "seconds of our best / of jaxopt's best": 1,
        "Anderson: time beyond f": 1.5,
        "Broyden: time beyond f": 1.5,
        "dense tanh, Picard, value and gradient: time / floor": 1.1,
        "attention, solve and gradient: time of our best": 0.5,
    }.items():
        assert bound in begins(table, text), text
    # Claims that no machine's load can change hold at any size.
    kept = "Anderson: evaluations", "Broyden: evaluations", "mixed batch", "evaluations counted"
    assert all(
        line["holds"] is not False for line in results["claims"] if line["claim"].startswith(kept)
    )


@pytest.mark.slow
def test_without_jaxopt_its_rows_and_claims_say_so(solvers):
    results, out = solvers
    rows = results["evaluations"]
    assert {row["method"] for row in rows} == {*OURS, "Newton"}
    about_it = [line for line in results["claims"] if "jaxopt" in line["claim"]]
    assert len(about_it) == 11
    assert all(line["measured"] is None and line["holds"] is None for line in about_it)
    table = (out / "table.md").read_text()
    assert table.count("not measured") == len(about_it)
    assert "not installed" in table and (out / "residuals.png").stat().st_size > 20_000


@pytest.mark.slow
def test_a_history_is_what_the_front_door_counts(solvers):
    results, _ = solvers
    tol = results["runs"]["evaluations"]["config"]["tol"]
    for row in results["evaluations"]:
        if row["steps"] is not None:
            *above, last = row["history"][: row["steps"]]
            assert last <= tol < min(above, default=1), row["method"]
            assert row["evaluations"] == row["steps"] * row.get("every", 1)


@pytest.mark.slow
def test_every_adjoint_is_compared(adjoints):
    results, out = adjoints
    rows = results["adjoints"]
    assert {(row["method"], row["rho"]) for row in rows} == {
        (method, rho) for method in ADJOINTS for rho in (0.5, 0.9)
    }
    for row in rows:
        if row["method"].startswith("Implicit") and "series" not in row["method"]:
            assert row["error"] < 1e-4, row
    error = {row["method"]: row["error"] for row in rows if row["rho"] == 0.9}
    # Five damped steps, unrolled or as a series, are the same at a fixed point, and better than 1.
    assert error["NeumannPhantom"] == pytest.approx(error["Phantom"], rel=1e-3)
    assert error["Phantom"] < error["JacobianFree"]
    table = (out / "table.md").read_text()
    for begin in ("| must hold |", "| gradient |", "| gradient error |", "| copies of z / ms |"):
        assert any(line.startswith(begin) for line in table.splitlines()), begin
    assert "not installed" in table and (out / "gradients.png").stat().st_size > 20_000


@pytest.mark.slow
def test_every_promise_of_the_adjoints_is_measured(adjoints):
    results, _ = adjoints
    table = bounds(results)
    assert begins(table, "implicit backward at state size") == {8}
    assert begins(table, "the same: bytes at twice the size") == {2.05}
    assert begins(table, "implicit gradient, default, rho") == {1}
    assert all(line["holds"] is not False for line in results["claims"])


def test_what_is_not_finite_is_no_success(module):
    report, which = module("bench.compare.report"), module("bench.compare.which")
    row = {"rho": 0.9, "bound": 1e-4, "steps": 1, "error": None, "nan": False}
    (line,) = which.claims({"guarantee": [row]})
    assert line["holds"] is False
    (line,) = which.claims({"guarantee": [row | {"nan": True}]})
    assert line["holds"] is True and "NaN" in line["claim"]
    about = {"problem": "tanh, rho(J) 0.996", "rho": 0.996, "history": [], "all_seconds": [1.0]}
    one = lambda method, n, met: {
        **about,
        "method": method,
        "evaluations": n,
        "steps": None,
        "met": met,
        "residual": None,
    }
    rows = [one("Picard", 9, True), one("Anderson", 9, False), one("Broyden", 12, True)]
    rows += [one("damped Picard", 9, True), one("jaxopt Picard", 8, True)]
    lines = {line["claim"]: line for line in report.claims({"evaluations": rows})}
    assert lines["Anderson: evaluations on tanh, rho(J) 0.996"]["holds"] is False
    excess = [lines[f"{m}: evaluations - max(1.2 Picard, Picard + 2), worst of 1"]
              for m in ("Anderson", "Broyden")]  # fmt: skip
    assert [line["holds"] for line in excess] == [False, False]
    begin = "evaluations of Picard / of jaxopt Picard"
    (ratio,) = (line for claim, line in lines.items() if claim.startswith(begin))
    assert ratio["measured"] == 9 / 8 and ratio["holds"] is False


def test_the_bytes_of_a_history(module):
    count = module("bench.compare.time").history_bytes
    # Anderson, five rows: 15 read, 2 written, and 6 of the pairs (z, f(z)); Broyden, 16 rows.
    assert count("Anderson", 10) == 4 * 10 * (15 + 2 + 6)
    assert count("Broyden", 10) == 4 * 10 * (64 + 2 + 6)

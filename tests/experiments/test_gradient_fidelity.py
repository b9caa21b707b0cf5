"""`experiments/gradient_fidelity.py`, run as a user runs it, with --smoke."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import measured

SCRIPT = Path(__file__).parents[2] / "experiments" / "gradient_fidelity.py"
METHODS = {"exact", "isolated", "float", "float64 state", "segmented", "checkpointed"}
METHODS |= {"implicit", "phantom"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a smoke run; its output is in said.txt."""
    path = tmp_path_factory.mktemp("fidelity")
    run = measured(SCRIPT, path)
    assert run.returncode == 0, run.stderr
    (path / "out" / "said.txt").write_text(run.stdout)
    return path / "out"


@pytest.mark.slow
def test_every_promise_is_measured(folder):
    results = json.loads((folder / "results.json").read_text())
    lines = {line["claim"]: line for line in results["claims"]}
    for begin, bounds in {
        "exact: reversal residual": {0},
        "exact: gradient error / that of float32 checkpointed": {10},
        "exact: bytes kept per state element": {0},
        "exact: other bytes kept": {0},
        "float: temporary memory at": {0.02},
        "float: time per evaluation / floor": {1.05, 0.93, 0.88, None},
        "exact: time / that of the float state": {1.02},
        "isolated: time per evaluation / (floor + one f)": {1.1},
        "float: time / that of RevDEQ's scheme": {None},
        "isolated: the same, floor and f in a loop": {None},
        "isolated: reversal residual": {0},
        "exact: share of the guard used": {0.5},
        "exact: temporary bytes / (those of isolated": {1.0},
        "exact, noise of 1e-7: reversal residual": {0},
        "exact, sums in a new order: share of the guard": {0.5},
        "isolated, noise of 1e-7: failures not caught": {0},
        "f: time / its matrix products": {None},
        "f with its VJP: time / their": {None},
        "float: seconds of jax.vmap": {None},
        "exact: bytes of jax.vmap": {None},
    }.items():
        found = [line for claim, line in lines.items() if claim.startswith(begin)]
        assert {line["bound"] for line in found} == bounds, begin
    for line in lines.values():
        assert line["measured"] is not None, line
        expected = None if line["bound"] is None else line["measured"] <= line["bound"]
        assert line["holds"] is expected, line

    # Claims that no machine's load can change hold at any size.
    kept = "exact: reversal residual", "exact: bytes", "exact: other", "float: temporary"
    kept += "exact: share", "exact: temporary", "exact, ", "isolated, ", "isolated: reversal"
    for claim, line in lines.items():
        if claim.startswith(kept):
            assert line["holds"] is not False, line


@pytest.mark.slow
def test_every_method_is_measured_at_every_depth(folder):
    results = json.loads((folder / "results.json").read_text())
    rows = results["errors"]
    assert {(row["method"], row["evaluations"]) for row in rows} == {
        (method, n) for method in METHODS for n in (4, 16)
    }
    exact = [row for row in rows if row["method"] == "exact"]
    assert all(row["residual"] == 0 and row["error"] < 1e-5 for row in exact)
    assert all(row["error"] < 1e-5 for row in rows if row["method"] == "checkpointed")


@pytest.mark.slow
def test_the_tables_are_printed_and_the_plot_is_drawn(folder):
    table = (folder / "table.md").read_text()
    assert table in (folder / "said.txt").read_text()
    for begin in ("| must hold |", "| 1 - beta = 1/5 |", "| gradient error |", "| temporary MiB"):
        assert any(line.startswith(begin) for line in table.splitlines()), begin
    assert (folder / "error.png").stat().st_size > 20_000


def test_what_is_not_finite_is_no_success(module, tmp_path):
    report, plot = module("bench.fidelity.report"), module("bench.fidelity.plot")
    about = {"cell": "MLP", "dtype": "float32", "d": 5, "evaluations": 4}
    rows = [
        {
            **about,
            "method": method,
            "error": 1e-7 if method == "checkpointed" else bad,
            "residual": r,
            "guard": r,
        }
        for method, bad, r in (("exact", float("nan"), 0.0), ("checkpointed", 0.0, float("nan")))
    ]
    residual, guard, ratio = report.claims({"errors": rows})
    assert residual["holds"] is True is guard["holds"] and ratio["holds"] is False
    rows[0]["residual"] = float("nan")
    assert report.claims({"errors": rows})[0]["holds"] is False
    assert "not finite" in report.error_table(rows)
    every = [{**about, "method": method, "error": float("nan")} for method in METHODS]
    plot.plot_errors(every, "float32", tmp_path / "error.png")
    assert (tmp_path / "error.png").exists()


def test_words_of_digits(module):
    digits = module("bench.digits").digits_per_word
    assert [digits(d) for d in (2, 5, 10, -5)] == [32, 13, 9, 13]


def test_the_published_scheme_takes_the_same_steps(module):
    cells, methods, time = map(module, ("bench.blocks", "bench.gradients", "bench.fidelity.time"))
    cell = cells.make_mlp(2, 8, jax.random.key(0))
    inputs = cell.z0, cell.args, cell.cotangent
    ours = jax.jit(methods.value_and_grad("checkpointed", cell, 5, 4))(*inputs)
    theirs = jax.jit(time.published(cell, 5, 4))(*inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)

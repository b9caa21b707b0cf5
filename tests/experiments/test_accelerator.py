"""`experiments/accelerator.py`: a smoke run; programs that lower; faults are found, none lost."""

import ast
import itertools
import json
import sys
import time
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from processes import measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPT = EXPERIMENTS / "accelerator.py"
KEY = jax.random.key(0)
PLATFORMS = ["cuda", "tpu", "rocm"]
SECTIONS = ("exactness", "cost", "rules", "certificates", "training")


@pytest.mark.slow
def test_smoke(tmp_path):
    run = measured(SCRIPT, tmp_path)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert run.returncode == 0, run.stdout + run.stderr + log
    table = (tmp_path / "out" / "table.md").read_text()
    assert table in run.stdout and "A smoke run" in table and " 0 red, " in table
    report = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in report]
    rows = [line for line in lines if "verdict" in line]
    for section in ("machine", *SECTIONS):
        mine = [line for line in rows if line["section"] == section]
        assert mine and not [line for line in mine if line["verdict"] == "not reached"], section
        planned = [name for x in lines if x["section"] == section for name in x.get("plan", ())]
        assert planned == [x["done"] for x in lines if x["section"] == section and "done" in x]
    checked = [line for line in rows if line["section"] in ("exactness", "certificates")]
    assert {line["verdict"] for line in checked} == {"ok"}


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_every_program_lowers_for_accelerators(module, section):
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention in bfloat16 is not strict
        for name, (fn, inputs) in module(f"bench.accelerator.{section}").programs("smoke", KEY):
            shapes = jax.eval_shape(lambda *x: x, *inputs)
            lowered = jax.export.export(jax.jit(fn), platforms=PLATFORMS)(*shapes)
            assert lowered.platforms == tuple(PLATFORMS), name


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_nothing_is_needed_but_what_deqjax_needs():
    """And by the process that waits for the others, nothing but Python."""
    python = set(sys.stdlib_module_names)
    for path in (SCRIPT, EXPERIMENTS / "bench/accelerator/report.py"):
        found = {name.split(".")[0] for name in imported(ast.parse(path.read_text()).body)}
        assert found - python <= {"bench"}
    allowed = {*python, "deqjax", "jax", "equinox", "optax", "numpy", "jaxtyping"}
    waiting, seen = {SCRIPT, *EXPERIMENTS.glob("bench/accelerator/*.py")}, set()
    while waiting:
        seen.add(path := waiting.pop())
        for name in imported(ast.walk(ast.parse(path.read_text()))):
            inside = EXPERIMENTS / f"{name.replace('.', '/')}.py"
            assert inside.exists() or name.split(".")[0] in allowed, (path.name, name)
            waiting |= {inside} - seen if inside.exists() else set()


def test_the_cases_of_exactness_cover_all_pairs(module):
    exactness = module("bench.accelerator.exactness")
    cases = exactness.design()
    assert len(cases) == len(set(cases)) <= 36
    kinds = module("bench.accelerator.cells").FORMS
    assert [case.kind for case in cases[:6]] == list(kinds)
    assert {case[1:] for case in cases[:6]} == {("float32", 2, "arguments")}
    factors = (tuple(kinds), exactness.DTYPES, exactness.INVERSES, exactness.CONTEXTS)
    for (i, a), (j, b) in itertools.combinations(enumerate(factors), 2):
        assert {(case[i], case[j]) for case in cases} == set(itertools.product(a, b))


def test_distances(module):
    distance = module("bench.accelerator.exactness").distance
    a, b = np.ones((2, 2)), np.full((2, 2), 3.0)
    assert distance([a, b], [a, b]) == 0
    assert distance([b, a], [a, b]) > 1 and distance([b, a], [a, b], ordered=False) == 0
    assert distance([1.01 * a], [a]) == pytest.approx(0.01)
    assert distance([np.nan * a], [a]) == np.inf and distance([a], [a, b]) == np.inf
    assert distance([a], [np.nan * a]) == np.inf
    # Next to nothing beside the others: no relative error of its own.
    assert distance([a, 2e-9 * b], [a, 1e-9 * b]) < 1e-5


@pytest.mark.x64
def test_the_forms_of_a_rule_are_equal(module):
    """In float64: values and cotangents of convolutions, of group norm and of max pooling."""
    rules = module("bench.accelerator.rules")
    for rule, (forms, z, rest) in rules.forms("smoke", KEY).items():
        z, rest = jax.tree.map(lambda x: x.astype(float), (z, rest))
        found = {}
        for name, form in forms.items():
            y, pull = jax.vjp(form, z, rest)
            found[name] = jax.tree.leaves((y, pull(jnp.cos(y))))
        stock = found.pop("stock")
        assert found
        for name, ours in found.items():
            for a, b in zip(ours, stock, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=f"{rule}, {name}")


def test_false_certificates_and_functions_are_found(module, tmp_path):
    certificates = module("bench.accelerator.certificates")
    for name in ("dense, tanh", "dense, log1p", "convolution, soft_sign"):
        form = certificates.FORMS[name]
        w, x, z = certificates.problems(form, "smoke", 0)
        low, high = certificates.bracket(form, w, x, 2_000)
        assert np.all(low <= high) and np.max(high / low - 1) < 1e-10
        f = certificates.on_host(form, *(np.asarray(a, float) for a in (w, x, low)))
        np.testing.assert_allclose(f, low, rtol=1e-9)
    z, ends = 0.5 * (low + high), (low, high)
    none, axes = np.zeros(len(z)), (1, 2, 3)
    judge = lambda z, lower, upper, error: certificates.violated(z, ends, lower, upper, error)
    assert not np.any(judge(z, low, high, none + 1e-9))
    assert np.all(judge(z, 1.01 * low, 2 * high, none + 1)), "a lower end above z*"
    assert np.all(judge(z, 0.5 * low, 0.99 * high, none + 1)), "an upper end below z*"
    assert np.all(judge(1.1 * z, 0.5 * low, 2 * high, none + 0.09)) and axes
    assert np.all(judge(z, np.nan * low, high, none + 1)), "no number as an end"
    assert np.all(judge(z, low, high, none + np.nan)), "no number as an error"
    # A function that is further off than its entry.
    run = module("bench.accelerator.run").Run(tmp_path, "certificates", "smoke")
    stray = {"sqrt": (lambda x: jnp.sqrt(x) * 1.000001, np.sqrt)}
    certificates.FUNCTIONS, kept = stray, certificates.FUNCTIONS
    try:
        certificates.functions(run, ["sqrt"])
    finally:
        certificates.FUNCTIONS = kept
    (line,) = module("bench.accelerator.report").read(run.path)
    assert line["verdict"] == "red" and line["limit"] == "1"


class Processes:
    """Stands where the processes of sections do; each leaves lines, and a status or None."""

    def __init__(self, path, *behaviours):
        self.path, self.behaviours = path, list(behaviours)

    def __call__(self, names, until, limit, flags):
        lines, code = self.behaviours.pop(0)
        with self.path.open("a") as file:
            about = {"section": names[0], "at": time.time()}
            file.writelines(json.dumps(about | line) + "\n" for line in lines)
            file.write('{"section": "cut o\n')  # what a killed process leaves
        return code


def test_nothing_is_lost_with_a_process(module, tmp_path):
    """A crash is red, and the cases after it are run; what is left is named."""
    accelerator = module("accelerator")
    out = ["--out", str(tmp_path), "--sections", "machine", "rules", "training"]
    parent = accelerator.Parent(accelerator.options().parse_args(out))
    row = {"case": "a", "value": "1", "limit": "", "verdict": "ok"}
    parent.process = Processes(
        parent.path,
        ([{"plan": ["a", "b", "c"]}, {"start": "a"}, row, {"done": "a"}, {"start": "b"}], -11),
        ([{"plan": ["a", "b", "c"]}, {"start": "c"}, {"done": "c"}], 0),
        ([], 1),  # failed before it began, and is not started again
        ([{"plan": ["x", "y", "z"]}, {"start": "x"}, {"done": "x"}, {"start": "y"}], None),
    )
    parent.run()
    found = [(r["section"], r["case"], r["verdict"]) for r in parent.report()]
    assert found == [
        ("machine", "a", "ok"),
        ("machine", "b", "red"),
        ("rules", "the section", "red"),
        ("training", "y", "not reached"),
        ("training", "z", "not reached"),
    ]
    table = (tmp_path / "table.md").read_text()
    assert "2 red, 1 ok, 2 not reached" in table and "status -11" in table
    # A later run of one section keeps the others.
    again = accelerator.Parent(accelerator.options().parse_args([*out[:3], "rules"]))
    again.process = Processes(again.path, ([{"plan": []}, row], 0))
    again.run()
    assert [r["verdict"] for r in again.report() if r["section"] == "rules"] == ["ok"]
    assert len(again.report()) == 5


def test_a_case_that_fails_loses_nothing(module, tmp_path):
    run = module("bench.accelerator.run").Run(tmp_path, "rules", "smoke")
    report = module("bench.accelerator.report")

    def bad():
        raise RuntimeError("no room\nfor it")

    run.cases({"a": bad, "b": lambda: run.add("b", "1", ok=True)})
    found = report.rows(report.read(run.path), ["rules", "cost"])
    assert [(r["case"], r["value"], r["verdict"]) for r in found] == [
        ("a", "RuntimeError: no room", "red"),
        ("b", "1", "ok"),
        ("all of it", "", "not reached"),
    ]
    late = module("bench.accelerator.run").Run(tmp_path, "cost", "smoke", until=time.time() - 1)
    late.cases({"c": bad})
    assert report.rows(report.read(run.path), ["cost"])[0]["verdict"] == "not reached"

"""`experiments/throughput.py`, run as a user runs it, with --smoke; what it counts, by hand."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import measured

SCRIPT = Path(__file__).parents[2] / "experiments" / "throughput.py"
VARIANTS = ("exact", "isolated", "float", "checkpointed", "explicit", "explicit, checkpointed")


@pytest.mark.slow
def test_a_smoke_run_leaves_its_record(tmp_path):
    # Most of the time is compilation.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run = measured(SCRIPT, tmp_path, "--sections", "language", **quick)
    assert run.returncode == 0, run.stderr

    out = tmp_path / "out"
    found = json.loads((out / "results.json").read_text())
    blocks, (model,) = found["language"]["blocks"], found["language"]["models"]
    assert [(row["variant"], row["evaluations"]) for row in blocks] == [("exact", 2), ("exact", 4)]
    for row in blocks:
        assert row["floor"] == pytest.approx(row["evaluations"] * (row["f"] + row["vjp"]))
        assert row["units"] == 4 and row["seconds"] > 0  # one sequence of four tokens
    assert model["seconds"] > 0 and model["bytes"] > 0
    lines = {line["claim"]: line for line in found["claims"]}
    timed = lines["language: exact state, time / floor, worst of 1 batches"]
    assert timed["measured"] == pytest.approx(blocks[0]["seconds"] / blocks[0]["floor"])
    assert timed["bound"] == 1.15 and timed["holds"] is (timed["measured"] <= 1.15)
    said = "language: exact state, the same without the digits, worst scale"
    assert lines[said]["holds"] is True

    table = (out / "table.md").read_text()
    assert table in run.stdout and "On a GPU: not measured." in table.splitlines()[0]
    assert (out / "throughput.png").stat().st_size > 10_000


def test_the_floor(module):
    time = module("bench.throughput.time")
    # f takes 2 s and f with its VJP 7 s.
    floors = {variant: time.floor(variant, 8, 2.0, 7.0) for variant in VARIANTS}
    assert list(floors.values()) == [8 * 9, 8 * 11, 8 * 9, 8 * 11, 8 * 7, 8 * 9]
    flop = {variant: time.needed_flop(variant, 2, 1.0) for variant in VARIANTS}
    assert list(flop.values()) == [2 * 4, 2 * 5, 2 * 4, 2 * 5, 2 * 3, 2 * 4]


def row(**changes):
    common = {"dtype": "float32", "batch": 4, "evaluations": 8, "variant": "exact"}
    times = {"seconds": 2.0, "floor": 1.0, "floor in a loop": None, "f": 0.1, "vjp": 0.2}
    sizes = {"bytes": 100, "digits": 0, "flop": 10.0, "rate": 10.0, "units": 4, "scale": "a"}
    return {**common, **times, **sizes, **changes}


def test_scales_are_added_up_and_one_that_does_not_fit_is_no_success(module):
    report = module("bench.throughput.report")
    other = row(scale="b", seconds=0.4, floor=1.0, bytes=300, flop=14.0)
    (total,) = report.totals([row(), other])
    assert (total["seconds"], total["floor"], total["bytes"]) == (2.4, 2.0, 300)
    assert report.ratio(total) == 1.2 and report.share(total) == "100%"

    deep = row(evaluations=32, bytes=108, digits=8)
    blocks = [row(), deep, row(variant="float", seconds=None)]
    results = {"machine": "m", "multiscale": {"blocks": blocks, "models": []}}
    about = {"evaluations": 8, "size": "s", "unit": "images"}
    for platform, bound, holds in (("cpu", 1.15, False), ("gpu", None, None)):
        results["multiscale"] |= {**about, "platform": platform}
        results["claims"] = report.claims(results)
        lines = {line["claim"].split(": ")[1]: line for line in results["claims"]}
        timed = lines["exact state, time / floor, worst of 1 batches"]
        assert (timed["measured"], timed["bound"], timed["holds"]) == (2.0, bound, holds)
        assert lines["float state, time / floor, worst of 1 batches"]["measured"] is None
        assert lines["exact state, temporary bytes at 32 / at 8"]["measured"] == 1.08
        assert lines["exact state, the same without the digits, worst scale"]["measured"] == 1.0
    table = report.tables(results)
    assert "does not fit" in table and "not measured" in table


def shaped(size, batch):
    """The cells without their values: nothing is computed, and the paper's size costs nothing."""
    made = []

    def build():
        made.extend(size.cells(batch, "float32", jax.random.key(0)))
        return [{"z0": c.z0, "args": c.args, "cotangent": c.cotangent} for c in made]

    shapes = jax.eval_shape(build)
    return [cell._replace(**arrays) for cell, arrays in zip(made, shapes, strict=True)]


@pytest.mark.parametrize("name", ["language", "multiscale"])
def test_the_products_of_the_papers_blocks_are_counted(module, name):
    throughput, time = module("throughput"), module("bench.pieces")
    size = throughput.SIZES[name, "full"]
    # The last scales of four have images of 8 and 4 pixels a side, with a good part of zeros.
    for cell, flop in list(zip(shaped(size, 2), size.flop(2), strict=True))[:2]:
        for piece, times in (("f", 1), ("vjp", 3)):
            fn, *inputs = time.pieces(cell, 1)[piece]
            # As sums: minimal filtering forms half of the products.
            with jax.default_matmul_precision("highest"):
                lowered = jax.jit(fn).lower(*jax.eval_shape(lambda x: x, inputs))
            found = lowered.cost_analysis()["flops"]
            # XLA counts what is not a product too, and not the zeros around an image.
            assert 0.9 < found / (times * flop) < 1.1, (cell.name, piece)


def test_memory_is_flat_in_depth(module):
    blocks, time = module("bench.throughput.blocks"), module("bench.throughput.time")
    memory = module("bench.fidelity.memory")
    size = blocks.Images((8,), (1,), 8)
    (cell,) = shaped(size, 8)
    for variant, guard in (("exact", 1), ("isolated", 0)):
        sizes = [time.written(cell, variant, 5, n) // cell.z0.size for n in (4, 13, 14, 32)]
        assert sizes == [4 + 4 * guard, 4 + 13 * guard, 8 + 14 * guard, 12 + 32 * guard]

    def kept(n):
        fn, *inputs = time.gradient_program(cell, "exact", n, size.d)
        return memory.temporary_bytes(memory.compiled(fn, *inputs))

    few, many = (kept(n) - time.written(cell, "exact", size.d, n) for n in (4, 32))
    assert many < 1.02 * few


def test_an_explicit_model_has_parameters_of_its_own_for_each_block(module):
    blocks = module("bench.throughput.blocks")
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    for size in (blocks.Language(16, 2, (16,), 4, 32), blocks.Images((8,), (1,), 4)):
        (cell,), counts = shaped(size, 2), {}
        for variant in ("exact", "explicit, checkpointed"):

            def build(size=size, variant=variant):
                fn, params, *inputs = size.model(variant, 3, 2, "float32", jax.random.key(0))
                return params, fn(params, *inputs)

            params, (loss, gradient) = jax.eval_shape(build)
            assert loss.shape == ()
            assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, gradient)
            counts[variant] = count(params)
        more = counts["explicit, checkpointed"] - counts["exact"]
        assert more == 2 * count(cell.args[0]) > 0


def test_an_explicit_stack_keeps_every_block_and_checkpointing_changes_no_number(module):
    cells, time = module("bench.blocks"), module("bench.throughput.time")
    memory = module("bench.fidelity.memory")
    cell = cells.make_mlp(8, 8, jax.random.key(0))
    found, sizes = [], []
    for variant, n in (("explicit", 6), ("explicit", 2), ("explicit, checkpointed", 2)):
        fn, *inputs = time.gradient_program(cell, variant, n, 2)
        program = memory.compiled(fn, *inputs)
        sizes.append(memory.temporary_bytes(program))
        found.append(program(*inputs))
    assert sizes[0] > 2 * sizes[1]
    for a, b in zip(*map(jax.tree.leaves, found[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_state_out_of_range_is_no_measurement(module):
    time = module("bench.throughput.time")
    programs = time.Programs("float32")
    programs.add("bad", lambda x: x / 0, np.float32(0))
    with pytest.raises(SystemExit, match="Expected a finite gradient of bad, got NaN"):
        programs.check("bad")

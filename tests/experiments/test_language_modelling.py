"""`experiments/language_modelling.py`, run as a user runs it, with --smoke."""

import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from processes import runner

import deqjax

from text.config import choose
from text.language import _losses, deeper, make_evaluate, make_loss, make_model
from text.options import Config
from training.devices import mesh

SCRIPT = Path(__file__).parents[2] / "experiments" / "language_modelling.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script in a folder, on so many simulated devices."""
    cache = tmp_path_factory.mktemp("compiled")
    return partial(runner(SCRIPT, cache), XDG_CACHE_HOME=str(cache))


@pytest.fixture(scope="module")
def default(run, tmp_path_factory):
    """The folder and the output of a run without options."""
    folder = tmp_path_factory.mktemp("default")
    process = run(folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_without_options_a_revdeq_is_compared_with_its_block(default):
    folder, output = default
    rows = [re.split(r" {2,}", x) for x in output.splitlines() if x.endswith("smoke/")]
    assert [row[0] for row in rows] == ["RevDEQ, 2 steps", "explicit, 1 block"]
    assert rows[0][1] == rows[1][1]  # as many parameters
    assert "pydoc" in output and "tokens (bytes)" in output and "words of validation" in output
    words = int(re.search(r"([\d,]+) words of", output)[1].replace(",", ""))
    tokens = int(re.search(r"and ([\d,]+) tokens", output)[1].replace(",", ""))
    for row in rows:
        path = folder / row[-1]
        assert {"config.json", "metrics.jsonl", "sample.txt", "curves.png"} <= {
            x.name for x in path.iterdir()
        }
        last = lines(path)[-1]
        assert last["step"] == 12 and f"{last['eval_loss']:.4f}" == row[2]
        assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
        # All tokens but the first are predicted, and shared out over the words.
        nats = last["eval_loss"] * (tokens - 1)
        assert math.log(last["eval_word_perplexity"]) == pytest.approx(nats / words)
        steps = [line for line in lines(path) if "loss" in line]
        assert len(steps) == 12 and steps[-1]["loss"] < steps[0]["loss"]
        peaks = [line.get("state_peak") for line in steps]
        assert all(0 < x < 2**11 / 50 for x in peaks) if "RevDEQ" in row[0] else not any(peaks)
        assert all(line["tokens_per_second"] > 0 for line in steps)


@pytest.mark.slow
def test_words_of_wikitext_in_parts_on_eight_devices(run, tmp_path):
    """Published tokens, a batch taken in two parts, split over devices: what one device has."""
    text = " the cat sat on the mat . \n = Heading = \n the dog sat . \n" * 60
    for split in ("train", "valid"):
        (tmp_path / f"wiki.{split}.tokens").write_text(text)
    options = ("--corpus", "wikitext-2", "--data-dir", ".", "--model", "reversible", "--steps", "4")
    losses = []
    for devices, more in ((1, ()), (8, ("--batch-size", "16", "--accumulate", "2"))):
        options_here = (*options, *(more or ("--batch-size", "16")), "--name", f"on-{devices}")
        process = run(tmp_path, *options_here, devices=devices)
        assert process.returncode == 0, process.stderr
        assert "(10 words)" in process.stdout
        folder = tmp_path / "runs" / f"on-{devices}"
        losses.append([line["loss"] for line in lines(folder) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_resuming_is_bit_for_bit_and_of_the_same_text(run, default, tmp_path):
    straight = default[0] / "runs" / "pydoc-explicit-0-smoke"
    options = ("--model", "explicit", "--stop-after", "5", "--checkpoint-every", "2")
    assert run(tmp_path, *options).returncode == 0
    resumed = run(tmp_path, "--model", "explicit", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    here = tmp_path / "runs" / straight.name
    rate = {"tokens_per_second"}
    strip = lambda path: [{k: v for k, v in x.items() if k not in rate} for x in lines(path)]
    assert strip(here) == strip(straight)
    assert (here / "sample.txt").read_text() == (straight / "sample.txt").read_text()

    record = json.loads((here / "config.json").read_text())
    record["config"]["text"] = "another"
    (here / "config.json").write_text(json.dumps(record))
    refused = run(tmp_path, "--model", "explicit", "--resume")
    assert refused.returncode != 0 and "text was 'another'" in refused.stderr


@pytest.mark.parametrize(("options", "words"), [
    (dict(steps=3, epochs=1.0), "Expected either --epochs or --steps"),
    (dict(learning_rate=0.0), "Expected --learning-rate above 0"),
    (dict(temperature=-1.0), "Expected --temperature of at least 0"),
    (dict(model="explicit", beta=0.8), "Expected no --beta"),
    (dict(model="explicit", retention="learned"), "Expected no --retention"),
    (dict(model="reversible", last=9), "Expected --last of at most the 6 --max-steps"),
    (dict(retention="learned", beta=1.25), "Expected --beta between 0 and 1"),
    (dict(log_every=0), "Expected --log-every of at least 1"),
    (dict(name="../there"), "Expected a --name that is that of a folder"),
    (dict(resume=True, name="never"), "--resume expected a run in one of"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(words)):
        choose(Config(**options))


def test_the_papers_preset_and_ways_of_computing():
    """Every option reaches the network that is made of it."""
    (config,) = choose(Config(preset="paper", model="reversible", dtype="bfloat16", exact=False))
    model = eqx.filter_eval_shape(lambda key: make_model(config, 50_304, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model) if hasattr(x, "size")) == 94_137_600
    assert not model.deq.solver.exact and model.deq.cell.compute_dtype == jnp.bfloat16
    (config,) = choose(Config(model="explicit-deep", max_steps=3, rotary=True, tied=True))
    model = eqx.filter_eval_shape(lambda key: make_model(config, 10, key), jax.random.key(0))
    assert len(model.blocks) == 3 and model.vocabulary.head is None
    (config,) = choose(Config(model="reversible", retention="learned", beta=0.8, last=2))
    model = make_model(config, 10, jax.random.key(0))
    beta = paramax.unwrap(model.deq.solver).beta
    assert beta.shape == (config.width,) and jnp.allclose(beta, 0.8)
    assert model.deq.adjoint == deqjax.ReversibleAdjoint(last=2)
    assert model.vocabulary.positions is None


def test_a_drawn_depth_is_one_program_and_evaluated_by_the_same_steps():
    """The loss of a step is that of a model of so many steps; the ceiling is one and a half."""
    corpus = SimpleNamespace(valid=np.arange(60, dtype=np.uint8) % 10, valid_words=7)
    (config,) = choose(Config(model="reversible", random_depth=True, smoke=True, max_steps=4))
    model = make_model(config, 10, jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch, replicated = mesh()
    tokens = jnp.asarray(corpus.valid[: 8 * 6].reshape(8, 6), jnp.int32)
    loss = jax.jit(make_loss(static, config, batch))
    losses = [loss(params, None, jax.random.key(i), tokens)[0] for i in range(12)]
    depths = [
        float(loss(params, None, jax.random.key(i), tokens)[1][1]["evaluations"]) for i in range(12)
    ]
    assert {n - 1 for n in depths} == {2, 3, 4, 5, 6}
    fixed = [np.mean(_losses(deeper(model, int(n) - 1), tokens)[0]) for n in depths]
    np.testing.assert_allclose(losses, fixed, rtol=1e-5)
    evaluate = make_evaluate(static, corpus, config, batch, replicated)
    state = SimpleNamespace(params=params)
    assert (
        evaluate(state)["eval_loss"]
        == evaluate(state, 4)["eval_loss"]
        != evaluate(state, 2)["eval_loss"]
    )


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(run, tmp_path):
    process = run(tmp_path, "--batch-size", "12", devices=8)
    said = " ".join(process.stderr.split())
    assert process.returncode != 0 and "Expected a batch size that divides by the 8 devices" in said
    assert not (tmp_path / "runs").exists()

"""`experiments/language_modelling.py`, run as a user runs it, with --smoke."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "language_modelling.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script in a folder, on so many simulated devices."""
    cache = tmp_path_factory.mktemp("compiled")

    def run(folder, *options, devices=1):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # most of the time is compilation
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "XDG_CACHE_HOME": str(cache),
        }
        command = [sys.executable, str(SCRIPT), "--smoke", *options]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def default(run, tmp_path_factory):
    """The folder and the output of a run without options."""
    folder = tmp_path_factory.mktemp("default")
    process = run(folder)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
        assert ("state_headroom" in steps[0]) == row[0].startswith("RevDEQ")
        assert all(line["tokens_per_second"] > 0 for line in steps)


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
        folder = tmp_path / "runs" / f"on-{devices}-reversible-0-smoke"
        losses.append([line["loss"] for line in lines(folder) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_what_does_not_fit_is_refused(run, tmp_path):
    for options, words in (
        (("--batch-size", "12"), "Expected a batch size that divides by the 8 devices"),
        (("--steps", "3", "--epochs", "1"), "Expected either --epochs or --steps"),
        (("--learning-rate", "0"), "Expected --learning-rate above 0"),
    ):
        process = run(tmp_path, *options, devices=8)
        assert process.returncode != 0 and words in " ".join(process.stderr.split())
        assert not (tmp_path / "runs").exists()

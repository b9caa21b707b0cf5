"""The options of the scripts: read before the imports, numbers in their ranges, else refused."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import image_classification
import language_modelling
import numpy as np
import pytest
import tyro

from images import config as _config, data as _data
from text import config as _language_config
from text.corpus import Corpus
from text.tokenizers import Bytes
from training.flags import Only, Range, check, notes_of

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SCRIPTS = sorted(path.stem for path in EXPERIMENTS.glob("[a-z]*.py"))
# It reads its options by argparse: where it runs there may be no tyro.
PLAIN = "accelerator"
TRAINING = {"image_classification": _config, "language_modelling": _language_config}
# After the flags are read.
SLOW = (
    "jax",
    "deqjax",
    "equinox",
    "sklearn",
    "orbax",
    "matplotlib",
    "tensorflow_datasets",
    "scipy",
)


def options_of(script):
    """The dataclass of a script's options; a measuring script is read, and not run."""
    if script in TRAINING:
        return TRAINING[script].Config
    spec = importlib.util.spec_from_file_location(script, EXPERIMENTS / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


def numbers_in(hint):
    """Whether a number may be given, and the ranges of an annotation."""
    if hint in (int, float):
        return True
    return any(map(numbers_in, typing.get_args(hint))) and typing.get_origin(hint) != typing.Literal


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != PLAIN])
def test_every_number_has_a_range_and_its_default_is_in_it(script):
    kind = options_of(script)
    hints, notes = typing.get_type_hints(kind), notes_of(kind)
    numeric = [name for name, hint in hints.items() if numbers_in(hint)]
    assert "seed" in numeric
    for name in numeric:
        assert any(isinstance(note, Range) for note in notes[name]), name
    check(kind())
    for name, conditions in notes.items():
        for note in conditions:
            assert not isinstance(note, Only) or note.option in hints, name


IMAGES = [
    ("--clip -1", "Expected --clip above 0, got -1.0"),
    ("--clip 0", "Expected --clip above 0, got 0.0"),
    ("--clip inf", "Expected --clip of at most 3e+38, got inf"),
    ("--weight-decay -5", "Expected --weight-decay of at least 0"),
    ("--epsilon -1", "Expected --epsilon above 0"),
    ("--schedule milestone --milestone 2", "Expected --milestone of at most 1, got 2.0"),
    ("--milestone 0.5", "Expected no --milestone beside --schedule cosine"),
    ("--shift -1", "Expected --shift of at least 0"),
    ("--tolerance nan", "Expected --tolerance of at least 0, got nan"),
    ("--tolerance -1", "Expected --tolerance of at least 0"),
    ("--gradient-tolerance nan", "Expected --gradient-tolerance above 0, got nan"),
    ("--gradient-tolerance 0", "Expected --gradient-tolerance above 0, got 0.0"),
    ("--beta 1", "Expected --beta other than 0, 1, 2, got 1.0"),
    ("--beta 2.5", "Expected --beta of at most 2"),
    ("--max-steps 0", "Expected --max-steps of at least 1"),
    ("--seed -1", "Expected --seed of at least 0"),
    ("--seed 100000000000000000000", "Expected --seed of at most 4,294,967,295"),
    ("--stop-after 0", "Expected --stop-after of at least 1"),
    ("--accumulate 0", "Expected --accumulate of at least 1"),
    (f"--name {'n' * 300}", "Expected a --name that is that of a folder, at most 240 bytes"),
    ("--name a\nb", "Expected a --name that is that of a folder, at most 240 bytes on one line"),
    ("--model resnet --name ", "Expected a --name"),
    ("--model pc-linear --features", "Expected at least one value of --features"),
    ("--model pc-single --features 8 16", "Expected one number of --features for pc-single"),
    ("--kind 1 --model implicit-resnet", "Expected no --kind beside --model implicit-resnet"),
    ("--activation tanh --model resnet", "Expected no --activation beside --model resnet"),
    ("--beta 0.5 --preset mnist-softsign-short", "Expected no --beta beside --model pc-linear"),
    ("--tolerance 0.1 --model resnet", "Expected no --tolerance beside --model resnet"),
    ("--max-steps 5 --model resnet", "Expected no --max-steps beside --model resnet"),
    ("--widths 1 --model pc-multi", "Expected no --widths beside --model pc-multi"),
]
LANGUAGE = [
    ("--clip 0", "Expected --clip above 0"),
    ("--warmup -1", "Expected --warmup of at least 0"),
    ("--temperature nan", "Expected --temperature of at least 0, got nan"),
    ("--epochs 0", "Expected --epochs above 0"),
    ("--hidden 8 0", "Expected --hidden of at least 1, got 0"),
    ("--vocabulary 256 --tokenizer bpe", "Expected --vocabulary of at least 257"),
    ("--vocabulary 512", "Expected no --vocabulary beside --tokenizer bytes"),
    ("--fraction-bits 31", "Expected --fraction-bits of at most 30"),
    ("--fraction-bits 16 --no-exact", "Expected no --fraction-bits beside --exact False"),
    ("--no-exact --model explicit", "Expected no --no-exact beside --model explicit"),
    ("--max-steps 2 --model explicit", "Expected no --max-steps beside --model explicit"),
]


@pytest.mark.parametrize(
    ("config", "line", "said"),
    [(_config, *x) for x in IMAGES] + [(_language_config, *x) for x in LANGUAGE],
)
def test_a_bad_option_is_refused_in_a_sentence(config, line, said, tmp_path, monkeypatch):
    """And none of these is anything but a SystemExit, before a folder is made."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        config.choose(tyro.cli(config.Config, args=line.split(" ")))
    assert said in str(refused.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(model="implicit-resnet", beta=0.7), r"beta=0.7; the nearest are 2/3 .* and 3/4"),
        (
            dict(model="resnet", shift=8),
            "--shift below the 8 pixels of a side of the images, got 8",
        ),
        (dict(model="resnet", batch_size=12), "divides by the 8 devices"),
    ],
)
def test_what_only_data_and_network_can_tell_is_refused_before_a_folder_is_made(
    given, said, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (config,) = _config.choose(_config.Config(**given))
    data = _data.load("digits", data_dir=None, download=False, limit=96)
    with pytest.raises(SystemExit, match=said):
        image_classification.train(config, data)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("given", "said"), [(dict(beta=0.7), "beta=0.7"), (dict(heads=3), "heads to divide width")]
)
def test_and_of_text(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = _language_config.Config(model="reversible", width=16, length=8, **given)
    (config,) = _language_config.choose(options)
    corpus = Corpus("a", Bytes(), np.zeros(1000, np.uint8), np.zeros(100, np.uint8), 1, "b")
    with pytest.raises(SystemExit, match=said):
        language_modelling.train(config, corpus)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("script", "given", "said"),
    [
        ("compare_solvers", {"tol": 0.0}, "--tol above 0"),
        ("compare_adjoints", {"rhos": (0.5, 1.0)}, "--rhos other than 1"),
        ("gradient_fidelity", {"evaluations": 7}, "--evaluations that is a multiple of 2, got 7"),
        ("gradient_fidelity", {"inverses": (5, 1)}, "--inverses other than -1, 0, 1, got 1"),
        ("throughput", {"batches": (0,)}, "--batches of at least 1"),
        ("certificates", {"problems": -1}, "--problems of at least 1"),
    ],
)
def test_the_measuring_scripts_have_ranges_too(script, given, said):
    with pytest.raises(SystemExit, match=f"Expected {said}"):
        check(dataclasses.replace(options_of(script)(), **given))


RUN = """
import json, runpy, sys
sys.argv[:] = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(json.dumps([str(end.code), sorted({name.split(".")[0] for name in sys.modules})]))
"""


def outcome(script, *options, **variables):
    """The exit code or sentence of a script, the packages that it had imported, its process."""
    command = [sys.executable, "-c", RUN, str(EXPERIMENTS / f"{script}.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(EXPERIMENTS)} | variables
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "Traceback" not in process.stderr, process.stderr
    return *json.loads(process.stdout.splitlines()[-1]), process


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_typos_are_answered_before_what_is_slow_to_import(script):
    code, modules, process = outcome(script, "--sed", "1")
    said = "unrecognized arguments: --sed" if script == PLAIN else "Unrecognized options: --sed"
    assert code == "2" and said in process.stderr
    assert not {*SLOW} & {*modules}


@pytest.mark.parametrize(
    "arguments",
    ["--minutes -1", "--minutes inf", "--minutes nan", "--seed -1", "--seed 4294967296"],
)
def test_ranges_without_tyro(arguments):
    code, _, process = outcome(PLAIN, *arguments.split())
    assert code == "2" and f"expected {arguments.split()[0]} from" in process.stderr


def test_without_the_extra_the_sentence_is_that_of_the_extra(tmp_path):
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError('no', name='tyro')\n")
    path = os.pathsep.join([str(tmp_path), str(EXPERIMENTS)])
    code, _, _ = outcome("throughput", "--help", PYTHONPATH=path)
    assert "expected the package 'tyro'" in code and "pip install -e '.[experiments]'" in code

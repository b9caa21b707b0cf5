"""The presets of `experiments/image_classification.py`, resolved as its options are."""

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import equinox as eqx
import jax
import pytest
import tyro

from deqjax.positive import qualify

from images.config import choose
from images.models import ACTIVATIONS, constructor
from images.options import KINDS, Config, Preset
from images.presets import PRESETS, changes, family
from text.config import choose as choose_language
from text.options import Config as LanguageConfig
from text.presets import CORPORA, PAPER as PAPER_LANGUAGE
from training.options import Session, recorded

SCRIPT = Path(__file__).parents[2] / "experiments" / "image_classification.py"

# From the README of the paper's authors: data, model, kind, learning rate, epochs, weight decay,
# milestone; from their networks: the widths.
PAPER = {
    "mnist-multi-softsign": ("mnist", "pc-multi", 1, 5e-4, 40, 1.5e-2, 30, (12, 24, 48)),
    "svhn-single-sigmoid": ("svhn_cropped", "pc-single", 2, 5e-4, 80, 2e-2, 70, (125,)),
    "cifar10-multi-relu6-augmented": (
        *("cifar10", "pc-multi", 1, 5e-4, 120, 2e-2, 100),
        (100, 120, 140),
    ),
}


def options(*args):
    (config,) = choose(tyro.cli(Config, args=args))
    return config


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    config = options("--preset", name)
    assert config.epochs and config.milestone and config.schedule == "milestone"
    fall = round(config.epochs * config.milestone, 6)
    found = (config.dataset, config.model, config.kind, config.learning_rate, config.epochs)
    assert (*found, config.weight_decay, fall, config.features) == PAPER[name]
    assert config.batch_size == 64 and config.activation in name


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("mnist-linear-softsign", (80,)),
        ("mnist-single-softsign", (82,)),
        ("svhn-multi-sigmoid", (20, 50, 80)),
        ("cifar10-single-relu6", (125,)),
        ("cifar10-multi-relu6", (20, 50, 80)),
    ],
)
def test_the_papers_other_networks(name, features):
    assert options("--preset", name).features == features


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole(name):
    config = options("--preset", name)
    assert config.name == f"{name}-0" and None not in (config.shift, config.max_steps)
    # One of the pcDEQ paper's settings moves and mirrors images as its authors' code does, and all
    # of the RevDEQ paper's.
    augmented = (config.shift, config.mirror) == (4, True)
    assert augmented == (name.endswith("augmented") or "revdeq" in name)
    if "short" not in name and not augmented:
        assert (config.shift, config.mirror) == (0, False)


# Found by the network, the data set or the name of a run; or None is a value: all steps.
OPEN = {"preset", "kind", "mirror", "name", "steps", "epochs", "last"}
SESSION = {field.name for field in dataclasses.fields(Session)} | {"cache_dir", "model"}


def test_presets_are_complete_configurations():
    """Each is of its family but for what its name asks for, and an option given comes before it."""
    assert set(PRESETS) == set(typing.get_args(Preset))
    for name, config in PRESETS.items():
        left = {k for k, v in dataclasses.asdict(config).items() if v is None}
        concave = config.model.startswith("pc-")
        assert left - OPEN - SESSION <= ({"widths"} if concave else set()), name
        assert (
            dataclasses.replace(family(config.model, config.dataset), **changes(config)) == config
        )
    for config in (*CORPORA.values(), *PAPER_LANGUAGE.values()):
        left = {k for k, v in dataclasses.asdict(config).items() if v is None}
        assert left <= OPEN | SESSION and config.epochs


def test_the_reversible_papers_numbers():
    config = options("--preset", "cifar10-revdeq")
    assert (config.features, config.widths) == ((128, 256, 256, 128), (1, 3, 3, 1))
    assert (config.max_steps, config.beta, config.batch_size) == (8, 0.8, 64)
    assert (config.dataset, config.learning_rate) == ("cifar10", 3e-4)
    assert (config.schedule, config.label_smoothing) == ("one-cycle", 0.1)


@pytest.mark.parametrize("model", ["resnet", "resnet-multiscale"])
def test_the_baselines_have_the_parameters_of_the_implicit_networks(model):
    def shapes(model):
        config = options("--model", model)
        make = constructor(
            model,
            **{name: getattr(config, name) for name in ("features", "widths", "dtype", "beta")},
            max_steps=config.max_steps,
            tolerance=config.tolerance,
            gradient_tolerance=config.gradient_tolerance,
            activation=config.activation,
        )
        build = lambda key: eqx.nn.delete_init_state(make((8, 8, 1), 10, key=key))
        leaves = jax.tree.leaves(eqx.filter_eval_shape(build, jax.random.key(0)))
        return [x.shape for x in leaves if isinstance(x, jax.ShapeDtypeStruct)]

    assert shapes(model) == shapes(f"implicit-{model}")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--model", "resnet", "--features", "8", "16"), "as many --widths as --features"),
        (("--model", "pc-single", "--dtype", "bfloat16"), "no --dtype beside --model pc-single"),
        (("--model", "resnet", "--label-smoothing", "1"), "--label-smoothing other than 1, got 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(args, said):
    with pytest.raises(SystemExit, match=said):
        options(*args)


def test_options_given_come_before_the_preset():
    config = options("--preset", "mnist-multi-softsign", "--epochs", "8", "--learning-rate", "1")
    assert (config.epochs, config.learning_rate, config.weight_decay) == (8, 1.0, 1.5e-2)
    assert config.milestone == 0.75  # of 8 epochs now
    config = options("--preset", "mnist-multi-softsign", "--activation", "sigmoid")
    assert (config.kind, config.activation) == (2, "sigmoid")
    config = options("--preset", "mnist-multi-softsign", "--kind", "2", "--dataset", "digits")
    assert (config.kind, config.activation, config.dataset) == (2, "sigmoid", "digits")
    assert options("--preset", "cifar10-multi-relu6", "--mirror", "True").mirror is True


def test_without_a_preset_the_defaults_hold():
    four = choose(Config())
    assert [(c.model, c.kind, c.dataset) for c in four] == [
        ("implicit-resnet", 1, "digits"),
        ("pc-linear", 1, "digits"),
        ("pc-linear", 2, "digits"),
        ("resnet", 1, "digits"),
    ]
    assert all((c.schedule, c.weight_decay, c.shift) == ("cosine", 1e-2, 1) for c in four)
    several = options("--model", "resnet-multiscale")
    assert (several.dataset, several.schedule, several.shift) == ("digits", "one-cycle", 1)
    names = [config.name for config in choose(Config(name="mine"))]
    assert names[1] == "mine-digits-pc-linear-kind1-0"


def test_of_several_models_each_has_the_options_it_reads():
    given = Config(beta=0.5, tolerance=1e-3, max_steps=9)
    assert [(c.beta, c.tolerance, c.max_steps) for c in choose(given)] == [
        (0.5, 1e-4, 9),
        (0.8, 1e-3, 9),
        (0.8, 1e-3, 9),
        (0.8, 1e-4, 1),
    ]
    for given in (Config(kind=2), Config(activation="sigmoid")):
        found = [(c.model, c.kind, c.activation) for c in choose(given)]
        assert found[1] == ("pc-linear", 2, "sigmoid") and len(found) == 3
    assert [c.beta for c in choose_language(LanguageConfig(beta=0.8))] == [0.8, 0.5]


def test_activations_are_of_the_kind_that_the_library_says():
    assert {name: qualify(fn).kind for name, fn in ACTIVATIONS.items()} == KINDS


def test_what_changes_the_result_is_recorded():
    names = recorded(Config()).keys()
    assert not {"keep", "assess_every", "distributed", "coordinator", "processes", "name"} & names
    assert {"accumulate", "batch_size", "seed"} < names
    assert not {"keep", "cache_dir", "sample"} & recorded(LanguageConfig()).keys()


@pytest.mark.parametrize("option", ["--keep", "--accumulate", "--assess-every"])
def test_counts_are_positive(option):
    options("--model", "resnet", option, "3")
    with pytest.raises(SystemExit, match=f"Expected {option} of at least 1, got 0"):
        options("--model", "resnet", option, "0")


def test_an_unknown_preset_is_refused():
    command = [sys.executable, str(SCRIPT), "--preset", "mnist-multi-relu"]
    process = subprocess.run(command, capture_output=True, text=True)
    said = " ".join(process.stderr.split())
    assert process.returncode != 0
    assert "invalid choice 'mnist-multi-relu'" in said and "mnist-multi-softsign" in said

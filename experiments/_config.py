"""All options of `image_classification.py`, and the presets that fill in what is left out."""

import dataclasses
from typing import Any, Literal

from _models import ACTIVATIONS

from deqjax.positive import qualify

Model = Literal["implicit-resnet", "pc-linear", "pc-single", "pc-multi", "resnet"]
Preset = Literal[
    "mnist-linear-softsign",
    "mnist-single-softsign",
    "mnist-multi-softsign",
    "svhn-single-sigmoid",
    "svhn-multi-sigmoid",
    "cifar10-single-relu6",
    "cifar10-multi-relu6",
    "cifar10-multi-relu6-augmented",
    "mnist-softsign-short",
    "mnist-sigmoid-short",
    "cifar10-softsign-short",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Train implicit models on images. What is left at None: the preset's, else the defaults."""

    preset: Preset | None = None
    """Options by one name: those of the pcDEQ paper, or ours for two cores (-short)."""
    dataset: Literal["digits", "mnist", "cifar10", "svhn_cropped"] | None = None
    """None: digits."""
    model: Model | None = None
    """None: a RevDEQ, a pcDEQ of each kind, and the explicit network."""
    kind: Literal[1, 2] | None = None
    """Of a pcDEQ: 1 has strictly positive input and tanh, 2 nonnegative input and sigmoid."""
    activation: Literal["tanh", "softsign", "relu6", "sigmoid"] | None = None
    """Of a pcDEQ; None: that of its kind. softsign and relu6 are of kind 1."""
    features: tuple[int, ...] | None = None
    """Features of each solve: channels of a convolution, units of pc-linear."""

    max_steps: int | None = None
    """Ceiling on solver steps, one evaluation of f each; implicit-resnet takes just so many."""
    tolerance: float = 1e-4
    """Of pcDEQ solves, relative: a tenth of it changes no accuracy and costs more steps."""
    gradient_tolerance: float = 1e-2
    """Of pcDEQ backward solves, relative: little beside the noise of a batch of 64."""
    certify_tolerance: float = 1e-6
    """Of the solves that are enclosed to certify predictions, which go on from the model's own.
    Below, the enclosures are as wide as the rounding of float32 makes them."""
    beta: float = 0.8
    """Relaxation of the reversible solver, the paper's; 1 - beta is 1/d or -1/d, d an integer."""

    seed: int = 0
    """Of parameters, order of the data and augmentation; the digits' split is always the same."""
    epochs: int | None = None
    """Passes over the training split."""
    batch_size: int = 64
    """Images a step, over all devices: the papers'."""
    learning_rate: float | None = None
    """Peak of AdamW's."""
    schedule: Literal["cosine", "milestone"] | None = None
    """cosine: to 0 at the last step; milestone: x0.1 at one moment, the pcDEQ paper's."""
    milestone: float | None = None
    """The share of the epochs after which that moment is."""
    weight_decay: float | None = None
    """AdamW's: a step shrinks parameters by learning rate x this; the pcDEQ paper's order."""
    epsilon: float = 1e-6
    """AdamW's. At 1e-8 gradients of pure rounding (of a bias that batch normalisation takes out
    again) become full steps, and the loss depends on the number of devices from the second on."""
    clip: float = 1.0
    """Ceiling on the gradient's norm: met in the first steps only."""
    shift: int | None = None
    """Pixels that training images move at most, at random, in each direction."""
    mirror: bool | None = None
    """Mirror training images at random; None: where a mirrored image keeps its class."""

    accumulate: int = 1
    """Parts a batch is taken in, one after another; batch normalisations see one at a time."""
    distributed: bool = False
    """One of several processes, each started with this; JAX finds the others on TPU pods, SLURM."""
    coordinator: str | None = None
    """Where JAX does not find them: host:port of process 0."""
    processes: int | None = None
    """Likewise: how many there are."""
    process_id: int | None = None
    """Likewise: which this one is, from 0."""

    log_every: int = 20
    """Steps between readings of the metrics, which make the host wait for the device."""
    checkpoint_every: int = 500
    """Steps: at most a few minutes of work to lose."""
    keep: int = 2
    """Checkpoints, the last ones; the best is kept beside them."""
    assess_every: int | None = None
    """Steps between evaluations; None: an epoch."""
    stop_after: int | None = None
    """Steps after which to stop with a checkpoint, for machines lent by the hour."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name."""
    name: str | None = None
    """Of the folder in runs/; None: preset or dataset and model, and seed."""
    data_dir: str | None = None
    """Of TensorFlow Datasets; None: TFDS_DATA_DIR, else TFDS's own place."""
    download: bool = False
    """Let TensorFlow Datasets download and prepare (needs tensorflow)."""
    smoke: bool = False
    """A tiny network, data set and number of steps: everything is run through in seconds."""


# Options that don't change what is computed: they may differ when a run is resumed.
SESSION = ("log_every", "checkpoint_every", "keep", "assess_every", "stop_after", "resume", "name")
SESSION += ("data_dir", "download", "distributed", "coordinator", "processes", "process_id")

COUNTS = ("accumulate", "log_every", "checkpoint_every", "keep", "assess_every")

DEFAULTS: dict[str, Any] = dict(
    dataset="digits", schedule="cosine", milestone=3 / 4, weight_decay=1e-2, shift=1
)

# What a data set asks for stands in lines of its own, and comes before the model's.
PRESETS: dict[str, dict[str, Any]] = {
    "implicit-resnet": {"features": (32,), "max_steps": 4, "epochs": 15, "learning_rate": 3e-3},
    "pc-linear": {"features": (80,), "max_steps": 200, "epochs": 60, "learning_rate": 3e-3},
    "pc-single": {"features": (82,), "max_steps": 200, "epochs": 30, "learning_rate": 3e-3},
    "pc-multi": {"features": (12, 24, 48), "max_steps": 200, "epochs": 30, "learning_rate": 3e-3},
    "resnet": {"features": (32,), "max_steps": 1, "epochs": 15, "learning_rate": 3e-3},
    "mnist implicit-resnet": {"features": (16,), "epochs": 2},
    "mnist resnet": {"features": (16,), "epochs": 2},
    "mnist pc-linear": {"epochs": 15},
    "mnist pc-multi": {"epochs": 5},
    "cifar10 pc-single": {"features": (125,)},
    "cifar10 pc-multi": {"features": (20, 50, 80)},
    "svhn_cropped pc-single": {"features": (125,)},
    "svhn_cropped pc-multi": {"features": (20, 50, 80)},
}

# The paper (arXiv 2402.04029) has these networks; its authors' code gives learning rate, weight
# decay, epochs and milestone for one of them on each data set, which the others share here. Theirs
# trains a clamped weight under weight norm, without clipping; W = v^2 is trained here.
_MNIST = dict(dataset="mnist", activation="softsign", weight_decay=1.5e-2)
_MNIST |= dict(epochs=40, milestone=30 / 40)
_SVHN = dict(dataset="svhn_cropped", activation="sigmoid", weight_decay=2e-2)
_SVHN |= dict(epochs=80, milestone=70 / 80)
_CIFAR = dict(dataset="cifar10", activation="relu6", weight_decay=2e-2)
_CIFAR |= dict(epochs=120, milestone=100 / 120)
_PAPER = dict(schedule="milestone", learning_rate=5e-4, shift=0, mirror=False)
_AUGMENTED = dict(shift=4, mirror=True, features=(100, 120, 140))
_SHORT = dict(epochs=20, shift=1, weight_decay=1e-2)
NAMED: dict[Preset, dict[str, Any]] = {
    "mnist-linear-softsign": {"model": "pc-linear", **_PAPER, **_MNIST},
    "mnist-single-softsign": {"model": "pc-single", **_PAPER, **_MNIST},
    "mnist-multi-softsign": {"model": "pc-multi", **_PAPER, **_MNIST},
    "svhn-single-sigmoid": {"model": "pc-single", **_PAPER, **_SVHN},
    "svhn-multi-sigmoid": {"model": "pc-multi", **_PAPER, **_SVHN},
    "cifar10-single-relu6": {"model": "pc-single", **_PAPER, **_CIFAR},
    "cifar10-multi-relu6": {"model": "pc-multi", **_PAPER, **_CIFAR},
    "cifar10-multi-relu6-augmented": {"model": "pc-multi", **_PAPER, **_CIFAR, **_AUGMENTED},
    # Not the paper's: for minutes on two cores, the last one for an hour.
    "mnist-softsign-short": {"model": "pc-linear", **_MNIST, **_SHORT, "features": (400,)},
    "mnist-sigmoid-short": {"model": "pc-linear", **_MNIST, **_SHORT, "activation": "sigmoid"},
    # relu6 does not flatten below 6: rho(J) nears 1 and 130 evaluations were taken after 440 steps.
    "cifar10-softsign-short": {
        "model": "pc-multi",
        **_CIFAR,
        "activation": "softsign",
        "epochs": 4,
        "shift": 0,
        "mirror": False,
    },
}
SMOKE = {"batch_size": 16, "log_every": 2}
SMOKE_FEATURES = {"implicit-resnet": (8,), "resnet": (8,), "pc-multi": (4, 4, 4)}


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with its data set and model."""
    named = {} if config.preset is None else NAMED[config.preset]
    config = _filled(config, {k: named[k] for k in ("dataset", "model") if k in named} or DEFAULTS)
    if config.model is not None:
        return [config]
    four = [("implicit-resnet", 1), ("pc-linear", 1), ("pc-linear", 2), ("resnet", 1)]
    configs = [dataclasses.replace(config, model=model, kind=kind) for model, kind in four]
    if config.name is not None:  # one prefix for four folders
        named = lambda c: f"{config.name}-{default_name(c)}"
        configs = [dataclasses.replace(c, name=named(c)) for c in configs]
    return configs


def resolve(config: Config) -> Config:
    """Fill in what was left at None: the named preset first, then the data set's, the model's."""
    model = config.model
    assert model is not None
    preset = DEFAULTS | PRESETS[model] | PRESETS.get(f"{config.dataset} {model}", {})
    preset |= {} if config.preset is None else NAMED[config.preset]
    # A kind asks for its own activation, unless the preset's is one of it.
    if config.kind is not None and kind_of(preset.get("activation")) != config.kind:
        preset["activation"] = "tanh" if config.kind == 1 else "sigmoid"
    if config.smoke:
        # These are forced: a smoke run is quick whatever else is asked for.
        config = dataclasses.replace(config, **SMOKE, features=SMOKE_FEATURES.get(model, (8,)))
        config = _filled(config, {"epochs": 2})
    config = _filled(config, {"activation": "tanh"} | preset)
    config = _filled(config, {"kind": kind_of(config.activation)})
    config = _filled(config, {"name": default_name(config)})
    if kind_of(config.activation) != config.kind:
        raise SystemExit(
            f"Expected an activation of kind {config.kind} for {model}, got {config.activation}. "
            f"Choose a --model with --kind {kind_of(config.activation)}, or leave --activation out."
        )
    for option in ("epochs", "learning_rate", "batch_size", *COUNTS):
        value = getattr(config, option)
        if value is not None and not value > 0:
            raise SystemExit(
                f"Expected --{option.replace('_', '-')} above 0, got {value}. Leave it out for the "
                "preset."
            )
    return config


def kind_of(activation: str | None) -> int | None:
    return None if activation is None else qualify(ACTIVATIONS[activation]).kind


def default_name(config: Config) -> str:
    if config.preset is not None:
        named = config.preset
    else:
        kind = f"-kind{config.kind}" if str(config.model).startswith("pc-") else ""
        named = f"{config.dataset}-{config.model}{kind}"
    return f"{named}-{config.seed}{'-smoke' if config.smoke else ''}"


def title(config: Config) -> str:
    match config.model:
        case "implicit-resnet":
            return "RevDEQ (implicit-resnet)"
        case "resnet":
            return "explicit resnet"
        case model:
            return f"pcDEQ-{config.kind} ({model}, {config.activation})"


def _filled(config: Config, values: dict[str, Any]) -> Config:
    missing = {k: v for k, v in values.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)

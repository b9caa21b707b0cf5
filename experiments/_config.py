"""All options of `image_classification.py`; what is left out is filled in from the presets."""

import dataclasses
from typing import Literal

from _models import ACTIVATIONS
from _options import Session, check_positive, filled
from _presets import DEFAULTS, NAMED, PRESETS, SMOKE, SMOKE_SIZES, Model, Preset

from deqjax.positive import qualify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Session):
    """Train implicit models on images. What is left at None: the preset's, else the defaults."""

    preset: Preset | None = None
    """Options by one name: those of the two papers, or ours for two cores (-short)."""
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
    widths: tuple[int, ...] | None = None
    """Of a resnet: the cell of scale i has widths[i] x features[i] channels inside."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of a resnet's convolutions; parameters, norms and the states of solves stay float32."""

    max_steps: int | None = None
    """Ceiling on solver steps, one evaluation of f each; implicit resnets take just so many."""
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
    schedule: Literal["cosine", "milestone", "one-cycle"] | None = None
    """cosine: to 0 at the last step; milestone: x0.1 at one moment, the pcDEQ paper's; one-cycle:
    from a 25th up in the first 0.3 of the steps, then down to nothing."""
    milestone: float | None = None
    """The share of the epochs after which that moment is."""
    weight_decay: float | None = None
    """AdamW's: a step shrinks parameters by learning rate x this; the pcDEQ paper's order."""
    epsilon: float = 1e-6
    """AdamW's. At 1e-8 gradients of pure rounding (of a bias that batch normalisation takes out
    again) become full steps, and the loss depends on the number of devices from the second on."""
    clip: float = 1.0
    """Ceiling on the gradient's norm: met in the first steps only."""
    label_smoothing: float | None = None
    """The share of the training labels' weight that all classes have in equal parts."""
    shift: int | None = None
    """Pixels that training images move at most, at random, in each direction."""
    mirror: bool | None = None
    """Mirror training images at random; None: where a mirrored image keeps its class."""

    accumulate: int = 1
    """Parts a batch is taken in, one after another; batch normalisations see one at a time."""
    smoke: bool = False
    """A tiny network, data set and number of steps: everything is run through in seconds."""


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with its data set and model."""
    named = {} if config.preset is None else NAMED[config.preset]
    config = filled(config, {k: named[k] for k in ("dataset", "model") if k in named})
    config = filled(config, {"dataset": DEFAULTS["dataset"]})
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
        config = dataclasses.replace(config, **SMOKE, **SMOKE_SIZES[model])
        config = filled(config, {"epochs": 2})
    config = filled(config, {"activation": "tanh"} | preset)
    config = filled(config, {"kind": kind_of(config.activation)})
    config = filled(config, {"name": default_name(config)})
    if kind_of(config.activation) != config.kind:
        raise SystemExit(
            f"Expected an activation of kind {config.kind} for {model}, got {config.activation}. "
            f"Choose a --model with --kind {kind_of(config.activation)}, or leave --activation out."
        )
    residual = "resnet" in model
    if residual and len(config.widths or ()) != len(config.features or ()):
        raise SystemExit(
            f"Expected as many --widths as --features for {model}, one a scale; got "
            f"{config.widths} and {config.features}. Give both."
        )
    if not residual and (config.widths is not None or config.dtype != "float32"):
        raise SystemExit(
            f"Expected no --widths and --dtype float32 for {model}, got {config.widths} and "
            f"{config.dtype}. Leave them out, or choose a --model that is a resnet."
        )
    if not 0 <= (config.label_smoothing or 0.0) < 1:
        raise SystemExit(
            f"Expected --label-smoothing from 0 to below 1, got {config.label_smoothing}. 0.1 is "
            "common."
        )
    check_positive(config, "epochs", "learning_rate", "batch_size", "accumulate")
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
        case "implicit-resnet" | "implicit-resnet-multiscale" as model:
            return f"RevDEQ ({model})"
        case "resnet" | "resnet-multiscale" as model:
            return f"explicit {model}"
        case model:
            return f"pcDEQ-{config.kind} ({model}, {config.activation})"

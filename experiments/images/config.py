"""All options of `image_classification.py`; what is left out is filled in from the presets."""

import dataclasses
from typing import Annotated, Literal

from images.presets import (
    CONCAVE,
    DEFAULTS,
    EXPLICIT,
    NAMED,
    PRESETS,
    REVERSIBLE,
    SMOKE,
    SMOKE_SIZES,
    Model,
    Preset,
)
from training.flags import (
    Count,
    Nonnegative,
    Only,
    Positive,
    Range,
    Seed,
    Share,
    Tolerance,
    Whole,
    check,
    check_read,
    without_unread,
)
from training.options import Session, check_names, filled

Activation = Literal["tanh", "softsign", "relu6", "sigmoid"]
# What `deqjax.positive.qualify` says of each, which is slow to import for an answer to a typo.
KINDS: dict[Activation, Literal[1, 2]] = {"tanh": 1, "softsign": 1, "relu6": 1, "sigmoid": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Session):
    """Train implicit models on images. What is left at None: the preset's, else the defaults."""

    preset: Preset | None = None
    """Options by one name: those of the two papers, or ours for two cores (-short)."""
    dataset: Literal["digits", "mnist", "cifar10", "svhn_cropped"] | None = None
    """None: digits."""
    model: Model | None = None
    """None: a RevDEQ, a pcDEQ of each kind, and the explicit network."""
    kind: Annotated[Literal[1, 2] | None, Only("model", CONCAVE)] = None
    """Of a pcDEQ: 1 has strictly positive input and tanh, 2 nonnegative input and sigmoid."""
    activation: Annotated[Activation | None, Only("model", CONCAVE)] = None
    """Of a pcDEQ; None: that of its kind. softsign and relu6 are of kind 1."""
    features: tuple[Count, ...] | None = None
    """Features of each solve: channels of a convolution, units of pc-linear."""
    widths: Annotated[tuple[Count, ...] | None, Only("model", REVERSIBLE + EXPLICIT)] = None
    """Of a resnet: the cell of scale i has widths[i] x features[i] channels inside."""
    dtype: Annotated[Literal["float32", "bfloat16"], Only("model", REVERSIBLE + EXPLICIT)] = (
        "float32"
    )
    """Of a resnet's convolutions; parameters, norms and the states of solves stay float32."""

    max_steps: Annotated[Count | None, Only("model", REVERSIBLE + CONCAVE)] = None
    """Ceiling on solver steps, one evaluation of f each; implicit resnets take just so many."""
    tolerance: Annotated[Share, Only("model", CONCAVE)] = 1e-4
    """Of pcDEQ solves, relative: a tenth of it changes no accuracy and costs more steps."""
    gradient_tolerance: Annotated[Tolerance, Only("model", CONCAVE)] = 1e-2
    """Of pcDEQ backward solves, relative: little beside the noise of a batch of 64."""
    certify_tolerance: Annotated[Tolerance, Only("model", CONCAVE)] = 1e-6
    """Of the solves that are enclosed to certify predictions, which go on from the model's own.
    Below, the enclosures are as wide as the rounding of float32 makes them."""
    beta: Annotated[float, Range(0, 2, but=(0, 1, 2)), Only("model", REVERSIBLE)] = 0.8
    """Relaxation of the reversible solver, the paper's; 1 - beta is 1/d or -1/d, d an integer."""

    seed: Seed = 0
    """Of parameters, order of the data and augmentation; the digits' split is always the same."""
    epochs: Count | None = None
    """Passes over the training split."""
    batch_size: Count = 64
    """Images a step, over all devices: the papers'."""
    learning_rate: Positive | None = None
    """Peak of AdamW's."""
    schedule: Literal["cosine", "milestone", "one-cycle"] | None = None
    """cosine: to 0 at the last step; milestone: x0.1 at one moment, the pcDEQ paper's; one-cycle:
    from a 25th up in the first 0.3 of the steps, then down to nothing."""
    milestone: Annotated[Share | None, Only("schedule", ("milestone",))] = None
    """The share of the epochs after which that moment is."""
    weight_decay: Nonnegative | None = None
    """AdamW's: a step shrinks parameters by learning rate x this; the pcDEQ paper's order."""
    epsilon: Positive = 1e-6
    """AdamW's. At 1e-8 gradients of pure rounding (of a bias that batch normalisation takes out
    again) become full steps, and the loss depends on the number of devices from the second on."""
    clip: Positive = 1.0
    """Ceiling on the gradient's norm: met in the first steps only."""
    label_smoothing: Annotated[float, Range(0, 1, but=(1,))] | None = None
    """The share of the training labels' weight that all classes have in equal parts."""
    shift: Whole | None = None
    """Pixels that training images move at most, at random, in each direction."""
    mirror: bool | None = None
    """Mirror training images at random; None: where a mirrored image keeps its class."""

    accumulate: Count = 1
    """Parts a batch is taken in, one after another; batch normalisations see one at a time."""
    smoke: bool = False
    """A tiny network, data set and number of steps: everything is run through, nothing learned."""


def choose(config: Config) -> list[Config]:
    """The runs that are asked for, each with everything filled in; what does not fit is refused."""
    named = {} if config.preset is None else NAMED[config.preset]
    options = filled(config, {k: named[k] for k in ("dataset", "model") if k in named})
    options = filled(options, {"dataset": DEFAULTS["dataset"]})
    runs = [options]
    if options.model is None:
        asked = options.kind or kind_of(options.activation)
        kinds = (1, 2) if asked is None else (asked,)
        concave = [dataclasses.replace(options, model="pc-linear", kind=kind) for kind in kinds]
        first, last = (dataclasses.replace(options, model=m) for m in ("implicit-resnet", "resnet"))
        runs = [first, *concave, last]
    runs = [_resolve(without_unread(run)) for run in runs]
    if options.model is None and config.name is not None:  # one prefix for all folders
        prefixed = lambda run: f"{config.name}-{default_name(run)}"
        runs = [dataclasses.replace(run, name=prefixed(run)) for run in runs]
    check_read(config, runs)
    check_names(runs)
    return runs


def _resolve(config: Config) -> Config:
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
    check(config)
    if kind_of(config.activation) != config.kind:
        raise SystemExit(
            f"Expected an activation of kind {config.kind} for {model}, got {config.activation}. "
            f"Choose a --model with --kind {kind_of(config.activation)}, or leave --activation out."
        )
    scales = len(config.features or ())
    if model not in CONCAVE and len(config.widths or ()) != scales:
        raise SystemExit(
            f"Expected as many --widths as --features for {model}, one a scale; got "
            f"{config.widths} and {config.features}. Give both."
        )
    if model in ("pc-linear", "pc-single") and scales != 1:
        raise SystemExit(
            f"Expected one number of --features for {model}, which has one solve, got "
            f"{config.features}. Leave one, or choose --model pc-multi."
        )
    return config


def kind_of(activation: Activation | None) -> Literal[1, 2] | None:
    return None if activation is None else KINDS[activation]


def default_name(config: Config) -> str:
    if config.preset is not None:
        named = config.preset
    else:
        kind = f"-kind{config.kind}" if str(config.model).startswith("pc-") else ""
        named = f"{config.dataset}-{config.model}{kind}"
    return f"{named}-{config.seed}{'-smoke' if config.smoke else ''}"


def title(config: Config) -> str:
    match config.model:
        case model if model in REVERSIBLE:
            return f"RevDEQ ({model})"
        case model if model in EXPLICIT:
            return f"explicit {model}"
        case model:
            return f"pcDEQ-{config.kind} ({model}, {config.activation})"

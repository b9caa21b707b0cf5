"""All options of `image_classification.py`, and its networks and presets by name."""

import dataclasses
from typing import Annotated, Literal

from training.flags import Beta, Count, Only, Positive, Range, Share, Tolerance, Whole
from training.options import Session, Training

Data = Literal["digits", "mnist", "cifar10", "svhn_cropped"]
Model = Literal[
    "implicit-resnet", "implicit-resnet-multiscale", "pc-linear", "pc-single", "pc-multi",
    "resnet", "resnet-multiscale",
]  # fmt: skip
Preset = Literal[
    "cifar10-revdeq", "cifar10-revdeq-short", "mnist-linear-softsign", "mnist-single-softsign",
    "mnist-multi-softsign", "svhn-single-sigmoid", "svhn-multi-sigmoid", "cifar10-single-relu6",
    "cifar10-multi-relu6", "cifar10-multi-relu6-augmented", "mnist-softsign-short",
    "mnist-sigmoid-short", "cifar10-softsign-short",
]  # fmt: skip
Activation = Literal["tanh", "softsign", "relu6", "sigmoid"]

CONCAVE: tuple[Model, ...] = ("pc-linear", "pc-single", "pc-multi")
REVERSIBLE: tuple[Model, ...] = ("implicit-resnet", "implicit-resnet-multiscale")
EXPLICIT: tuple[Model, ...] = ("resnet", "resnet-multiscale")
# As `deqjax.positive.qualify` says, which would be slow to import to answer a typo.
KINDS: dict[Activation, Literal[1, 2]] = {"tanh": 1, "softsign": 1, "relu6": 1, "sigmoid": 2}


def kind_of(activation: Activation | None) -> Literal[1, 2] | None:
    return None if activation is None else KINDS[activation]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Session, Training):
    """Trains implicit models on images. Options left at None: the preset's, else the defaults."""

    preset: Preset | None = None
    """Options by one name: those of the two papers, or ours for two cores (-short)."""
    dataset: Data | None = None
    """None: digits, whose split is the same for every seed."""
    model: Model | None = None
    """None: a RevDEQ, a pcDEQ of each kind, and the explicit network."""
    kind: Annotated[Literal[1, 2] | None, Only("model", CONCAVE)] = None
    """Kind of a pcDEQ: 1 has strictly positive input and tanh, 2 nonnegative input and sigmoid."""
    activation: Annotated[Activation | None, Only("model", CONCAVE)] = None
    """Activation of a pcDEQ; None: that of its kind. softsign and relu6 are of kind 1."""
    features: tuple[Count, ...] | None = None
    """Features of each solve: channels of a convolution, units of pc-linear."""
    widths: Annotated[tuple[Count, ...] | None, Only("model", REVERSIBLE + EXPLICIT)] = None
    """Widths of a resnet: the cell of scale i has widths[i] x features[i] channels inside."""
    dtype: Annotated[Literal["float32", "bfloat16"], Only("model", REVERSIBLE + EXPLICIT)] = (
        "float32"
    )
    """Dtype of a resnet's convolutions; parameters, norms and the states of solves stay float32."""

    max_steps: Annotated[Count | None, Only("model", REVERSIBLE + CONCAVE)] = None
    """Ceiling on solver steps, one evaluation of f each; implicit resnets take just so many."""
    tolerance: Annotated[Share, Only("model", CONCAVE)] = 1e-4
    """Relative, of pcDEQ solves: a tenth of it changes no accuracy and costs more steps."""
    gradient_tolerance: Annotated[Tolerance, Only("model", CONCAVE)] = 1e-2
    """Relative tolerance of pcDEQ backward solves: little beside the noise of a batch of 64."""
    certify_tolerance: Annotated[Tolerance, Only("model", CONCAVE)] = 1e-6
    """Tolerance of the solves that are enclosed to certify predictions, which go on from the
    model's own. Below, the enclosures are as wide as the rounding of float32 makes them."""
    beta: Annotated[Beta, Only("model", REVERSIBLE)] = 0.8
    """Relaxation of the reversible solver, the paper's; 1 - beta is 1/d or -1/d, d an integer."""

    epochs: Count | None = None
    """Passes over the training split."""
    batch_size: Count = 64
    """Images per step, over all devices: the papers'."""
    schedule: Literal["cosine", "milestone", "one-cycle"] | None = None
    """cosine: to 0 at the last step; milestone: x0.1 at one moment, the pcDEQ paper's; one-cycle:
    from a 25th up in the first 0.3 of the steps, then down to nothing."""
    milestone: Annotated[Share | None, Only("schedule", ("milestone",))] = None
    """The share of the epochs after which the learning rate falls."""
    epsilon: Positive = 1e-6
    """AdamW's. At 1e-8 gradients of pure rounding (of a bias that batch normalisation takes out
    again) become full steps, and the loss depends on the number of devices from the second on."""
    label_smoothing: Annotated[float, Range(0, 1, but=(1,))] | None = None
    """The share of the training labels' weight that all classes have in equal parts."""
    shift: Whole | None = None
    """Pixels that training images move at most, at random, in each direction."""
    mirror: bool | None = None
    """Mirrors training images at random; None: where a mirrored image keeps its class."""

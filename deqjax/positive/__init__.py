"""Positive concave models: the hypotheses of their theorems, and the bounds that follow.

The cells are layers: `nn.PositiveConcaveLinear`, `nn.PositiveConcaveConv2d`, and
`nn.PositiveConcave` around your own cell.
"""

import sys as _sys

from .._checks import renamed as _renamed
from ._activations import (
    ACTIVATIONS as ACTIVATIONS,
    PROPERTIES as PROPERTIES,
    Activation as Activation,
    Power as Power,
    Shifted as Shifted,
    properties as properties,
    qualify as qualify,
    saturating as saturating,
)
from ._base import AbstractActivation as AbstractActivation, Properties as Properties
from ._certify import Enclosure as Enclosure, certify as certify
from ._hypotheses import (
    Finding as Finding,
    Hypotheses as Hypotheses,
    check_hypotheses as check_hypotheses,
)
from ._inject import StrictlyPositive as StrictlyPositive
from ._nonnegative import AbstractNonnegative as AbstractNonnegative, project as project

_MOVED = ("Bracketing", "PositiveConcaveSolver")


def __getattr__(name: str) -> object:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _renamed(f"deqjax.positive.{name}", f"deqjax.{name}")
    return getattr(_sys.modules["deqjax.solvers"], name)  # which imports this package

"""Positive concave models: the hypotheses of their theorems, and what follows from them.

The cells are layers: `nn.PositiveConcaveLinear`, `nn.PositiveConcaveConv2d`, and
`nn.PositiveConcave` around a cell of your own.
"""

import sys
import warnings
from typing import Any

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


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"deqjax.positive.{name} is now deqjax.{name}; the old name goes in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(sys.modules["deqjax.solvers"], name)

"""Positive concave models: the hypotheses of their theorems, and what follows from them.

The cells are layers: `nn.PositiveConcaveLinear`, `nn.PositiveConcaveConv2d`, and
`nn.PositiveConcave` around a cell of your own.
"""

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
from ._bracketing import Bracketing as Bracketing
from ._certify import Enclosure as Enclosure, certify as certify
from ._hypotheses import (
    Finding as Finding,
    Hypotheses as Hypotheses,
    check_hypotheses as check_hypotheses,
)
from ._inject import StrictlyPositive as StrictlyPositive
from ._nonnegative import AbstractNonnegative as AbstractNonnegative, project as project
from ._solver import PositiveConcaveSolver as PositiveConcaveSolver

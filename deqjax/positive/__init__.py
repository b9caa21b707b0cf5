"""Positive concave models: the hypotheses of their theorems, and what follows from them."""

from ._activations import (
    ACTIVATIONS as ACTIVATIONS,
    Activation as Activation,
    qualify as qualify,
)
from ._bracketing import Bracketing as Bracketing
from ._certify import Enclosure as Enclosure, certify as certify
from ._solver import PositiveConcaveSolver as PositiveConcaveSolver

"""Positive concave models: the hypotheses of their theorems, and what follows from them."""

from ._activations import (
    ACTIVATIONS as ACTIVATIONS,
    Activation as Activation,
    qualify as qualify,
)

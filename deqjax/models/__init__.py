"""Whole networks from the papers, composed of layers."""

from ._base import Classified as Classified, Predicted as Predicted, Solve as Solve
from ._implicit_resnet import ImplicitResNet as ImplicitResNet
from ._positive_concave import PositiveConcaveNet as PositiveConcaveNet
from ._transformer import (
    ReversibleTransformer as ReversibleTransformer,
    Transformer as Transformer,
)

"""Equinox layers and cells."""

from ._attention import (
    AttentionCache as AttentionCache,
    CausalAttention as CausalAttention,
    TransformerCell as TransformerCell,
)
from ._conv import Conv1d as Conv1d, Conv2d as Conv2d
from ._deq import DEQ as DEQ
from ._dropout import VariationalDropout as VariationalDropout, draw_masks as draw_masks
from ._linear import Linear as Linear
from ._monotone import MonotoneLinear as MonotoneLinear
from ._norm import GroupNorm as GroupNorm
from ._positive import (
    PositiveConcaveConv2d as PositiveConcaveConv2d,
    PositiveConcaveLinear as PositiveConcaveLinear,
)
from ._positive_concave import PositiveConcave as PositiveConcave
from ._shard_solves import shard_solves as shard_solves
from ._spectral import SpectralNorm as SpectralNorm, power_step as power_step
from ._splitting import (
    ForwardBackward as ForwardBackward,
    PeacemanRachford as PeacemanRachford,
)
from ._subhomogeneous import (
    SubhomogeneousConv2d as SubhomogeneousConv2d,
    SubhomogeneousLinear as SubhomogeneousLinear,
)

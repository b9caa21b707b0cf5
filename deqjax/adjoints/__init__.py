"""The adjoints, one way of differentiating a solve per file."""

from .._checks import renamed as _renamed
from . import _implicit
from ._base import (
    AbstractAdjoint as AbstractAdjoint,
    AbstractFixedPointAdjoint as AbstractFixedPointAdjoint,
)
from ._broyden import BroydenAdjoint as BroydenAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint
from ._phantom import (
    JacobianFreeAdjoint as JacobianFreeAdjoint,
    NeumannPhantomAdjoint as NeumannPhantomAdjoint,
    PhantomAdjoint as PhantomAdjoint,
)
from ._positive_concave import PositiveConcaveAdjoint as PositiveConcaveAdjoint
from ._recursive_checkpoint import RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint
from .reversible import ReversibleAdjoint as ReversibleAdjoint


def __getattr__(name: str) -> object:
    if name != "implicit_vjp":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _renamed("deqjax.adjoints.implicit_vjp", "deqjax.implicit_vjp")
    return _implicit.implicit_vjp

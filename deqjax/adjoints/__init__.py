"""One way of differentiating a solve a file."""

from ._base import AbstractAdjoint as AbstractAdjoint
from ._implicit import ImplicitAdjoint as ImplicitAdjoint, implicit_vjp as implicit_vjp
from ._recursive_checkpoint import RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint
from ._reversible import ReversibleAdjoint as ReversibleAdjoint

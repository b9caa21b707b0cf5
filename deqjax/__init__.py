"""Implicit models in JAX: fixed-point solvers, their gradients, and layers and models on them."""

from importlib.metadata import version as _version

from . import models as models, nn as nn, positive as positive
from ._fixed_point import fixed_point as fixed_point
from ._jacobian import (
    SpectralRadius as SpectralRadius,
    jacobian_frobenius as jacobian_frobenius,
    spectral_radius as spectral_radius,
)
from ._path import fixed_point_path as fixed_point_path
from ._reversible_vjp import reversible_vjp as reversible_vjp
from ._solution import RESULTS as RESULTS, Solution as Solution
from .adjoints import (
    AbstractAdjoint as AbstractAdjoint,
    BroydenAdjoint as BroydenAdjoint,
    ImplicitAdjoint as ImplicitAdjoint,
    JacobianFreeAdjoint as JacobianFreeAdjoint,
    NeumannPhantomAdjoint as NeumannPhantomAdjoint,
    PhantomAdjoint as PhantomAdjoint,
    PositiveConcaveAdjoint as PositiveConcaveAdjoint,
    RecursiveCheckpointAdjoint as RecursiveCheckpointAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    implicit_vjp as implicit_vjp,
)
from .positive import (
    Bracketing as Bracketing,
    Enclosure as Enclosure,
    PositiveConcaveSolver as PositiveConcaveSolver,
    certify as certify,
)
from .solvers import (
    AbstractSolver as AbstractSolver,
    Anderson as Anderson,
    Broyden as Broyden,
    FixedPointIteration as FixedPointIteration,
    Reversible as Reversible,
)

__version__ = _version("deqjax")

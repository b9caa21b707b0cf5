"""Implicit models in JAX: fixed-point solvers, their gradients, and layers and models on them."""

from importlib.metadata import version as _version

from . import diagnostics as diagnostics, models as models, nn as nn, positive as positive
from ._fixed_point import fixed_point as fixed_point
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
)
from .adjoints._implicit import implicit_vjp as implicit_vjp
from .adjoints.reversible import reversible_vjp as reversible_vjp
from .diagnostics import (
    Diagnosis as Diagnosis,
    SpectralRadius as SpectralRadius,
    diagnose as diagnose,
    fixed_point_path as fixed_point_path,
    jacobian_frobenius as jacobian_frobenius,
    residuals as residuals,
    spectral_radius as spectral_radius,
)
from .positive import (
    Enclosure as Enclosure,
    certify as certify,
)
from .solvers import (
    AbstractSolver as AbstractSolver,
    Anderson as Anderson,
    Bracketing as Bracketing,
    Broyden as Broyden,
    FixedPointIteration as FixedPointIteration,
    PositiveConcaveSolver as PositiveConcaveSolver,
    Reversible as Reversible,
)

__version__ = _version("deqjax")

"""The solvers, one fixed-point method per file."""

from .._step import AbstractMemory as AbstractMemory
from ._anderson import Anderson as Anderson
from ._base import AbstractSolver as AbstractSolver, Status as Status
from ._bracketing import Bracketing as Bracketing
from ._broyden import Broyden as Broyden
from ._fixed_point_iteration import FixedPointIteration as FixedPointIteration
from ._positive_concave import PositiveConcaveSolver as PositiveConcaveSolver
from ._reversible import Reversible as Reversible

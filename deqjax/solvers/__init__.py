"""One fixed-point method a file."""

from ._base import AbstractSolver as AbstractSolver
from ._fixed_point_iteration import FixedPointIteration as FixedPointIteration
from ._reversible import Reversible as Reversible

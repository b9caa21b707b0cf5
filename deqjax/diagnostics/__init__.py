"""Diagnostics of a solve: its iterates and their residuals, and the Jacobian at the solution."""

from ._diagnose import Diagnosis as Diagnosis, diagnose as diagnose
from ._jacobian import (
    SpectralRadius as SpectralRadius,
    jacobian_frobenius as jacobian_frobenius,
    spectral_radius as spectral_radius,
)
from ._path import fixed_point_path as fixed_point_path
from ._residuals import residuals as residuals

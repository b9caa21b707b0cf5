"""Looks at a solve: iterates on the way, and the Jacobian where it ends."""

from ._jacobian import (
    SpectralRadius as SpectralRadius,
    jacobian_frobenius as jacobian_frobenius,
    spectral_radius as spectral_radius,
)
from ._path import fixed_point_path as fixed_point_path

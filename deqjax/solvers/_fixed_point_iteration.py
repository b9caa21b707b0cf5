from collections.abc import Callable
from typing import Any

import optimistix
from jaxtyping import PyTree

from .._tree import lincomb
from ._base import AbstractSolver, Number


class FixedPointIteration(AbstractSolver):
    """Picard iteration, optionally damped: `z[k+1] = damp z[k] + (1 - damp) f(z[k])`.

    Converges geometrically if the spectral radius of `damp I + (1 - damp) J` is below 1 at the
    fixed point, with this radius as its rate (J is the Jacobian of f there).

    **Arguments:**

    - `rtol`, `atol`: relative and absolute tolerance of the stopping test
        `norm((f(z) - z) / (atol + rtol |f(z)|)) < 1`. Both zero: take exactly `max_steps` steps.
        A scalar array may be traced, so that changing it never recompiles.
    - `norm`: a function of a pytree of float32 or wider arrays to a scalar. It gets the entries of
        one problem at a time, of complex ones the moduli. It must return NaN for a NaN, because
        NaN marks an f that is not finite.
    - `damp`: below 1; a negative value over-relaxes.

    **Cost:** one evaluation of `f` per step; one copy of `z`.

    **When not to use it:** when the rate is above about 0.7: `deqjax.Anderson` and `deqjax.Broyden`
    then need fewer evaluations, far fewer above 0.9.

    **Raises:** `ValueError` for a tolerance below 0 or NaN, or `damp >= 1`.

    Reference: Banach, Sur les opérations dans les ensembles abstraits, Fund. Math. 3 (1922), th. 6.
    """

    rtol: Number = 1e-4
    atol: Number = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    damp: Number = 0.0

    def __check_init__(self):
        self.check()

    def requirements(self):
        damp = ("damp", self.damp, lambda x: x < 1, "a damping factor below 1")
        return [*super().requirements(), damp]

    def blank(self, z0: PyTree) -> None:
        """Picard iteration remembers nothing."""
        del z0

    def mix(self, z: PyTree, fz: PyTree, memory: None) -> tuple[PyTree, None]:
        """`damp z + (1 - damp) f(z)`."""
        del memory
        if isinstance(self.damp, float | int) and self.damp == 0:
            return fz, None
        return lincomb(self.damp, z, 1 - self.damp, fz), None

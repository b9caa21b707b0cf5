from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import PyTree

from .._tree import lincomb
from ._base import AbstractSolver, Number


class Reversible(AbstractSolver):
    """The reversible fixed-point iteration `s[k+1] = (1 - beta) s[k-1] + beta f(s[k])`.

    It starts from `s[-1] = s[0] = z0`. Two consecutive iterates determine the one before them,
    `s[k-1] = (s[k+1] - beta f(s[k])) / (1 - beta)`, so that `deqjax.ReversibleAdjoint` runs the
    iteration backwards instead of storing it. The paper's pair `(y, z)` holds consecutive iterates:
    its one step is two of these. If `f` contracts by `k`, the error shrinks by at most
    `|1 - beta| + beta k` a pair.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `beta`: relaxation, in (0, 2) and not 1. A scalar array is differentiated, a float is not.

    **Cost:** one evaluation of `f` a step; two copies of `z`.

    **How far the reversal can be trusted:** this is floating point, unchecked. Each reversed step
    multiplies rounding noise by up to `1 / |1 - beta|`, so after n steps the early states carry a
    relative error of about `eps |1 - beta|^-n` (float32, eps = 6e-8: 2e-5 after 8 steps and
    0.25 after 22 at beta = 1/2; 2e-2 after 8 steps at beta = 0.8) and so, up to the contraction of
    `f`, does the gradient. Keep `n log(1 / |1 - beta|)` below `log(1e-2 / eps)`, about 17 steps
    at beta = 1/2, 7 at 0.8 in float32, or differentiate with `deqjax.RecursiveCheckpointAdjoint`,
    which is exact for any number of steps.

    **When not to use it:** without `deqjax.ReversibleAdjoint` it has no advantage over
    `deqjax.FixedPointIteration`.

    **Raises:** `ValueError` for a tolerance below 0 or NaN, or `beta` outside (0, 2) or 1. A traced
    `beta` out of range is reported as `RESULTS.nonlinear_divergence`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the update of its section 3.
    """

    rtol: Number = 1e-4
    atol: Number = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    beta: Number = 0.8

    def __check_init__(self):
        self.check()

    def requirements(self):
        """See `AbstractSolver`."""
        reversible = lambda x: (x > 0) & (x < 2) & (x != 1)
        beta = ("beta", self.beta, reversible, "a relaxation in (0, 2) and not 1")
        return [*super().requirements(), beta]

    def memory(self, z0: PyTree) -> PyTree:
        """The previous iterate, `s[-1] = z0`."""
        return z0

    def mix(self, z: PyTree, fz: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """`(1 - beta) s[k-1] + beta f(s[k])`, and `s[k]` for the step after."""
        return lincomb(1 - self.beta, memory, self.beta, fz), z

    def unmix(self, z_next: PyTree, fz: PyTree) -> PyTree:
        """`s[k-1]` from `s[k+1]` and `f(s[k])`: the inverse of `mix`."""
        rest = lincomb(1, z_next, -self.beta, fz)
        return jax.tree.map(lambda x: x / jnp.asarray(1 - self.beta, x.dtype), rest)

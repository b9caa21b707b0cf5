from collections.abc import Callable
from typing import Any

import equinox as eqx
import optimistix
from jaxtyping import PyTree

from .._checks import check_int, renamed
from ._base import Number
from ._secant import AbstractSecantSolver, Rule

# Without a ridge two parallel steps are a breakdown. Below eps it is eps, as always in float32.
_RIDGE = 1e-10


class Broyden(AbstractSecantSolver):
    """Limited-memory good Broyden method on `g(z) = f(z) - z`, safeguarded.

    Let the rows s, y and v be the differences of z, g and f(z) over the last `depth` accepted
    iterates. B is the matrix nearest to -I (in the Frobenius norm) with `B s_j = y_j` for all j,

        z' = z - B^-1 g,    B^-1 = -(I + V^T T^-1 S),    T = -S Y^T

    the multisecant form of Broyden's first update. On a linear f the method is a Petrov-Galerkin
    method in the space of the last steps. As in `deqjax.Anderson`, the length of a step is bounded,
    and a step is taken back if it makes ||g|| more than ten times its least value, if it goes too
    far, or if f is not finite there. A singular T empties the window.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `depth`: the number of secants, an int of at least 1.
    - `line_search`: halve a step from z along d until `||g(z + t d)|| <= (1 - 1e-4 t) ||g(z)||`
        (Armijo's condition), at most five times, before it is taken back. Each trial counts as a
        step, of one evaluation.

    **Cost:** one evaluation of `f` per step; `2 depth + 3` copies of `z`; a step reads `5 depth`.
    Under `batched=True` each problem has its own B; `jax.vmap` gives the same numbers, but copies
    the window in each step.

    **When not to use it:** if Picard iteration takes about ten steps; if memory is short, as
    `deqjax.Anderson` needs a third; for gradients through the steps, whose coefficients are
    ill-conditioned near a fixed point (`deqjax.RecursiveCheckpointAdjoint` requires float64); with
    `line_search`, if ||g|| has to rise before it falls (a clipped f that is expansive at z0).

    **Raises:** `ValueError` for a tolerance below 0 or NaN, or `depth < 1`.

    Reference: Fang and Saad, Two classes of multisecant methods for nonlinear acceleration, Numer.
    Linear Algebra Appl. 16 (2009), equation 14, from B_0 = -I.
    """

    rtol: Number
    atol: Number
    norm: Callable[[PyTree], Any]
    depth: int = eqx.field(static=True)
    line_search: bool = eqx.field(static=True)

    def __init__(
        self,
        rtol: Number = 1e-4,
        atol: Number = 1e-6,
        norm: Callable[[PyTree], Any] = optimistix.max_norm,
        depth: int = 16,
        line_search: bool = False,
        *,
        memory: int | None = None,
    ):
        if memory is not None:
            renamed("Broyden(memory=...)", "depth=...")
            depth = memory
        self.rtol, self.atol, self.norm = rtol, atol, norm
        self.depth, self.line_search = depth, line_search

    def __check_init__(self):
        check_int("Broyden", "depth", self.depth, "pass the number of secants to keep.")
        self.check()

    @property
    def rule(self) -> Rule:
        return Rule(galerkin=True, ridge=_RIDGE, line_search=self.line_search)

from collections.abc import Callable
from typing import Any

import equinox as eqx
import optimistix
from jaxtyping import PyTree

from .._checks import check_int, renamed
from ._base import Number
from ._secant import AbstractSecantSolver, Rule

# The roundings of a Gram matrix in float32: without it two parallel steps are a breakdown.
_RIDGE = 1e-10


class Broyden(AbstractSecantSolver):
    """Limited-memory good Broyden method on `g(z) = f(z) - z`, safeguarded.

    With s, y and v the differences of z, g and f(z) over the last `depth` accepted iterates, in
    rows, B is the matrix nearest to -I (in the Frobenius norm) for which `B s_j = y_j` for all j,

        z' = z - B^-1 g,    B^-1 = -(I + V^T T^-1 S),    T = -S Y^T

    the multisecant form of Broyden's first update. On a linear f it is a Petrov-Galerkin method in
    the space of the last steps. A step that makes ||g|| more than ten times its least value, that
    has gone too far, or at which f is not finite, is taken back, and its length is bounded, as in
    `deqjax.Anderson`; a singular T empties the window.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `depth`: the number of secants, an int of at least 1.
    - `line_search`: halve a step from z along d until `||g(z + t d)|| <= (1 - 1e-4 t) ||g(z)||`
        (Armijo's condition), at most five times, before it is taken back. A trial is a step like
        any other, of one evaluation.

    **Cost:** one evaluation of `f` a step; `2 depth + 3` copies of `z`, of which a step reads
    `5 depth`. Under `batched=True` each problem has a B of its own; `jax.vmap` gives the same
    numbers and copies the window in each step.

    **When not to use it:** where Picard iteration takes some ten steps; where memory counts, for
    `deqjax.Anderson` needs a third of it; for gradients of the steps taken, whose coefficients are
    ill-conditioned near a fixed point (`deqjax.RecursiveCheckpointAdjoint` asks for float64); with
    `line_search`, where ||g|| has to rise on the way (a clipped f that is expansive at z0).

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
        check_int("Broyden", "depth", self.depth, "it is the number of steps that are remembered.")
        self.check()

    @property
    def rule(self) -> Rule:
        return Rule(galerkin=True, ridge=_RIDGE, line_search=self.line_search)

from typing import Any, Literal

import equinox as eqx
from jaxtyping import PyTree

from .._iterate import LoopResult
from .._tree import per_problem, stop_gradient
from ..solvers import Broyden
from ..solvers._secant import Secants, inverse
from ._base import (
    AbstractFixedPointAdjoint,
    Linearisation,
    Problem,
    check_linear,
    solved,
)
from ._linear_solve import LinearMap, by_iteration, judged


class BroydenAdjoint(AbstractFixedPointAdjoint):
    """The implicit gradient by the inverse that Broyden's method has built in the solve (SHINE).

        dz* := -B^-1 (df/dtheta) dtheta,    B ~ J - I

    If the relative residual of this y in `(I - J^T) y = g` is above `tol`, the Neumann series and
    Anderson's method improve y, as in `deqjax.ImplicitAdjoint`, until it is not.

    **Arguments:**

    - `tol`: a float above 0, the relative residual `||g + J^T y - y||_2 / ||g + J^T y||_2`, for
        each leaf by itself.
    - `max_steps`, `on_failure`: as in `deqjax.ImplicitAdjoint`.

    **Cost:** one evaluation of `f` with its linearisation, two VJPs, one of them for the check; the
    solver's `2 depth` copies of z are kept until the backward pass.

    **When not to use it:** if the gradient has to be right to more than one digit: B is accurate
    along the steps of the solve, but g may point elsewhere.

    **Raises:** `ValueError` with a solver other than `deqjax.Broyden`, or as
    `deqjax.ImplicitAdjoint`.

    Reference: Ramzi, Mannel, Bai, Starck, Ciuciu, Moreau, SHINE: sharing the inverse estimate from
    the forward pass for bi-level optimization and implicit models, ICLR 2022, equation 5.
    """

    tol: float = 0.1
    on_failure: Literal["nan", "keep", "raise"] = eqx.field(static=True, default="nan")
    max_steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_linear(self)

    def check_solver(self, solver: Any) -> None:
        if not isinstance(solver, Broyden):
            raise ValueError(
                f"BroydenAdjoint expects the solver deqjax.Broyden, got {type(solver).__name__}; "
                f"use deqjax.Broyden(...), or deqjax.ImplicitAdjoint() with this solver."
            )

    def tangent(self, at: Linearisation, problem: Problem, loop: LoopResult) -> PyTree:
        secants: Secants = stop_gradient(loop.state.memory)
        steps = problem.ceiling if self.max_steps is None else self.max_steps

        def solve(transpose: bool):
            first = per_problem(lambda m, b: inverse(m, b, transpose=transpose), problem.rank)

            def run(matvec: LinearMap, b: PyTree) -> PyTree:
                y, stats = by_iteration(
                    None, matvec, b, first(secants, b), self.tol, max_steps=steps, rank=problem.rank
                )
                return judged(y, stats, self.on_failure)

            return run

        return solved(*at.equation(), solve(False), solve(True))

from collections.abc import Callable
from typing import Any

import equinox as eqx
import optimistix
from jaxtyping import PyTree

from .._checks import check_int
from ._base import Number
from ._secant import AbstractSecantSolver, Rule


class Anderson(AbstractSecantSolver):
    """Anderson acceleration of `z <- f(z)`, regularised and safeguarded.

    With `g = f(z) - z`, and y and v the differences of g and f(z) over the last `depth` accepted
    iterates,

        z' = f(z) + sum_j c_j v_j,    c = argmin ||g + sum_j c_j y_j||^2 + ridge tr(G) sum_j c_j^2

    where every y_j is first scaled to unit length and G is their Gram matrix, in float32 or wider.
    On a linear f the method is a truncated GMRES. A step that makes ||g|| more than ten times its
    least value, or at which f is not finite, is taken back: the next iterate is the Picard step
    from the last accepted one, the window is emptied, and Picard steps follow, one after the first
    such failure and up to eight after later ones. A step is at most 1000 times as long as the
    longest Picard step of the window. A step of at least twice that length, or one that was cut, is
    taken back too if g then points backwards and has not shrunk by a tenth; the next step may be a
    quarter as long.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `depth`: the length of the window, an int of at least 1.
    - `mixing`: in (0, 1], the damping of every step:
        `z' = z + mixing g + sum_j c_j (s_j + mixing y_j)`, s the differences of z.
    - `ridge`: at least 0; the method uses at least eps of the Gram matrix's dtype.

    **Cost:** one evaluation of `f` per step; `2 depth + 3` copies of `z`; a step reads `3 depth`.
    Under `batched=True` each problem has its own coefficients; `jax.vmap` gives the same numbers,
    but copies the window in each step.

    **When not to use it:** if Picard iteration takes about ten steps; for gradients through the
    steps, whose coefficients are ill-conditioned near a fixed point
    (`deqjax.RecursiveCheckpointAdjoint` requires float64).

    **Raises:** `ValueError` for a tolerance below 0 or NaN, `depth < 1`, `mixing` outside (0, 1] or
    a negative `ridge`.

    Reference: Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer.
    Anal. 49 (2011), equation 2.2 in its unconstrained form.
    """

    rtol: Number = 1e-4
    atol: Number = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    depth: int = eqx.field(static=True, default=5)
    mixing: Number = 1.0
    ridge: Number = 1e-8

    def __check_init__(self):
        instead = "pass the number of differences in the window."
        check_int("Anderson", "depth", self.depth, instead)
        self.check()

    def requirements(self):
        mixing = lambda x: (x > 0) & (x <= 1)
        return [
            *super().requirements(),
            ("mixing", self.mixing, mixing, "a mixing in (0, 1]"),
            ("ridge", self.ridge, lambda x: x >= 0, "a ridge of at least 0"),
        ]

    @property
    def rule(self) -> Rule:
        return Rule(galerkin=False, mixing=self.mixing, ridge=self.ridge)

import equinox as eqx
import jax
from equinox import AbstractVar
from jaxtyping import PyTree

from .._checks import check_int
from .._iterate import LoopResult
from .._tree import add, lincomb, scale
from ._base import AbstractFixedPointAdjoint, Linearisation, Problem


class AbstractPhantom(AbstractFixedPointAdjoint):
    """A gradient of a few damped steps."""

    steps: AbstractVar[int]
    damp: AbstractVar[float]

    def __check_init__(self):
        name, steps, damp = type(self).__name__, self.steps, self.damp
        check_int(name, "steps", steps, "use deqjax.JacobianFreeAdjoint() for one undamped step.")
        if not 0 <= damp < 1:
            raise ValueError(f"{name} expects damp in [0, 1), got {damp}; pass 0 for a plain step.")


class PhantomAdjoint(AbstractPhantom):
    """The gradient of a few damped steps from the solution: the phantom gradient, unrolled.

        z[0] = z*,    z[k+1] = damp z[k] + (1 - damp) f(z[k]),    dz* := dz[steps]  with z[0] held

    The value is `z*` itself. At a fixed point the derivative is `(1 - damp) sum_k B^k (df/dtheta)`
    over k < steps, with `B = damp I + (1 - damp) J`. Its relative error to the implicit gradient is
    about `rho(B)^steps`.

    **Arguments:**

    - `steps`: an int of at least 1.
    - `damp`: in [0, 1).

    **Cost:** `steps` evaluations of `f` and VJPs; `steps` times the memory that a VJP needs.

    **When not to use it:** if the gradient has to be right (use `deqjax.ImplicitAdjoint`); if
    memory is short (`deqjax.NeumannPhantomAdjoint` gives the same at a fixed point).

    **Raises:** `ValueError` for `steps < 1` or `damp` outside [0, 1).

    Reference: Geng, Zhang, Bai, Wang, Lin, On training implicit models, NeurIPS 2021, equation 6.
    """

    steps: int = eqx.field(static=True, default=5)
    damp: float = eqx.field(static=True, default=0.5)

    def tangent(self, at: Linearisation, problem: Problem, loop: LoopResult) -> PyTree:
        del problem, loop

        def unrolled(moving):
            step = lambda z, _: (lincomb(1, z, 1 - self.damp, at.residual(z, moving)), None)
            return jax.lax.scan(step, at.vary(moving), length=self.steps)[0]

        return jax.jvp(unrolled, (at.moving,), (at.tangents,))[1]


class NeumannPhantomAdjoint(AbstractPhantom):
    """The first terms of a damped Neumann series: the phantom gradient without unrolling.

        dz* := (1 - damp) sum_{k < steps} B^k (df/dtheta) dtheta,    B = damp I + (1 - damp) J

    with J the Jacobian of `f` with respect to z at the solution. The relative error to the implicit
    gradient is about `rho(B)^steps`.

    **Arguments:** as for `deqjax.PhantomAdjoint`.

    **Cost:** one evaluation of `f` with its linearisation and `steps` VJPs; two copies of z.

    **When not to use it:** if the gradient has to be right (use `deqjax.ImplicitAdjoint`).

    **Raises:** `ValueError` for `steps < 1` or `damp` outside [0, 1).

    Reference: Geng, Zhang, Bai, Wang, Lin, On training implicit models, NeurIPS 2021, equation 7.
    """

    steps: int = eqx.field(static=True, default=5)
    damp: float = eqx.field(static=True, default=0.5)

    def tangent(self, at: Linearisation, problem: Problem, loop: LoopResult) -> PyTree:
        del problem, loop
        matvec, b = at.equation()
        first = scale(1 - self.damp, b)

        def term(y, _):
            return add(lincomb(1, y, self.damp - 1, matvec(y)), first), None

        return jax.lax.scan(term, first, length=self.steps - 1)[0]


class JacobianFreeAdjoint(AbstractFixedPointAdjoint):
    """The gradient of one application of f at the solution: `dz* := (df/dtheta) dtheta`.

    This is the first term of the Neumann series, and a descent direction of the loss if J is small
    (a contraction by less than 1/kappa, with kappa the condition number of df/dtheta).

    **Cost:** one evaluation of `f` with one VJP.

    **When not to use it:** if the gradient has to be right (use `deqjax.ImplicitAdjoint`): the
    relative error is about `rho(J)`.

    Reference: Fung, Heaton, Li, McKenzie, Osher, Yin, JFB: Jacobian-free backpropagation for
    implicit networks, AAAI 2022, equation 13.
    """

    def tangent(self, at: Linearisation, problem: Problem, loop: LoopResult) -> PyTree:
        del problem, loop
        return at.right_side()

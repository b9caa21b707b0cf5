"""Two splittings that find the fixed point of a monotone cell."""

import abc
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jaxtyping import Array, Float

from .._checks import number
from .._problem import point
from .._tree import widen
from ._base import AbstractCertified
from ._monotonicity import certify

Matrix = paramax.AbstractUnwrappable[Array] | Float[Array, "n n"]


def lipschitz(weight: Float[Array, "n n"]) -> Float[Array, ""]:
    """`||I - W||_2`, float32 or wider."""
    w = widen(weight)
    return jnp.linalg.norm(jnp.eye(len(w), dtype=w.dtype) - w, 2)


class Operator(NamedTuple):
    """The matrix that a splitting applies, and its step."""

    matrix: Float[Array, "n n"]
    step: float | Float[Array, ""]


class Forward(paramax.AbstractUnwrappable[Operator]):
    """W with a step, by default `m / L^2` of W when this is unwrapped, once per solve."""

    weight: Matrix
    step: float | None = eqx.field(static=True)
    margin: float | None = eqx.field(static=True)

    def unwrap(self) -> Operator:
        """W and the step, in the dtype of W."""
        w = paramax.unwrap(self.weight)
        if self.step is not None:
            return Operator(w, self.step)
        assert self.margin is not None
        # Neither the fixed point nor the gradient depends on the step.
        step = self.margin / lipschitz(jax.lax.stop_gradient(w)) ** 2
        return Operator(w, step.astype(w.dtype))


class Resolvent(paramax.AbstractUnwrappable[Operator]):
    """`(I + step (I - W))^-1`, computed when unwrapped, once per solve; by default step = 1/L.

    The gradient flows through it to W. The inverse exists, with norm at most `1 / (1 + step m)`.
    """

    weight: Matrix
    step: float | None = eqx.field(static=True)

    def unwrap(self) -> Operator:
        """The inverse, computed in float32 or wider, and the step, in the dtype of W."""
        weight = paramax.unwrap(self.weight)
        w, eye = widen(weight), jnp.eye(len(weight), dtype=widen(weight).dtype)
        step = self.step
        if step is None:
            # Rounded before the inverse, which has to belong to the step in use.
            step = (1 / lipschitz(jax.lax.stop_gradient(w))).astype(weight.dtype)
        wide = jnp.asarray(step, w.dtype)
        return Operator(jnp.linalg.inv(eye + wide * (eye - w)).astype(weight.dtype), step)


class AbstractSplitting(AbstractCertified):
    """The base of the two splittings: W, and a step."""

    operator: AbstractVar[Any]

    @property
    def weight(self) -> Matrix:
        """W as it is trained; `paramax.unwrap` of it is the matrix."""
        return self.operator.weight

    @property
    def step(self) -> float | None:
        """The step; `None` is the default, computed when the cell is unwrapped."""
        return self.operator.step

    @abc.abstractmethod
    def readout(self, z: Float[Array, " n"], /) -> Float[Array, " n"]:
        """The solution z*, from the fixed point of the splitting."""

    def certify(self, z, x, *, batched=False, fan_in=None):
        """Encloses z* by strong monotonicity, for either splitting and any step.

            ||z - z*||_2 <= ||r||_2 / m,        r the least residual of the inclusion

        and then `z* = relu(W z* + x)`, entry by entry, for every z* of that ball.

        **Arguments:** `z`, approximately a fixed point of the splitting, before its `readout`; `x`;
        both with the batch on axis 0 if `batched`. `fan_in` is not used: the sums are known.

        **Returns:** a `deqjax.Enclosure` of z* in exact arithmetic, float32 or wider, for W as
        `paramax.unwrap` of the weight returns it. Its m is the `margin` less the most that rounding
        can take. `relative_error` is that of `readout(z)`, entry by entry: 0 where z* is proved to
        be 0 and `readout(z)` is 0, infinite where z* may be 0 and `readout(z)` may be wrong.
        `spectral_radius` is `(0, inf)` and `steps` 0: nothing is said about J. If `holds` is false,
        nothing is said at all.

        **Cost:** three products with W and the `size^3` of W itself.

        **When not to use it:** in half precision, where nothing is proved; for a tight bound on
        single entries of a long z: the bound on the sums' rounding grows as `size^1.5 / m`.

        **Raises:** `ValueError` when traced for a weight without a `margin`, or z and x that differ
        in shape or dtype.

        Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
        2006.08591, theorem 1, for the inclusion; Bauschke and Combettes, Convex analysis and
        monotone operator theory in Hilbert spaces, 2nd ed., 2017, chapter 22, for the bound.
        """
        del fan_in
        return certify(self.weight, self.readout(point(z, batched)), x, batched)


class ForwardBackward(AbstractSplitting):
    """Forward-backward splitting of `z = relu(W z + x)`.

        f(z) = relu(z - step ((I - W) z - x))

    The fixed points are those of `relu(W z + x)`. With the symmetric part of I - W at least m and
    `L = ||I - W||_2`, f contracts in the Euclidean norm by `sqrt(1 - 2 step m + step^2 L^2)`. This
    is below 1 for `step < 2 m / L^2`, and least, `sqrt(1 - m^2 / L^2)`, at half of that step.

    **Arguments:**

    - `weight`: W of an `nn.MonotoneLinear`, whose method `forward_backward` makes this cell.
    - `step`: a Python number above 0; by default that half, m / L^2 with m the margin and L that of
        W at each solve. No gradient flows through the step, and the fixed point does not depend on
        it.

    **Call:** as `nn.MonotoneLinear`. `readout(z)` is z.

    **Cost:** size^2 products; by default, one singular value decomposition per solve in `nn.DEQ`.
    Outside of `nn.DEQ`, unwrap the cell first, as for `nn.PeacemanRachford`.

    **When not to use it:** if L is far above m, as is usual after training: the bound on the step
    shrinks as 1 / L^2, and `nn.PeacemanRachford` has no such bound.

    **Raises:** `ValueError` for a step that is not above 0, or without a step if weight has no
    `margin`.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, algorithm 1.
    """

    operator: Forward

    def __init__(self, weight: Matrix, step: float | None = None):
        # Read here: when this is unwrapped, the weight already is.
        margin = getattr(weight, "margin", None)
        if step is None and margin is None:
            raise ValueError(
                f"ForwardBackward expects a step for a weight without a margin, got "
                f"{type(weight).__name__}; pass m / L^2 as a float, or the weight of an "
                f"nn.MonotoneLinear."
            )
        self.operator = Forward(weight, _checked(step), margin)

    def __call__(self, z: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The splitting's f, of one example."""
        w, step = paramax.unwrap(self.operator)
        return jax.nn.relu((1 - step) * z + step * (w @ z + x))

    def readout(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """z* of the fixed point: itself."""
        return z


class PeacemanRachford(AbstractSplitting):
    """Peaceman-Rachford splitting of `z = relu(W z + x)`, which converges for every step.

        f(u) = 2 (I + step (I - W))^-1 (|u| + step x) - |u|,            z* = relu(u*)

    |u| = 2 relu(u) - u, and the map applied to it, are the two reflected resolvents. The first is
    nonexpansive. The second is linear here and contracts by its norm, which is at most
    `sqrt(1 - 4 step m / (1 + step L)^2)`: below 1 for every step, and least at step = 1 / L.

    **Arguments:**

    - `weight`: W of an `nn.MonotoneLinear`, whose method `peaceman_rachford` makes this cell.
    - `step`: a Python number above 0; by default 1 / L of W at each solve, where the bound is
        least. No gradient flows through the step, and z* does not depend on it.

    **Call:** `cell(u, x)`, both of shape (size,). `readout(u)` is relu(u), which `nn.DEQ` applies;
    after `deqjax.fixed_point`, apply it yourself.

    **Cost:** size^2 products; per solve in `nn.DEQ`, which unwraps the cell once, one inverse,
    size^3, and by default one singular value decomposition. Outside of `nn.DEQ`, unwrap the cell
    first (`paramax.unwrap(cell)`), or each evaluation computes the inverse again.

    **When not to use it:** for large images, whose inverse does not fit.

    **Raises:** `ValueError` for a step that is not above 0.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, algorithm 2.
    """

    operator: Resolvent

    def __init__(self, weight: Matrix, step: float | None = None):
        self.operator = Resolvent(weight, _checked(step))

    def __call__(self, u: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """The splitting's f, of one example."""
        # Not jnp.abs: at u = 0 its derivative would not be that of the readout's relu.
        v = 2 * jax.nn.relu(u) - u
        inverse, step = paramax.unwrap(self.operator)
        return 2 * (inverse @ (v + step * x)) - v

    def readout(self, u: Float[Array, " n"]) -> Float[Array, " n"]:
        """z* of the fixed point u*: relu(u*)."""
        return jax.nn.relu(u)


def _checked(step: float | None) -> float | None:
    if step is not None and not 0 < number(step) < math.inf:
        raise ValueError(
            f"A splitting expects a finite Python number above 0 as step, got {step!r}; leave it "
            f"out for 1 / L in Peaceman-Rachford and m / L^2 in forward-backward."
        )
    return None if step is None else number(step)

"""Cells `sigma(W z + x)`, W >= 0, that have exactly one fixed point whatever they have learnt."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..positive import Properties, StrictlyPositive, qualify
from ._base import (
    AbstractPositiveCell,
    Nonnegative,
    Weight,
    certify_concave,
    fill,
)


class AbstractPositiveConcave(AbstractPositiveCell):
    """The base of the two cells: everything but the product `W z`."""

    def __check_init__(self):
        StrictlyPositive(self.floor, self.sharpness)

    def __call__(self, z: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`sigma(W z + x)` of one example; `x` has been through `inject`."""
        return self.activation(self.product(z) + x)

    def initial(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`sigma(x)`, which is f(0) without the product: below the fixed point."""
        return self.activation(x)

    def certify(self, z, x, *, batched=False, fan_in=None):
        """Encloses the fixed point by `deqjax.certify`, whose hypotheses hold by construction."""
        return certify_concave(self, z, x, batched=batched, fan_in=fan_in)


class PositiveConcaveLinear(AbstractPositiveConcave):
    """The cell `sigma(W z + x)` on vectors, W >= 0: one fixed point, whatever W has learnt.

        kind 1 (sigma(0) = 0: tanh, soft_sign, relu6, ...)  inject(x) = softplus(s x) / s + floor
        kind 2 (sigma(0) > 0: sigmoid, hard_sigmoid)        inject(x) = relu(x)

    f is positive and concave on z >= 0, hence has at most one fixed point there; sigma grows slower
    than any line, hence it has one; Picard iteration reaches it geometrically from every z >= 0.
    There is no bias: a negative one would break this, a positive one belongs to x.

    **Arguments:**

    - `size`: length of z and x.
    - `activation`: one that `deqjax.positive.qualify` accepts: a function of
        `deqjax.positive.ACTIVATIONS`, the function itself, or a `positive.Shifted` or
        `positive.Power`.
    - `nonnegative`: W as a function of its parameter, `jnp.square` or `jax.nn.softplus`; or `None`:
        W is the parameter, and `positive.project` follows every update. The initial W is the same.
    - `floor`: the least injected input of kind 1, above 0. The floor limits how close to 0 the
        fixed point comes, and so how slow the iteration can become.
    - `sharpness`: s above; the reference uses 5.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial weight.

    **Call:** `cell(z, inject(x))`, both of shape (size,), z >= 0. `weight` is a
    `paramax.Parameterize`, or an array with `nonnegative=None`: `nn.DEQ` unwraps it once per solve,
    a direct call at each call.

    **Cost:** size^2 products; one copy of z.

    **When not to use it:** if hidden units must inhibit each other: W >= 0 cannot.

    **Raises:** `ValueError` for another activation or `nonnegative`, a `floor` or `sharpness` that
    is not a finite number above 0, or a size that is not an int above 0.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    known: Properties = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        nonnegative: Nonnegative = jnp.square,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        qualify(activation)
        fill(self, (size,), activation, nonnegative, floor, sharpness, dtype, key)


class PositiveConcaveConv2d(AbstractPositiveConcave):
    """`PositiveConcaveLinear` on images: the cell `sigma(W * z + x)`, W >= 0 a convolution.

    **Arguments:**

    - `channels`: of z and x.
    - `kernel_size`: odd, in pixels; zero padding keeps the image's size.
    - `activation`, `nonnegative`, `floor`, `sharpness`, `dtype`, `key`: as for
        `PositiveConcaveLinear`.

    **Call:** `cell(z, inject(x))`, both of shape (H, W, channels), channels last.

    **Cost:** one `nn.Conv2d`; one copy of z.

    **When not to use it:** as for `PositiveConcaveLinear`.

    **Raises:** `ValueError` as `PositiveConcaveLinear`, and for an even kernel.

    Reference: as for `PositiveConcaveLinear`.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    known: Properties = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        nonnegative: Nonnegative = jnp.square,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        qualify(activation)
        fill(self, (channels, kernel_size), activation, nonnegative, floor, sharpness, dtype, key)

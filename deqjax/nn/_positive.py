"""Cells `sigma(W z + x)`, W >= 0, that have exactly one fixed point whatever they have learnt."""

import abc
import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..positive import qualify
from ._base import check_kernel_size, conv2d

Weight = paramax.AbstractUnwrappable[Array] | Float[Array, "..."]


class AbstractPositiveConcave(eqx.Module):
    """What the two cells share: everything but the product `W z`."""

    weight: AbstractVar[Weight]
    activation: AbstractVar[Callable[[Array], Array]]
    floor: AbstractVar[float]
    sharpness: AbstractVar[float]

    @abc.abstractmethod
    def product(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """`W z`."""

    def __check_init__(self):
        qualify(self.activation)
        if not (self.floor > 0 and self.sharpness > 0):
            raise ValueError(
                f"A positive concave cell expected floor > 0 and sharpness > 0, got floor="
                f"{self.floor} and sharpness={self.sharpness}: its input has to stay positive. "
                f"Use 1e-3 and 5."
            )

    def inject(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Make the input positive (`nn.DEQ` does it, once before the solve); see the class."""
        if qualify(self.activation).kind == 2:
            return jax.nn.relu(x)
        # In float32 this softplus is exactly 0 below x = -21. With x = 0 the origin is a second
        # fixed point, and Picard from 0 stays there.
        return jax.nn.softplus(self.sharpness * x) / self.sharpness + self.floor

    def __call__(self, z: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """`sigma(W z + x)` of one example; `x` has been through `inject`."""
        return self.activation(self.product(z) + x)


def _nonnegative(shape: tuple[int, ...], dtype: DTypeLike | None, key: PRNGKeyArray) -> Weight:
    # W = v^2, W0 ~ U(0, 1) sqrt(1e-4) / sqrt(out + in) as in the reference.
    # Why not softplus(v): Adam moves v by the learning rate, whatever the gradient's size. W = 4e-4
    # is v = 0.02 here, so that a step of 1e-3 changes W by 10 %; it is v = -8 there, where the step
    # changes W by 0.1 %, and where weight decay, pulling v to 0, pulls W up to log 2.
    # Why not a clamp and weight norm, as in the reference: a row of zeros gives 0/0.
    scale = math.sqrt(1e-4) / math.sqrt(shape[-2] + shape[-1])
    v = jnp.sqrt(scale * jax.random.uniform(key, shape, dtype))
    return paramax.Parameterize(jnp.square, v)


class PositiveConcaveLinear(AbstractPositiveConcave):
    """The cell `sigma(W z + x)` on vectors, W >= 0: one fixed point, whatever W has learnt.

        kind 1 (sigma(0) = 0: tanh, soft_sign, relu6, ...)  inject(x) = softplus(s x) / s + floor
        kind 2 (sigma(0) > 0: sigmoid, hard_sigmoid)        inject(x) = relu(x)

    f is positive and concave on z >= 0, hence has at most one fixed point there; sigma grows slower
    than any line, hence it has one; Picard iteration reaches it geometrically from every z >= 0.
    There is no bias: a negative one would break this, a positive one belongs to x.

    **Arguments:**

    - `size`: length of z and x.
    - `activation`: one of `deqjax.positive.ACTIVATIONS`, the function itself.
    - `floor`: the least injected input of kind 1, above 0. It bounds how close to 0 the fixed point
        comes, and so how slow the iteration can get.
    - `sharpness`: s above, the reference's 5.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial weight.

    **Call:** `cell(z, inject(x))`, both of shape (size,), z >= 0. `weight` is a
    `paramax.Parameterize`: `nn.DEQ` unwraps it once per solve, a call by hand at each call.

    **Cost:** size^2 products; one copy of z.

    **When not to use it:** if hidden units must inhibit each other: W >= 0 cannot.

    **Raises:** `ValueError` for another activation, or `floor` or `sharpness` not above 0.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        self.weight = _nonnegative((size, size), dtype, key)
        self.activation = activation
        self.floor = floor
        self.sharpness = sharpness

    def product(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """`W z`."""
        return paramax.unwrap(self.weight) @ z


class PositiveConcaveConv2d(AbstractPositiveConcave):
    """The cell `sigma(W * z + x)` on images, W >= 0 a convolution; else `PositiveConcaveLinear`.

    **Arguments:**

    - `channels`: of z and x.
    - `kernel_size`: odd, in pixels; zero padding keeps the image's size.
    - `activation`, `floor`, `sharpness`, `dtype`, `key`: as for `PositiveConcaveLinear`.

    **Call:** `cell(z, inject(x))`, both of shape (H, W, channels), channels last.

    **Cost:** one `nn.Conv2d`; one copy of z.

    **When not to use it:** as for `PositiveConcaveLinear`.

    **Raises:** `ValueError` as `PositiveConcaveLinear`, and for an even kernel.

    Reference: as for `PositiveConcaveLinear`.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        activation: Callable[[Array], Array] = jnp.tanh,
        *,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_kernel_size(kernel_size)
        shape = (kernel_size, kernel_size, channels, channels)
        self.weight = _nonnegative(shape, dtype, key)
        self.activation = activation
        self.floor = floor
        self.sharpness = sharpness

    def product(self, z: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """`W * z`."""
        return conv2d(z[None], paramax.unwrap(self.weight))[0]

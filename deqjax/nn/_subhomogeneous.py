"""Cells that contract by a known factor in the Thompson metric, whatever they have learnt."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ..positive import Shifted, StrictlyPositive, properties
from ._base import (
    AbstractPositiveCell,
    Nonnegative,
    Weight,
    check_kernel_size,
    conv2d,
    nonnegative_weight,
)


class AbstractSubhomogeneous(AbstractPositiveCell):
    """What the two cells share: everything but the product `W z`."""

    normalise: AbstractVar[bool]

    def __check_init__(self):
        StrictlyPositive(self.floor, self.sharpness)
        mu = properties(self.activation).subhomogeneity
        if not self.rate < 1:
            raise ValueError(
                f"A subhomogeneous cell expected an activation with mu < 1, or mu < 1/2 if it is "
                f"normalised, got {self.activation!r} with mu = {mu} and normalise="
                f"{self.normalise}. Use positive.Shifted(jnp.tanh, 1.2), jax.nn.sigmoid or a "
                f"positive.Power below that."
            )

    @property
    def rate(self) -> float:
        """The factor by which an evaluation of f contracts: mu, or 2 mu if normalised."""
        return properties(self.activation).subhomogeneity * (2 if self.normalise else 1)

    def __call__(self, z: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """f of one example; `x` has been through `inject`."""
        y = self.activation(self.product(z) + x)
        return y / jnp.max(y) if self.normalise else y


class SubhomogeneousLinear(AbstractSubhomogeneous):
    """The cell `sigma(W z + x)` on vectors, W >= 0, x >= 0, or that over its largest entry.

        f(z) = y     or     y / max(y),          y = sigma(W z + x)
        d(f(y), f(z)) <= rate d(y, z),           d(y, z) = max |log(y / z)|, on y, z > 0

    with rate = mu or 2 mu, mu = sup u sigma'(u) / sigma(u): since `|J| z <= mu f(z)`, f is
    mu-Lipschitz in d, the Thompson metric; dividing by a norm at most doubles a distance. Where the
    rate is below 1, f has exactly one fixed point, whatever W is and however large, and Picard's
    error falls by that factor a step, from any z > 0.

    The theorem has `|W|` where f has W: it holds for W >= 0. With W = [[1, -1], [-1, 1]] and x = 0,
    tanh(W z) + 1.2 has three fixed points.

    **Arguments:**

    - `size`: length of z and x.
    - `activation`: of `deqjax.positive.PROPERTIES`, or one that carries its own record, with a
        `subhomogeneity` mu below 1 (1/2 if normalised): `positive.Shifted(jnp.tanh, 1.2)` (0.247),
        `jax.nn.sigmoid` (0.278), `positive.Power(p)` (p), ...
    - `normalise`: whether to divide by the largest entry, which gives z a fixed scale.
    - `nonnegative`, `floor`, `sharpness`, `dtype`, `key`: as for `nn.PositiveConcaveLinear`.

    **Call:** `cell(z, inject(x))`, both of shape (size,), z >= 0. `cell.rate` is the factor.

    **Cost:** size^2 products; one copy of z.

    **When not to use it:** where depth is wanted: at a rate of 0.25 an output to four digits is
    that of a network with 7 layers.

    **Raises:** `ValueError` for an activation with a larger mu, or as `nn.PositiveConcaveLinear`.

    Reference: Sittoni and Tudisco, Subhomogeneous deep equilibrium models, ICML 2024, arXiv
    2403.00720, sections 3 to 5.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        activation: Callable[[Array], Array] = Shifted(jnp.tanh, 1.2),
        *,
        normalise: bool = False,
        nonnegative: Nonnegative = jnp.square,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        self.weight = nonnegative_weight((size, size), dtype, key, nonnegative)
        self.activation = activation
        self.normalise = normalise
        positive = StrictlyPositive(floor, sharpness)
        self.floor, self.sharpness = positive.floor, positive.sharpness

    def product(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """`W z`."""
        return paramax.unwrap(self.weight) @ z


class SubhomogeneousConv2d(AbstractSubhomogeneous):
    """`nn.SubhomogeneousLinear` on images, W >= 0 a convolution.

    **Arguments:**

    - `channels`: of z and x.
    - `kernel_size`: odd, in pixels; zero padding keeps the image's size.
    - `activation`, `normalise` (by the largest entry of the image), `nonnegative`, `floor`,
        `sharpness`, `dtype`, `key`: as for `SubhomogeneousLinear`.

    **Call:** `cell(z, inject(x))`, both of shape (H, W, channels), channels last.

    **Cost:** one `nn.Conv2d`; one copy of z.

    **When not to use it:** as for `SubhomogeneousLinear`.

    **Raises:** `ValueError` as `SubhomogeneousLinear`, and for an even kernel.

    Reference: as for `SubhomogeneousLinear`.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)
    floor: float = eqx.field(static=True)
    sharpness: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        activation: Callable[[Array], Array] = Shifted(jnp.tanh, 1.2),
        *,
        normalise: bool = False,
        nonnegative: Nonnegative = jnp.square,
        floor: float = 1e-3,
        sharpness: float = 5.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_kernel_size(kernel_size)
        shape = (kernel_size, kernel_size, channels, channels)
        self.weight = nonnegative_weight(shape, dtype, key, nonnegative)
        self.activation = activation
        self.normalise = normalise
        positive = StrictlyPositive(floor, sharpness)
        self.floor, self.sharpness = positive.floor, positive.sharpness

    def product(self, z: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        """`W * z`."""
        return conv2d(z[None], paramax.unwrap(self.weight))[0]

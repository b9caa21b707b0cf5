"""Cells that contract by a known factor in the Thompson metric, whatever they have learnt."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from equinox import AbstractVar
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._problem import point_like
from .._program import run
from .._tree import stop_gradient, widen
from ..positive import Enclosure, Properties, Shifted, StrictlyPositive
from ..positive._bracket import Bracket
from ..positive._rounding import rounding
from ..positive._thompson import enclose
from ._base import (
    AbstractPositiveCell,
    Nonnegative,
    Weight,
    fill,
)


class AbstractSubhomogeneous(AbstractPositiveCell):
    """The base of the two cells: everything but the product `W z`."""

    normalise: AbstractVar[bool]

    def __check_init__(self):
        StrictlyPositive(self.floor, self.sharpness)
        if not self.rate < 1:
            raise ValueError(
                f"A subhomogeneous cell expects an activation with mu < 1, or mu < 1/2 if it is "
                f"normalised, got {self.activation!r} with mu = {self.known.subhomogeneity} and "
                f"normalise={self.normalise}; use positive.Shifted(jnp.tanh, 1.2), jax.nn.sigmoid "
                f"or a positive.Power with a smaller mu."
            )

    @property
    def rate(self) -> float:
        """The factor by which an evaluation of f contracts: mu, or 2 mu if normalised."""
        return self.known.subhomogeneity * (2 if self.normalise else 1)

    def __call__(self, z: Float[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """f of one example; `x` has been through `inject`."""
        y = self.activation(self.product(z) + x)
        return y / jnp.max(y) if self.normalise else y

    def certify(self, z, x, *, batched=False, fan_in=None):
        """Encloses the fixed point by the contraction of f, normalised or not.

            d(z*, f(z)) <= rate / (1 - rate) d(f(z), z),         d(y, z) = max |log(y / z)|

        for every z > 0. If `|log(y / z)| <= t`, then `W y + x` is within a factor e^t of `W z + x`,
        for W >= 0 and x >= 0. After sigma the factor is e^(mu t), since `log sigma(e^s)` has a
        slope of at most mu. The two largest entries differ by no more, and y / max(y) by
        e^(2 mu t). f need not be monotone; the normalised f is not.

        **Arguments:** the injected `x` and `z`, of the same shape and dtype, both with the batch on
        axis 0 if `batched`; `fan_in` as in `deqjax.certify`.

        **Returns:** a `deqjax.Enclosure` of the one z* > 0 of f in exact arithmetic, for W and x as
        given and the numbers of the activation in the dtype of z. `spectral_radius` is `(0, rate)`,
        and `steps` 0. `holds` requires that W >= 0, x >= 0 and z > 0 are finite; if it is false,
        nothing is said.

        **Cost:** one evaluation of f.

        **When not to use it:** in half precision, where rounding leaves a wide enclosure. For your
        own activation, the roundings are counted in its jaxpr, but its `subhomogeneity` is not
        checked.

        **Raises:** `ValueError` when traced for z and x that differ in shape or dtype, or, without
        a `fan_in`, for an activation whose rounding cannot be counted.

        Reference: Sittoni and Tudisco, Subhomogeneous deep equilibrium models, ICML 2024, arXiv
        2403.00720, sections 3 and 4; Lemmens and Nussbaum, Nonlinear Perron-Frobenius theory, 2012,
        chapter 2.
        """
        cell, z, x = stop_gradient((self, point_like(z, x, batched), x))
        return run(_certify, cell, z, x, fan_in, batched)


def _certify(cell: AbstractSubhomogeneous, z, x, fan_in: int | None, batched: bool) -> Enclosure:
    cell = paramax.unwrap(cell)
    weight: Any = cell.weight
    nonnegative = jnp.all((weight >= 0) & jnp.isfinite(weight))
    # More than all products of a sum lose by flushing to 0; the largest number in float16.
    info = jnp.finfo(z.dtype)
    flushed = min(float(info.tiny) * 2.0**40, float(info.max))

    def one(z, x):
        u = lambda z, x: cell.product(z) + x
        above = lambda z, x: cell.activation(u(z, x) + flushed)
        slack = 1.01 * rounding(lambda z, x: (above(z, x), None), z, x, fan_in, "certify", rank=0)
        low, high = widen(cell.activation(u(z, x))), widen(above(z, x))
        eps = float(jnp.finfo(low.dtype).eps)
        valid = nonnegative & jnp.all((x >= 0) & jnp.isfinite(x) & (low >= float(info.tiny)))
        image = Bracket(low * (1 - jnp.minimum(slack + 2 * eps, 1)), high * (1 + slack + 2 * eps))
        if cell.normalise:
            image = Bracket(
                image.lower / jnp.max(image.upper) * (1 - eps),
                jnp.minimum(image.upper / jnp.max(image.lower) * (1 + eps), 1),
            )
        return enclose(z, image, cell.rate, valid)

    with jax.default_matmul_precision("highest"):
        return (jax.vmap(one) if batched else one)(z, x)


class SubhomogeneousLinear(AbstractSubhomogeneous):
    """The cell `sigma(W z + x)` on vectors, W >= 0, x >= 0, or this over its largest entry.

        f(z) = y     or     y / max(y),          y = sigma(W z + x)
        d(f(y), f(z)) <= rate d(y, z),           d(y, z) = max |log(y / z)|, on y, z > 0

    with rate = mu or 2 mu, mu = sup u sigma'(u) / sigma(u): since `|J| z <= mu f(z)`, f is
    mu-Lipschitz in d, the Thompson metric; dividing by a norm at most doubles a distance. If the
    rate is below 1, f has exactly one fixed point, whatever W is and however large. The error of
    Picard iteration then falls by this factor per step, from any z > 0.

    The theorem has `|W|` where f has W, so it holds for W >= 0. With W = [[1, -1], [-1, 1]] and
    x = 0, tanh(W z) + 1.2 has three fixed points.

    **Arguments:**

    - `size`: length of z and x.
    - `activation`: one of `deqjax.positive.PROPERTIES`, or one that states its own properties, with
        a `subhomogeneity` mu below 1 (1/2 if normalised): `positive.Shifted(jnp.tanh, 1.2)`
        (0.247), `jax.nn.sigmoid` (0.278), `positive.Power(p)` (p), ...
    - `normalise`: whether to divide by the largest entry, which gives z a fixed scale.
    - `nonnegative`, `floor`, `sharpness`, `dtype`, `key`: as for `nn.PositiveConcaveLinear`.

    **Call:** `cell(z, inject(x))`, both of shape (size,), z >= 0. `cell.rate` is the factor.

    **Cost:** size^2 products; one copy of z.

    **When not to use it:** if depth is wanted: at a rate of 0.25, a network with 7 layers has the
    same output to four digits.

    **Raises:** `ValueError` for an activation with a larger mu, or as `nn.PositiveConcaveLinear`.

    Reference: Sittoni and Tudisco, Subhomogeneous deep equilibrium models, ICML 2024, arXiv
    2403.00720, sections 3 to 5.
    """

    weight: Weight
    activation: Callable[[Array], Array] = eqx.field(static=True)
    known: Properties = eqx.field(static=True)
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
        fill(self, (size,), activation, nonnegative, floor, sharpness, dtype, key)
        self.normalise = normalise


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
    known: Properties = eqx.field(static=True)
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
        fill(self, (channels, kernel_size), activation, nonnegative, floor, sharpness, dtype, key)
        self.normalise = normalise

"""Bounds around the fixed point of a map that contracts in the Thompson metric.

For f on z > 0 with `d(f(y), f(z)) <= rate d(y, z)`, `d(y, z) = max |log(y / z)|` and rate < 1,
the triangle inequality `d(z*, f(z)) <= rate d(z*, z) <= rate (d(z*, f(z)) + d(f(z), z))` gives

    d(z*, f(z)) <= rate / (1 - rate) d(f(z), z),

from one evaluation, whether f is monotone or not. By Banach's theorem there is exactly one z* > 0:
z > 0 is complete in d (Thompson, Proc. AMS 14 (1963); Lemmens and Nussbaum, Nonlinear
Perron-Frobenius theory, 2012, chapter 2).
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._tree import widen
from ._bracket import Bracket, consistent, relative_error
from ._certify import Enclosure

# The assumed relative error of log1p and exp, in eps: ten times the largest error over 4e6 points
# on a CPU, which is 1.2.
_FUNCTIONS = 12


def enclose(
    z: Float[Array, "*s"],
    image: Bracket,
    rate: float,
    valid: Bool[Array, ""],
) -> Enclosure:
    """The `Enclosure` of z*, for one z of the state's own dtype.

    **Arguments:** `image`, two bounds of f(z) in exact arithmetic, float32 or wider; `rate`, in
    exact arithmetic too; `valid`, whether f satisfies the hypotheses of the theorem.
    """
    low, high = image
    x, eps = widen(z), float(jnp.finfo(low.dtype).eps)
    # The numbers in f are rounded to its dtype, and so is the rate.
    rate = rate * (1 + 2 * float(jnp.finfo(z.dtype).eps) + 1e-9)
    power = rate / (1 - rate) if rate < 1 else math.inf
    # The distance d(f(z), z) and the bounds on z*, widened by their rounding.
    positive = lambda v: jnp.where(v > 0, v, 1)
    quotient = jnp.maximum(high / positive(x), x / positive(low))
    valid = valid & jnp.all((x > 0) & jnp.isfinite(x) & (low > 0) & jnp.isfinite(high))
    quotient = jnp.max(jnp.maximum(quotient, 1)) * (1 + 2 * eps)
    distance = jnp.log1p(quotient - 1)
    growth = jnp.exp(power * distance * (1 + _FUNCTIONS * eps)) * (1 + _FUNCTIONS * eps)
    lower = jnp.maximum(low / growth * (1 - 4 * eps) - jnp.finfo(low.dtype).tiny, 0)
    upper = high * growth * (1 + 4 * eps)
    bracket = Bracket(lower.reshape(-1), upper.reshape(-1))
    holds = valid & jnp.all(jnp.isfinite(upper)) & consistent(bracket)
    error = relative_error(x.reshape(-1), bracket)
    proved = lambda value, otherwise: jnp.where(holds, value, jnp.asarray(otherwise, low.dtype))
    return Enclosure(
        proved(lower, 0),
        proved(upper, jnp.inf),
        proved(error, jnp.inf),
        (jnp.zeros_like(error), proved(rate, jnp.inf)),
        jnp.zeros(error.shape, jnp.int32),
        holds,
    )

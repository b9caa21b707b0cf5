"""Two vectors between which the fixed point lies, and how an evaluation of f narrows them.

For a monotone f with exactly one fixed point that Picard iteration finds from everywhere,

    f(y) <= y  implies  z* <= f(y) <= y,        f(y) >= y  implies  z* >= f(y) >= y,

since Picard iteration falls from the one and rises from the other. Tested in floating point with
a relative bound of the rounding of f, this is a proof, whatever led to y.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._tree import quotient

# A bound of the relative rounding of f, of each problem or of all; infinite where there is none.
Slack = float | Float[Array, "*b"]


class Bracket(NamedTuple):
    """`lower <= z* <= upper`."""

    lower: Float[Array, "*b n"]
    upper: Float[Array, "*b n"]


def _margin(slack: Slack, dtype) -> Float[Array, "*b 1"]:
    # The products below round too.
    slack = jnp.asarray(slack, dtype)[..., None]
    return 1.01 * slack + 2 * float(jnp.finfo(dtype).eps)


# A sum of which this is left has lost less than its rounding to terms that were flushed to 0. Of
# float32, which a leaf of a float64 state may be too.
_LEAST = 2.0**-126 * 2.0**40


def at_most(fy: Float[Array, "*b n"], slack: Slack) -> Float[Array, "*b n"]:
    """An upper bound of f(y), from its value in floating point."""
    return fy * (1 + _margin(slack, fy.dtype)) + jnp.finfo(fy.dtype).tiny


def at_least(fy: Float[Array, "*b n"], slack: Slack) -> Float[Array, "*b n"]:
    """A lower bound of f(y); a function of nonnegative numbers is nonnegative."""
    tiny = jnp.finfo(fy.dtype).tiny
    return jnp.maximum(fy * (1 - jnp.minimum(_margin(slack, fy.dtype), 1)) - tiny, 0)


def narrow(
    bracket: Bracket, y: Float[Array, "*b n"], fy: Float[Array, "*b n"], slack: Slack
) -> tuple[Bracket, Bool[Array, "*b"], Bool[Array, "*b"]]:
    """The bracket with what `f(y)` proves, and whether y is an upper and a lower point."""
    high, low = at_most(fy, slack), at_least(fy, slack)
    # Beyond a bound of z* no test is needed: f is monotone, and z* is f(z*).
    above = jnp.all(high <= y, -1) | jnp.all(y >= bracket.upper, -1)
    below = jnp.all(low >= y, -1) | jnp.all(y <= bracket.lower, -1)
    # f is what it is on y >= 0, and positive there; what has nearly vanished on the way to f(y) has
    # lost its digits, and what is not finite has overflowed.
    normal = jnp.all((y >= 0) & jnp.isfinite(fy) & (fy >= _LEAST), -1)
    above, below = above & normal, below & normal
    upper = jnp.where(above[..., None], jnp.minimum(bracket.upper, high), bracket.upper)
    lower = jnp.where(below[..., None], jnp.maximum(bracket.lower, low), bracket.lower)
    # An upper bound that f exceeds at that bound is none: no bracket is left.
    false = normal & jnp.all(y == bracket.upper, -1) & jnp.any(low > bracket.upper, -1)
    return Bracket(jnp.where(false[..., None], jnp.inf, lower), upper), above, below


def consistent(bracket: Bracket) -> Bool[Array, "*b"]:
    """Whether the two do not contradict each other, as they may if f is not what it should be."""
    return jnp.all(bracket.lower <= bracket.upper, -1)


def relative_error(z: Float[Array, "*b n"], bracket: Bracket) -> Float[Array, "*b"]:
    """The largest `|z_i - t_i| / t_i` over t in the bracket: it is taken at one of its ends."""

    def at(end):
        end = jnp.where(jnp.isfinite(end), end, 1)
        return quotient(jnp.abs(z - end), end)

    worst = jnp.max(jnp.maximum(at(bracket.lower), at(bracket.upper)), -1)
    known = jnp.all(jnp.isfinite(bracket.upper), -1) & consistent(bracket)
    # A subtraction and a division.
    worst = worst * (1 + 4 * jnp.finfo(worst.dtype).eps)
    return jnp.where(known & ~jnp.isnan(worst), worst, jnp.inf)


def intersection(one: Bracket, other: Bracket) -> Bracket:
    """The bracket that both prove."""
    return Bracket(jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper))


def centre(bracket: Bracket) -> Float[Array, "*b n"]:
    """The harmonic mean: of all points the one whose relative error is the least at worst."""
    # 2 l u / (l + u) without the product, which could overflow; 2 l where u is not known.
    return 2 * bracket.lower / (1 + bracket.lower / bracket.upper)

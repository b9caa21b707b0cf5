"""Two vectors that enclose the fixed point, and the rule by which an evaluation of f narrows them.

For a monotone f with exactly one fixed point that Picard iteration finds from everywhere,

    f(y) <= y  implies  z* <= f(y) <= y,        f(y) >= y  implies  z* >= f(y) >= y,

since Picard iteration decreases from the first y and increases from the second. Tested in floating
point, with a relative bound on the rounding of f, this is a proof, wherever y comes from.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._tree import quotient

# A bound on the relative rounding of f, per problem or for all; infinite if there is none.
Slack = float | Float[Array, "*b"]


class Bracket(NamedTuple):
    """`lower <= z* <= upper`."""

    lower: Float[Array, "*b n"]
    upper: Float[Array, "*b n"]


def _margin(slack: Slack, dtype) -> Float[Array, "*b 1"]:
    # The products below round too.
    slack = jnp.asarray(slack, dtype)[..., None]
    return 1.01 * slack + 2 * float(jnp.finfo(dtype).eps)


# A sum of at least this size has lost less than its rounding to terms that were flushed to 0. The
# number is that of float32: a leaf of a float64 state may be float32 too.
_LEAST = 2.0**-126 * 2.0**40


def at_most(fy: Float[Array, "*b n"], slack: Slack) -> Float[Array, "*b n"]:
    """An upper bound on f(y), from its value in floating point."""
    return fy * (1 + _margin(slack, fy.dtype)) + jnp.finfo(fy.dtype).tiny


def at_least(fy: Float[Array, "*b n"], slack: Slack) -> Float[Array, "*b n"]:
    """A lower bound on f(y); f of nonnegative numbers is nonnegative."""
    tiny = jnp.finfo(fy.dtype).tiny
    return jnp.maximum(fy * (1 - jnp.minimum(_margin(slack, fy.dtype), 1)) - tiny, 0)


def narrow(
    bracket: Bracket, y: Float[Array, "*b n"], fy: Float[Array, "*b n"], slack: Slack
) -> tuple[Bracket, Bool[Array, "*b"], Bool[Array, "*b"]]:
    """The bracket narrowed by f(y); whether y is an upper point; whether it is a lower point."""
    high, low = at_most(fy, slack), at_least(fy, slack)
    # A y beyond a bound on z* needs no test: f is monotone, and z* is f(z*).
    above = jnp.all(high <= y, -1) | jnp.all(y >= bracket.upper, -1)
    below = jnp.all(low >= y, -1) | jnp.all(y <= bracket.lower, -1)
    # f has its properties on y >= 0, and is positive there. An entry of f(y) that has nearly
    # vanished has lost its digits, and one that is not finite has overflowed.
    normal = jnp.all((y >= 0) & jnp.isfinite(fy) & (fy >= _LEAST), -1)
    above, below = above & normal, below & normal
    upper = jnp.where(above[..., None], jnp.minimum(bracket.upper, high), bracket.upper)
    lower = jnp.where(below[..., None], jnp.maximum(bracket.lower, low), bracket.lower)
    # An upper bound is false if f exceeds it at that bound: no bracket is left.
    false = normal & jnp.all(y == bracket.upper, -1) & jnp.any(low > bracket.upper, -1)
    return Bracket(jnp.where(false[..., None], jnp.inf, lower), upper), above, below


def consistent(bracket: Bracket) -> Bool[Array, "*b"]:
    """Whether the bounds do not contradict each other; they may if f violates the hypotheses."""
    return jnp.all(bracket.lower <= bracket.upper, -1)


def relative_error(z: Float[Array, "*b n"], bracket: Bracket) -> Float[Array, "*b"]:
    """The largest `|z_i - t_i| / t_i` over t in the bracket, which occurs at one of its ends."""

    def at(end):
        end = jnp.where(jnp.isfinite(end), end, 1)
        return quotient(jnp.abs(z - end), end)

    worst = jnp.max(jnp.maximum(at(bracket.lower), at(bracket.upper)), -1)
    known = jnp.all(jnp.isfinite(bracket.upper), -1) & consistent(bracket)
    # The rounding of a subtraction and a division.
    worst = worst * (1 + 4 * jnp.finfo(worst.dtype).eps)
    return jnp.where(known & ~jnp.isnan(worst), worst, jnp.inf)


def intersection(one: Bracket, other: Bracket) -> Bracket:
    """The bracket that both prove."""
    return Bracket(jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper))


def centre(bracket: Bracket) -> Float[Array, "*b n"]:
    """The harmonic mean: the point with the least worst-case relative error."""
    # 2 l u / (l + u) without the product, which could overflow; 2 l if u is infinite.
    return 2 * bracket.lower / (1 + bracket.lower / bracket.upper)

"""Points just above and just below the fixed point of a concave f, by products with its Jacobian.

With `r = f(z) - z`, J = df/dz at z, a weight v > 0 with `J v < v`, and `d = r + ... + J^(k-1) r`,

    u = z + d + t v,        t = max_i (J^k r)_i / (v - J v)_i

has `f(u) <= f(z) + J (u - z) <= u`, by concavity. The point below z is analogous, as far as f is
linear. Each pass adds a term to d, and takes a power step with v. The caller proves the points.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._tree import Axes, select, vary

# The first pass takes one product, each further pass two. Passes from the third on shortened no
# bound by more than 3 % (tanh, relu6, sigmoid, softsign, dense, rho(J) from 0.1 to 0.996).
_PASSES = 5
# Another pass is worth its products if the part t v is more than the first share of the bound, and
# the last pass shortened the bound to less than the second share of its length.
_OPEN, _SHORTER = 0.75, 0.9
# The share of z that a weight keeps where J has a row of zeros: a saturated unit.
_FLOOR = 0.1


class End(NamedTuple):
    """A candidate for an end of the enclosure, not proved yet."""

    step: Float[Array, "*b n"]  # away from z
    close: Float[Array, "*b n"]  # t v, the last part of the step
    size: Float[Array, "*b"]  # of the step, relative to z, or to f(z) if that is more
    closed: Float[Array, "*b"]  # the part of size that is t v


class Candidates(NamedTuple):
    """The two ends of the least bound so far, and the values for the next pass."""

    term: Float[Array, "*b n"]  # J^k r
    sum: Float[Array, "*b n"]  # d
    weight: Float[Array, "*b n"]  # v, at most z, or f(z) if that is more
    product: Float[Array, "*b n"]  # J v
    up: End
    down: End
    steps: Int[Array, "*b"]  # products with J
    going: Bool[Array, "*b"]


def candidates(
    jvp: Callable,
    z: Float[Array, "*b n"],
    fz: Float[Array, "*b n"],
    margin: Float[Array, "*b n"],
    axes: Axes,
) -> Candidates:
    """Looks for an upper and a lower point that hold with a `margin`, the rounding of f at z."""
    base = jnp.maximum(z, fz)
    shape, zero = z.shape[:-1], jnp.zeros_like(z)
    inf = jnp.full(shape, jnp.inf, z.dtype)
    none = End(zero, zero, inf, inf)
    count, yes = jnp.ones(shape, jnp.int32), jnp.ones(shape, bool)
    first = Candidates(fz - z, zero, base, jvp(base), none, none, count, yes)
    going = lambda c: jnp.any(c.going & (c.steps < 2 * _PASSES + 1))
    compared = lambda c: _compared(c, base, margin)
    further = lambda c: select(c.going, compared(_longer(jvp, c, base)), c)
    return jax.lax.while_loop(going, further, vary(compared(vary(first, axes)), axes))


def _longer(jvp: Callable, c: Candidates, base: Float[Array, "*b n"]) -> Candidates:
    """Adds one term to d, and takes one power step of the weight."""
    weight = jnp.maximum(c.product, _FLOOR * base)
    weight = weight / jnp.max(weight / base, -1, keepdims=True)
    return c._replace(
        term=jvp(c.term),
        sum=c.sum + c.term,
        weight=weight,
        product=jvp(weight),
        steps=c.steps + 2,
    )


def _compared(
    c: Candidates, base: Float[Array, "*b n"], margin: Float[Array, "*b n"]
) -> Candidates:
    """Keeps the better ends, earlier or of this pass, and decides whether to make another pass."""
    up, down = _end(1, c, base, margin), _end(-1, c, base, margin)
    before = jnp.maximum(c.up.size, c.down.size)
    now = jnp.maximum(up.size, down.size)
    open = jnp.maximum(up.closed, down.closed) > _OPEN * now
    shorter = (c.steps == 1) | (now < _SHORTER * before)
    return c._replace(
        up=select(up.size < c.up.size, up, c.up),
        down=select(down.size < c.down.size, down, c.down),
        # A bound that is not finite yet is always worth another pass.
        going=c.going & (~jnp.isfinite(now) | (shorter & open)),
    )


def _end(sign: int, c: Candidates, base: Float[Array, "*b n"], margin: Float[Array, "*b n"]) -> End:
    """The upper end (sign 1) or the lower one (-1) that term, sum, weight and product give."""
    # J at the lower point is above J at z, by a small multiple of their relative distance.
    away = 0.0 if sign > 0 else 4 * _largest(jnp.abs(c.sum) / base)[..., None]
    room = c.weight - c.product * (1 + away)

    def needed(margin):
        missing = sign * c.term + 1.02 * margin
        ratio = missing / jnp.where(room > 0, room, 1)
        ratio = jnp.where(room > 0, ratio, jnp.inf)
        return _largest(jnp.where(missing > 0, ratio, 0))[..., None]

    # The margin at an end above z is larger than the margin at z.
    longer = 1 + jnp.maximum(sign * c.sum, 0) / base + needed(margin) * c.weight / base
    t = needed(margin * longer)
    step = sign * c.sum + t * c.weight
    size = _largest(jnp.abs(step) / base)
    return End(step, t * c.weight, jnp.where(jnp.isnan(size), jnp.inf, size), t[..., 0])


def _largest(x: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    return jnp.max(x, -1)

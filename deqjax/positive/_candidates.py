"""Points just above and just below the fixed point of a concave f, by products with its Jacobian.

With `r = f(z) - z`, J = df/dz at z, a weight v > 0 with `J v < v`, and `d = r + ... + J^(k-1) r`,

    u = z + d + t v,        t = max_i (J^k r)_i / (v - J v)_i

has `f(u) <= f(z) + J (u - z) <= u`, by concavity; below z likewise, as far as f is linear. Each
pass adds a term to d, and takes a power step with v. It leaves proof to the caller.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .._tree import Axes, select, vary

# A first pass of one product, and each further one of two. Those from the third on shortened no
# bound by more than 3 % (tanh, relu6, sigmoid, softsign, dense, rho(J) from 0.1 to 0.996).
_PASSES = 5
# One more pass is worth its products where what is closed by the weight is more than this share of
# the bound, and the last pass shortened the bound to less than the other share.
_OPEN, _SHORTER = 0.75, 0.9
# The share of z that a weight keeps where J has a row of zeros: a saturated unit.
_FLOOR = 0.1


class End(NamedTuple):
    """An end of the enclosure that is to be proved."""

    step: Float[Array, "*b n"]  # away from z
    close: Float[Array, "*b n"]  # t v, the last part of it
    size: Float[Array, "*b"]  # of the step, relative to z
    closed: Float[Array, "*b"]  # what of that is t v


class Candidates(NamedTuple):
    """The two ends of the least bound so far, and what the next pass needs."""

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
    """Looks for an upper and a lower point that hold by `margin`, the rounding of f at z."""
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
    """One term more of d, and one power step of the weight."""
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
    """The better of the ends so far and those of this pass, and whether another one is worth it."""
    up, down = _end(1, c, base, margin), _end(-1, c, base, margin)
    before = jnp.maximum(c.up.size, c.down.size)
    now = jnp.maximum(up.size, down.size)
    open = jnp.maximum(up.closed, down.closed) > _OPEN * now
    shorter = (c.steps == 1) | (now < _SHORTER * before)
    return c._replace(
        up=select(up.size < c.up.size, up, c.up),
        down=select(down.size < c.down.size, down, c.down),
        # A bound that is not finite yet is worth another pass in any case.
        going=c.going & (~jnp.isfinite(now) | (shorter & open)),
    )


def _end(sign: int, c: Candidates, base: Float[Array, "*b n"], margin: Float[Array, "*b n"]) -> End:
    """The upper end (sign 1) or the lower one (-1) that term, sum, weight and product give."""
    # J at l is above J at z, by about as much as that is away.
    away = 0.0 if sign > 0 else 4 * _largest(jnp.abs(c.sum) / base)[..., None]
    room = c.weight - c.product * (1 + away)

    def needed(margin):
        missing = sign * c.term + 1.02 * margin
        ratio = missing / jnp.where(room > 0, room, 1)
        ratio = jnp.where(room > 0, ratio, jnp.inf)
        return _largest(jnp.where(missing > 0, ratio, 0))[..., None]

    # An end away from z has a larger margin than z has.
    longer = 1 + jnp.maximum(sign * c.sum, 0) / base + needed(margin) * c.weight / base
    t = needed(margin * longer)
    step = sign * c.sum + t * c.weight
    size = _largest(jnp.abs(step) / base)
    return End(step, t * c.weight, jnp.where(jnp.isnan(size), jnp.inf, size), t[..., 0])


def _largest(x: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    return jnp.max(x, -1)

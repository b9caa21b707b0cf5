"""Proves a bracket around a point near the fixed point, wherever that point comes from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._tree import Axes, flat, unflat, vary
from ._bracket import Bracket, Slack, at_most, consistent, narrow
from ._candidates import Candidates, candidates

# The factors of each try, of the step and of t v added to it. The second try only adds t v, against
# rounding: if d has entries of both signs, twice the step need not be an upper or a lower point.
_STEPS, _CLOSES = (1.0, 1.0, 2.0, 4.0), (0.0, 1.0, 2.0, 4.0)
_TRIES = len(_STEPS)


class Proved(NamedTuple):
    """The bracket, whether it holds with a finite upper end, and the candidates behind it."""

    bracket: Bracket
    holds: Bool[Array, "*b"]
    found: Candidates


def enclose(f: Callable, z: Float[Array, "*b n"], like: PyTree, slack: Slack, axes: Axes) -> Proved:
    """Tries to prove the candidates around z, at points that `like` can represent."""
    representable = lambda x: flat(unflat(x, like), z.ndim - 1)
    # If rounding has no bound, nothing can be proved, and nothing is tried.
    hopeless = jnp.broadcast_to(jnp.isinf(jnp.asarray(slack, z.dtype)), z.shape[:-1])

    fz, jvp = jax.linearize(f, z)
    # The margin by which an end has to hold to be proved.
    margin = at_most(fz, jnp.where(hopeless, 0, jnp.asarray(slack, z.dtype))) - fz
    found = candidates(jvp, z, fz, margin, axes)

    # Only these evaluations prove anything.
    def prove(carry):
        bracket, above, below, tries = carry
        length, more = (jnp.asarray(x, z.dtype)[tries] for x in (_STEPS, _CLOSES))
        away = lambda end: length * end.step + more * end.close
        u = representable(z + away(found.up))
        l = representable(jnp.maximum(z - away(found.down), 0))
        l = jnp.where(tries < _TRIES - 1, l, 0)
        tried_u, more_above, _ = narrow(bracket, u, f(u), slack)
        tried_l, _, more_below = narrow(bracket, l, f(l), slack)
        upper = jnp.where(above[..., None], bracket.upper, tried_u.upper)
        lower = jnp.where(below[..., None], bracket.lower, tried_l.lower)
        return Bracket(lower, upper), above | more_above, below | more_below, tries + 1

    # Try until both ends are proved, or no try is left.
    no = jnp.zeros(z.shape[:-1], bool)
    bracket = Bracket(jnp.zeros_like(z), jnp.full_like(z, jnp.inf))
    open = lambda c: jnp.any(~hopeless & ~(c[1] & c[2])) & (c[3] < _TRIES)
    carry = vary((bracket, no, no, jnp.zeros((), jnp.int32)), axes)
    bracket, above, _, _ = jax.lax.while_loop(open, prove, carry)
    return Proved(bracket, above & consistent(bracket), found)

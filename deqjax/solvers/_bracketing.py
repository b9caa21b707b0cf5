from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, Float, PyTree

from .._tree import flat, select, unflat
from ..positive._bracket import Bracket, narrow
from ._certified import AbstractCertifiedSolver


class _Memory(NamedTuple):
    bracket: Bracket
    below: Bool[Array, ""]  # whether the next turn is that of the lower end
    done: Bool[Array, ""]
    still: Bool[Array, ""]  # whether the last turn moved neither end
    limited: Bool[Array, ""]


class Bracketing(AbstractCertifiedSolver):
    """Picard iteration alternately from below and from above, to a certified tolerance.

        l <- f(l) rises to z*,    u <- f(u) falls to z*,    |z - z*| <= atol + rtol z*

    where z is the harmonic mean of the last l and u. Both ends are proved at every step, including
    rounding.

    **Arguments:**

    - `rtol`, `atol`, `norm`, `upper`, `fan_in`, `slack`: as in
        `deqjax.PositiveConcaveSolver`. Without `upper` the first u is found by doubling, from z0.

    `sol.stats` is as in `deqjax.PositiveConcaveSolver`; `"lower"` and `"upper"` are useful after
    any number of steps. The solve stops early, with `"rounding_limited"`, when neither end moves
    any more.

    **Cost:** one evaluation of f per step, hence two for the contraction by rho(J) that Picard
    iteration reaches with one; one for the answer, and four copies of z. To find u,
    `log2(max z* / f(0))` more. If the tolerance is not met, as `deqjax.PositiveConcaveSolver`.

    **When not to use it:** if rho(J) is above about 0.9, where `deqjax.PositiveConcaveSolver` is
    faster; and where that solver is not to be used.

    **Raises:** `ValueError` as `deqjax.PositiveConcaveSolver`.

    Reference: Yates, IEEE JSAC 13 (1995), lemmas 1 and 2.
    """

    rtol: float | Float[Array, ""] = 1e-4
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    upper: float | None = eqx.field(static=True, default=None)
    fan_in: int | None = eqx.field(static=True, default=None)
    slack: float | None = eqx.field(static=True, default=None)
    counted: Array | None = eqx.field(init=False, default_factory=lambda: None)

    def proved(self, memory: _Memory):
        return memory.bracket, memory.done

    def limited(self, memory: _Memory):
        return memory.limited

    def blank(self, z0: PyTree) -> _Memory:
        """The memory without bounds except 0 and `upper`."""
        no = jnp.asarray(False)
        return _Memory(self.unbounded(z0), no, no, no, no)

    def mix(self, z: PyTree, fz: PyTree, memory: _Memory) -> tuple[PyTree, _Memory]:
        """Goes to the end whose turn it is, or doubles while there is no upper end."""
        x, fx, old = flat(z, 0), flat(fz, 0), memory.bracket
        slack = jnp.asarray(self.margin(z), x.dtype)
        bracket, _, _ = narrow(old, x, fx, slack)
        answer, done = self.answer(bracket, z)
        bounded = jnp.all(jnp.isfinite(bracket.upper))
        still = bounded & jnp.all((bracket.lower == old.lower) & (bracket.upper == old.upper))
        # If rounding has no bound, there are no ends: Picard iteration from z.
        countable = jnp.isfinite(slack)
        least = jnp.maximum(self.allowed(fx) / 2, jnp.finfo(x.dtype).eps * fx)
        limited = jnp.where(countable, still & memory.still, jnp.all(jnp.abs(fx - x) <= least))

        target = jnp.where(memory.below, bracket.lower, bracket.upper)
        target = jnp.where(bounded, target, 2 * jnp.maximum(x, fx))
        target = jnp.where(countable, target, fx)
        z = select(done | (limited & countable), answer, unflat(target, z))
        return z, _Memory(bracket, ~memory.below, done, still, limited)

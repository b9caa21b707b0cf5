"""A solver that ends where it can prove how near the fixed point is."""

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, Float, Int, PyTree

from .. import _secant
from .._bracket import Bracket, at_most, centre, flat, narrow, unflat
from .._certified import AbstractCertifiedSolver
from .._secant import Secants
from .._tree import select

# Above this ratio of residuals Picard iteration gives way to Anderson's method: at 0.7 a digit
# takes six more evaluations, about what the acceleration needs to come into its stride.
_SLOW = 0.7
# A first attempt where the residual is half of the tolerance; after a failed one, where it has
# shrunk as the attempt showed to be necessary, within these bounds.
_FIRST, _LEAST, _MOST = 0.5, 0.5, 0.125
# An attempt fails for a weight or a width that the next one mends; or for rounding, for good.
_ATTEMPTS = 8
_ROUNDINGS = 32
_FLOOR = 0.1
_RULE = _secant.Rule(galerkin=False, mixing=1.0, ridge=1e-8)
_FAST = jnp.iinfo(jnp.int32).max  # Picard steps still to take: no end in sight


class _Memory(NamedTuple):
    secants: Secants
    bracket: Bracket
    # What z is: 0 an iterate, 1 and 2 the upper and the lower point of an attempt, 3 the answer,
    # 4 a trial of an upper point to start from.
    phase: Int[Array, ""]
    ahead: Float[Array, " n"]  # the iterate after an attempt
    centre: Float[Array, " n"]
    weight: Float[Array, " n"]
    f_upper: Float[Array, " n"]
    trigger: Float[Array, ""]  # the residual over the tolerance at which the next attempt is made
    last: Float[Array, ""]  # that of the last iterate
    part: Float[Array, ""]  # of the width that the tolerance allows
    failed: Int[Array, ""]


class PositiveConcaveSolver(AbstractCertifiedSolver):
    """Solves a positive concave f to a *certified* tolerance, entry by entry.

        |z - z*| <= atol + rtol z*        in every entry, proved

    Every evaluation at a y with f(y) <= y or f(y) >= y bounds z* by f(y), rounding included. The
    iterates are kept between the bounds: Picard's, from the upper point if there is one, until
    residuals shrink by less than 0.3 a step, from there Anderson's. When the residual is small, f
    is evaluated at `f(z) + w` and `f(z) - w`, with w as wide as the tolerance allows: if both are
    bounds, the harmonic mean of the bounds is the answer. If not, the difference of the two values
    is a power step that makes a better w for the next attempt.

    **Arguments:**

    - `rtol`, `atol`: what is certified; `norm` (optimistix.max_norm) only picks the best iterate
        where steps run out.
    - `upper`: a number that f never exceeds, the supremum of a bounded activation
        (`deqjax.positive.ACTIVATIONS[activation].supremum`): a bound from the start, and where the
        iteration starts, whatever z0 is. `None` starts at z0.
    - `fan_in`: as in `deqjax.certify`; it has to be given in Optimistix's own front door.
    - `depth`: of Anderson's window, an int of at least 1.

    `sol.stats` has `"relative_error"`, a proved bound of `max_i |z_i - z*_i| / z*_i` for `z =
    sol.value` (infinite if nothing is), and `"lower"` and `"upper"`, the bounds of z*. The result
    is `successful` only for what is certified. It stops early, with `nonlinear_max_steps_reached`,
    after eight attempts that failed, or three where rounding, times 1 / (1 - rho(J)), is seen to be
    above the tolerance.

    **Cost:** one evaluation of f a step, two an attempt, one for the answer, and `2 depth + 12`
    copies of z. On ordinary problems the certificate costs three evaluations.

    **When not to use it:** for an f that is not positive concave (nothing then holds), in half
    precision (sums of some hundred terms have no certain digit), or in the first steps of training,
    which need no certificate: `deqjax.FixedPointIteration`.

    **Raises:** `ValueError` for a tolerance below 0 or NaN, an `upper` not above 0, `depth < 1`, or
    an f whose rounding cannot be counted (see `deqjax.certify`).

    Reference: Yates, IEEE JSAC 13 (1995), lemmas 1 and 2, for the bounds; Walker and Ni, SIAM J.
    Numer. Anal. 49 (2011), for the acceleration.
    """

    rtol: float | Float[Array, ""] = 1e-4
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    upper: float | None = None
    fan_in: int | None = eqx.field(static=True, default=None)
    depth: int = eqx.field(static=True, default=5)
    slack: float | None = None  # the bound of rounding, once f is known

    def __check_init__(self):
        if isinstance(self.depth, bool) or not isinstance(self.depth, Integral) or self.depth < 1:
            raise ValueError(
                f"PositiveConcaveSolver expects depth to be an int of at least 1, got "
                f"{self.depth!r}; it is the number of differences in Anderson's window."
            )

    def proved(self, memory: _Memory):
        """See `AbstractCertifiedSolver`."""
        return memory.bracket, memory.phase == 3

    def verdict(self, error, memory: _Memory):
        """See `AbstractSolver`."""
        hopeless = memory.failed >= _ATTEMPTS
        return jnp.where(hopeless, jnp.nan, super().verdict(error, memory))

    def blank(self, z0) -> _Memory:
        """No bound but 0 and `upper`."""
        bracket = self.unbounded(z0)
        zero = bracket.lower
        secants = dataclasses.replace(
            _secant.empty(z0, self.depth), wait=jnp.asarray(_FAST, jnp.int32)
        )
        count = jnp.asarray(0, jnp.int32)
        trigger = jnp.asarray(_FIRST, zero.dtype)
        unknown = jnp.asarray(jnp.inf, zero.dtype)
        one = jnp.ones_like(unknown)
        return _Memory(
            secants, bracket, count, zero, zero, zero, zero, trigger, unknown, one, count
        )

    def mix(self, z: PyTree, fz: PyTree, memory: _Memory) -> tuple[PyTree, _Memory]:
        """One step of the iteration, or one evaluation of an attempt."""
        m, x, fx, slack = memory, flat(z, 0), flat(fz, 0), self.margin(z)
        bracket, _, _ = narrow(m.bracket, x, fx, slack)
        iterate, climbing = m.phase == 0, m.phase == 4
        bounded = jnp.all(jnp.isfinite(bracket.upper))

        # The iteration goes on; during an attempt it is asked again from where it was.
        s = m.secants
        gap, most = jnp.abs(fx - x), self.allowed(fx)
        residual = jnp.max(gap / jnp.where(most > 0, most, 1))
        slow = iterate & (residual > _SLOW * m.last) & (s.wait > _FAST // 2)
        s = dataclasses.replace(s, wait=jnp.where(slow, 0, s.wait))
        climb = (slow | climbing) & ~bounded
        place, value = select(iterate, (z, fz), (s.z, s.f))
        ahead, after = _secant.mix(_RULE, place, value, s)
        secants = _secant.keep(iterate, after, s)
        arrived = climbing & bounded
        secants = _secant.restart(arrived, secants)
        ahead = jnp.where(arrived, fx, flat(ahead, 0))
        ahead = jnp.clip(ahead, bracket.lower, bracket.upper)

        # What rounding is all that is left of cannot become less.
        small = (residual <= m.trigger) | jnp.all(gap <= slack * fx)
        attempt = iterate & small & ~climb
        middle = jnp.where(attempt, fx, m.centre)
        weight = jnp.where(m.failed == 0, middle, m.weight)
        most = self.allowed(middle)
        # A bracket of twice the width has its centre off by the width at most.
        width = m.part * weight * jnp.min(jnp.where(weight > 0, most / weight, jnp.inf))

        # The end of an attempt: what it teaches.
        end = m.phase == 2
        product = (m.f_upper - fx) / 2
        margin = at_most(middle, slack) - middle
        left = jnp.abs((m.f_upper + fx) / 2 - middle)
        room = width - product
        over = lambda x: jnp.max(jnp.where(room > 0, x / jnp.where(room > 0, room, 1), jnp.inf))
        trigger = m.last * jnp.clip(1 / over(left + margin), _MOST, _LEAST)
        # Where f bends too much within the width, no small residual helps; rounding asks for width.
        finest = jnp.clip(_ROUNDINGS * slack / jnp.asarray(self.rtol, x.dtype), 0, 1)
        bent = end & ~jnp.all(room > 0)
        # Rounding alone is more than there is room for, by a weight that has been mended.
        hopeless = (over(margin) > 1) & ~bent & (m.failed > 0)
        part = jnp.where(bent, jnp.maximum(m.part / 4, jnp.minimum(finest, m.part)), m.part)

        done = self.closed(bracket)
        phase = jnp.where(attempt, 1, jnp.where(m.phase == 1, 2, 0))
        phase = jnp.where(climb, 4, phase)
        here = iterate | arrived
        target = jnp.where(attempt, middle + width, jnp.where(here, ahead, m.ahead))
        target = jnp.where(climb, 2 * jnp.maximum(x, fx), target)
        target = jnp.where(m.phase == 1, middle - width, target)
        target = jnp.where(done, centre(bracket), target)
        memory = _Memory(
            secants,
            bracket,
            jnp.where(done, 3, phase).astype(jnp.int32),
            jnp.where(iterate, ahead, m.ahead),
            middle,
            jnp.where(end, jnp.maximum(product, _FLOOR * m.part * most), weight),
            jnp.where(m.phase == 1, fx, m.f_upper),
            jnp.where(end, trigger, m.trigger),
            jnp.where(iterate, residual, m.last),
            part,
            m.failed + jnp.where(end, jnp.where(hopeless, 3, 1), 0),
        )
        return unflat(target, z), memory

    def recovers(self, memory: _Memory) -> Bool[Array, ""]:
        """See `AbstractSolver`."""
        return (memory.secants.stride > 0) & (memory.failed < _ATTEMPTS)

    def keep(self, go, live, new: _Memory, old: _Memory) -> _Memory:
        """See `AbstractSolver`."""
        rest = super().keep(go, live, new._replace(secants=None), old._replace(secants=None))
        return rest._replace(secants=_secant.keep(live, new.secants, old.secants))

"""A solver that stops when it can prove a bound on its error."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_int
from .._tree import flat, quotient, select, unflat
from ..positive._bracket import Bracket, at_most, consistent, narrow
from . import _secant
from ._base import Status
from ._certified import AbstractCertifiedSolver
from ._secant import Secants

# Above this ratio of residuals Anderson's method replaces Picard iteration: at 0.7 a digit takes
# six more evaluations, about as many as the acceleration needs to become effective.
_SLOW = 0.7
# The first attempt is made when the residual is half of the tolerance; the next one when it has
# shrunk as far as the failed attempt showed to be necessary, within these bounds.
_FIRST, _LEAST, _MOST = 0.5, 0.5, 0.125
# A failed attempt corrects the weight or the width of the next; against rounding nothing helps. At
# rho(J) up to 0.999 (tanh, relu6, sigmoid, soft_sign, n = 80) at most two failed in float64, seven
# in float32 where rounding left one width in ten.
_ATTEMPTS = 8
# The least width, in roundings, and the part of the width that a weight keeps where J w is 0, as
# for the candidates of `deqjax.certify`.
_ROUNDINGS = 32
_FLOOR = 0.1
_RULE = _secant.Rule(galerkin=False, mixing=1.0, ridge=1e-8)
_FAST = jnp.iinfo(jnp.int32).max  # Picard steps still to take: without end
# The role of z: an iterate, the upper or the lower end of an attempt, the answer, or a trial of an
# upper point to start from.
_ITERATE, _ABOVE, _BELOW, _ANSWER, _CLIMB = range(5)


class _Memory(NamedTuple):
    secants: Secants
    bracket: Bracket
    phase: Int[Array, ""]  # the role of z
    ahead: Float[Array, " n"]  # the iterate after an attempt
    centre: Float[Array, " n"]
    weight: Float[Array, " n"]
    f_upper: Float[Array, " n"]
    trigger: Float[Array, ""]  # the residual over the tolerance at which the next attempt is made
    last: Float[Array, ""]  # the residual over the tolerance of the last iterate
    part: Float[Array, ""]  # the part of the width that the tolerance allows
    failed: Int[Array, ""]


class _Seen(NamedTuple):
    """An evaluation of f, and the decisions that follow from it."""

    x: Float[Array, " n"]
    fx: Float[Array, " n"]
    slack: Float[Array, ""]
    bracket: Bracket
    residual: Float[Array, ""]  # over the tolerance
    iterating: Bool[Array, ""]  # x is an iterate
    slow: Bool[Array, ""]  # Anderson's method replaces Picard iteration
    climb: Bool[Array, ""]  # look for an upper point further up
    arrived: Bool[Array, ""]  # x is an upper point
    attempt: Bool[Array, ""]  # try a proof around f(x)


class PositiveConcaveSolver(AbstractCertifiedSolver):
    """Solves a positive concave f to a *certified* tolerance, entry by entry.

        |z - z*| <= atol + rtol z*        in every entry, proved

    Every evaluation at a y with f(y) <= y or f(y) >= y bounds z* by f(y), including rounding. The
    iterates stay between the bounds. They are Picard's, from the upper point if there is one, until
    residuals shrink by less than 0.3 per step, and from there Anderson's. When the residual is
    small, f is evaluated at `f(z) + w` and `f(z) - w`, with w as wide as the tolerance allows: if
    both are bounds, the harmonic mean of the bounds is the answer. If not, the difference of the
    two values is a power step that gives a better w for the next attempt.

    **Arguments:**

    - `rtol`, `atol`: the certified tolerances; `norm` (optimistix.max_norm) only selects the best
        iterate if the steps run out.
    - `upper`: a number that f never exceeds, such as the supremum of a bounded activation
        (`deqjax.positive.properties(activation).supremum`). It is a bound from the start, and the
        initial value where z0 is 0 or above it. `None`, or infinity, starts at z0.
    - `fan_in`: as in `deqjax.certify`. Optimistix's own entry point needs it. There, f has the
        matrix precision with which it was traced, and the bounds are only the solver's own (nothing
        is proved for a 3 x 3 `nn.Conv2d`, unless the precision is the highest).
    - `slack`: a bound on the relative rounding of f, used instead of the counted one. As with
        `fan_in`, arrays still have to be nonnegative.
    - `depth`: the length of Anderson's window, an int of at least 1.

    `sol.stats` has `"relative_error"`, a proved bound on `max_i |z_i - z*_i| / z*_i` for `z =
    sol.value` (infinite without a proof), `"lower"` and `"upper"`, the bounds on z* in float32 or
    wider, and `"rounding_limited"`, whether rounding prevents the proof. The result is `successful`
    only if it is certified (with both tolerances zero, if the steps were taken). The solve stops
    early, with `nonlinear_max_steps_reached` and `rounding_limited`, after eight failed attempts,
    or three in which rounding, times 1 / (1 - rho(J)), is seen to be above the tolerance: more
    steps do not help, a wider dtype does. If the tolerance is not met, by rounding or because steps
    ran out, the bounds are no worse than those of `deqjax.certify` at the value.

    If an array in f is negative, rounding has no bound (see `deqjax.certify`): the iteration stops
    when its residual is half of the tolerance, without a proof and with `rounding_limited`.

    **Cost:** one evaluation of f per step, two per attempt, one for the answer, and `2 depth + 12`
    copies of z. On ordinary problems the certificate costs three evaluations. If the tolerance is
    not met and the stats are used, also the cost of `deqjax.certify`, beyond `num_fn_evals`. Matrix
    products in f have the highest precision on every platform, those of its derivative rules yours.

    **When not to use it:** for an f that is not positive concave (nothing then holds), in half
    precision (sums of some hundred terms have no certain digit), or in the first steps of training,
    which need no certificate (use `deqjax.FixedPointIteration`).

    **Raises:** `ValueError` for a tolerance below 0 or NaN, an `upper` not above 0, `depth < 1`, or
    an f whose rounding cannot be counted (see `deqjax.certify`).

    Reference: Yates, IEEE JSAC 13 (1995), lemmas 1 and 2, for the bounds; Walker and Ni, SIAM J.
    Numer. Anal. 49 (2011), for the acceleration.
    """

    rtol: float | Float[Array, ""] = 1e-4
    atol: float | Float[Array, ""] = 0.0
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    upper: float | None = eqx.field(static=True, default=None)
    fan_in: int | None = eqx.field(static=True, default=None)
    depth: int = eqx.field(static=True, default=5)
    slack: float | None = eqx.field(static=True, default=None)
    counted: Array | None = eqx.field(init=False, default_factory=lambda: None)

    def __check_init__(self):
        instead = "pass the number of differences in Anderson's window."
        check_int("PositiveConcaveSolver", "depth", self.depth, instead)

    def proved(self, memory: _Memory):
        return memory.bracket, memory.phase == _ANSWER

    def limited(self, memory: _Memory):
        return memory.failed >= _ATTEMPTS

    def blank(self, z0) -> _Memory:
        """The memory without bounds except 0 and `upper`."""
        bracket = self.unbounded(z0)
        zero = bracket.lower
        empty = _secant.empty(z0, self.depth)
        secants = dataclasses.replace(empty, wait=jnp.asarray(_FAST, jnp.int32))
        count = jnp.asarray(0, jnp.int32)
        trigger = jnp.asarray(_FIRST, zero.dtype)
        unknown = jnp.asarray(jnp.inf, zero.dtype)
        one, ones = jnp.ones_like(unknown), jnp.ones_like(zero)
        last = (zero, trigger, unknown, one, count)
        return _Memory(secants, bracket, count, zero, ones, ones, *last)

    def mix(self, z: PyTree, fz: PyTree, memory: _Memory) -> tuple[PyTree, _Memory]:
        """One step of the iteration, or one evaluation of an attempt."""
        at = self._look(z, fz, memory)
        m = self._iterated(z, fz, memory, at)
        m = m._replace(centre=jnp.where(at.attempt, at.fx, m.centre))
        width = self._width(m)
        m = m._replace(f_upper=jnp.where(m.phase == _ABOVE, at.fx, m.f_upper))
        m = select(m.phase == _BELOW, self._learned(m, at, width), m)
        return self._next(z, m, at, width)

    def _look(self, z: PyTree, fz: PyTree, m: _Memory) -> _Seen:
        """The bounds that an evaluation proves, and the decisions that follow."""
        x, fx = flat(z, 0), flat(fz, 0)
        slack = jnp.asarray(self.margin(z), x.dtype)
        countable = jnp.isfinite(slack)
        bracket, _, _ = narrow(m.bracket, x, fx, slack)
        iterating, climbing = m.phase == _ITERATE, m.phase == _CLIMB
        most, gap = self.allowed(fx), jnp.abs(fx - x)
        residual = jnp.max(gap / jnp.where(most > 0, most, 1))
        # A residual that is only rounding cannot become smaller.
        least = jnp.where(countable, slack, jnp.finfo(x.dtype).eps)
        small = (residual <= m.trigger) | jnp.all(gap <= least * fx)
        slow = iterating & (residual > _SLOW * m.last) & (m.secants.wait > _FAST // 2)
        unbounded = ~jnp.all(jnp.isfinite(bracket.upper)) & countable
        climb = (slow | climbing) & unbounded
        arrived, attempt = climbing & ~unbounded, iterating & small & ~climb
        return _Seen(x, fx, slack, bracket, residual, iterating, slow, climb, arrived, attempt)

    def _iterated(self, z: PyTree, fz: PyTree, m: _Memory, at: _Seen) -> _Memory:
        """The iteration's memory and next iterate; when not iterating, those where it stopped."""
        s = dataclasses.replace(m.secants, wait=jnp.where(at.slow, 0, m.secants.wait))
        z, fz = select(at.iterating, (z, fz), (s.z, s.f))
        ahead, after = _secant.mix(_RULE, z, fz, s)
        s = _secant.restart(at.arrived, after.kept(at.iterating, at.iterating, s))
        ahead = jnp.where(at.arrived, at.fx, flat(ahead, 0))
        ahead = jnp.clip(ahead, at.bracket.lower, at.bracket.upper)
        return m._replace(
            secants=s,
            bracket=at.bracket,
            ahead=jnp.where(at.iterating | at.arrived, ahead, m.ahead),
            last=jnp.where(at.iterating, at.residual, m.last),
        )

    def _width(self, m: _Memory) -> Float[Array, " n"]:
        """The half width of the bracket to try: the error of its centre is at most this."""
        weight = jnp.where(m.failed == 0, m.centre, m.weight)
        positive = jnp.where(weight > 0, weight, 1)
        least = jnp.min(jnp.where(weight > 0, self.allowed(m.centre) / positive, jnp.inf))
        return m.part * weight * jnp.where(jnp.isfinite(least), least, 0)

    def _learned(self, m: _Memory, at: _Seen, width: Float[Array, " n"]) -> _Memory:
        """The memory after a failed attempt, with what the values of f at its two ends say.

        Their half difference is J w. The attempt lacked `|f(c) - c| + rounding < w - J w`.
        """
        product = (m.f_upper - at.fx) / 2
        left = jnp.abs((m.f_upper + at.fx) / 2 - m.centre)
        margin = at_most(m.centre, at.slack) - m.centre
        room = width - product
        over = lambda x: jnp.max(jnp.where(room > 0, x / jnp.where(room > 0, room, 1), jnp.inf))
        # If f bends too much within the width, no small residual helps; rounding needs some width.
        bent = ~jnp.all(room > 0)
        rtol = jnp.asarray(self.rtol, width.dtype)
        finest = jnp.clip(quotient(_ROUNDINGS * at.slack, rtol), 0, 1)
        narrower = jnp.maximum(m.part / 4, jnp.minimum(finest, m.part))
        # Rounding alone exceeds the room, even with a corrected weight.
        hopeless = (over(margin) > 1) & ~bent & (m.failed > 0)
        return m._replace(
            weight=jnp.maximum(product, _FLOOR * m.part * self.allowed(m.centre)),
            trigger=m.last / jnp.clip(over(left + margin), 1 / _LEAST, 1 / _MOST),
            part=jnp.where(bent, narrower, m.part),
            failed=m.failed + jnp.where(hopeless, 3, 1),
        )

    def _next(
        self, z: PyTree, m: _Memory, at: _Seen, width: Float[Array, " n"]
    ) -> tuple[PyTree, _Memory]:
        """The next point at which f is evaluated, and its phase."""
        answer, done = self.answer(at.bracket, z)
        above = m.phase == _ABOVE
        target = jnp.where(at.climb, 2 * jnp.maximum(at.x, at.fx), m.ahead)
        target = jnp.where(at.attempt, m.centre + width, target)
        target = jnp.where(above, m.centre - width, target)
        phase = jnp.where(above, _BELOW, _ITERATE)
        phase = jnp.where(at.attempt, _ABOVE, jnp.where(at.climb, _CLIMB, phase))
        phase = jnp.where(done, _ANSWER, phase).astype(jnp.int32)
        # If rounding has no bound, no attempt can succeed.
        hopeless = at.attempt & ~jnp.isfinite(at.slack)
        failed = jnp.where(hopeless, _ATTEMPTS, m.failed)
        return select(done, answer, unflat(target, z)), m._replace(phase=phase, failed=failed)

    def status(self, memory: _Memory) -> Status:
        """The state; while proofs are tried, an accelerated step can be taken back."""
        going = (memory.failed < _ATTEMPTS) & consistent(memory.bracket)
        return super().status(memory)._replace(retry=going & (memory.secants.stride > 0))

"""The engine of Anderson's and Broyden's methods: secants, the step they imply, a safeguard.

With `g = f(z) - z`, each accepted iterate gives a secant: `s`, `y`, `v = s + y`, the differences of
z, g and f(z) from the previously accepted iterate. The step combines secants such that the linear
model of g is orthogonal to test vectors p:

    z' = f(z) + sum_j c_j v_j,      <p_i, g + sum_j c_j y_j> = 0   for all i

`p = -y` minimises the norm of this model and is Anderson's method; `p = s` is Broyden's method.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._tree import add, as_real, dot, from_real, lincomb, select, two_norm
from ._base import AbstractSolver, Status
from ._window import (
    LONGEST,
    Rule as Rule,
    Secants as Secants,
    combine,
    differences,
    empty as empty,
    inverse as inverse,
    minus,
    products,
    push,
    restart as restart,
    solve,
)

# A step is worse if its residual is more than ten times the best one. With 1, where every increase
# counts, tanh at a spectral radius of 0.996 took 500 evaluations instead of 25; without a bound
# relu6 at 1.01 did not converge.
_WORSE = 10.0
# A rejected step costs one evaluation; eight Picard steps after it limit the loss to an eighth.
_LONGEST_PAUSE = 8
# Armijo's constant, and the shortest step that is tried.
_DECREASE, _SHORTEST = 1e-4, 2.0**-5
# A step of length two or more, or a cut one, is taken back if g then points backwards and has not
# shrunk by a tenth. The next step is then no longer than a quarter of it, or than one; after a good
# step, four times as long. Of 99 problems whose steps saturate, Broyden's method ended far from the
# solution in 97; with this rule in none, and the worst takes 1.7 times Picard's evaluations.
# Shorter steps are not judged: for rotations they are right although g points backwards.
_SHORT, _SHRINKS, _STRETCH = 2.0, 0.9, 4.0


class AbstractSecantSolver(AbstractSolver):
    """A secant method as a solver of deqjax and Optimistix."""

    depth: AbstractVar[int]

    @property
    @abc.abstractmethod
    def rule(self) -> Rule:
        """The rule that defines the secant method."""

    def blank(self, z0: PyTree) -> Secants:
        """An empty window."""
        return empty(as_real(z0), self.depth)

    def mix(self, z: PyTree, fz: PyTree, memory: Secants) -> tuple[PyTree, Secants]:
        """One step."""
        after, memory = mix(self.rule, as_real(z), as_real(fz), memory)
        return from_real(after, z), memory

    def status(self, memory: Secants) -> Status:
        """The state; an iterate of an accelerated step may be taken back."""
        return super().status(memory)._replace(retry=memory.stride > 0)


class _Verdict(NamedTuple):
    """The verdict on the step that led to z."""

    rejected: Bool[Array, ""]
    shorter: Bool[Array, ""]  # rejected, and tried again at half the length
    back: Bool[Array, ""]  # rejected, and taken back
    beyond: Bool[Array, ""]  # gone too far


def mix(rule: Rule, z: PyTree, fz: PyTree, m: Secants) -> tuple[PyTree, Secants]:
    """The next iterate and memory of a secant method."""
    g = minus(fz, z)
    size = two_norm(g).astype(m.size.dtype)
    verdict = _judge(rule, z, g, size, m)
    accepted = ~verdict.rejected

    # Add the secant to the window, and combine the window.
    m = push(rule, z, fz, m, accepted)
    wait = jnp.where(verdict.back, m.pause, m.wait)
    c, ready, count = _combination(rule, g, verdict, wait, m)
    m = dataclasses.replace(m, count=count)

    # After a rejected step, go half way back to the last accepted iterate, or take the Picard step
    # from there, which needs no evaluation.
    za, fa = select(accepted, (z, fz), (m.z, m.f))
    ahead = add(fa, combine(c, m.v))
    if rule.mixed:
        left = add(minus(fa, za), combine(c, differences(rule, m)))
        ahead = lincomb(1, ahead, rule.mixing - 1, left)
    reach = _reach(m, verdict.rejected, verdict.beyond)
    ahead, length = _within(reach, za, ahead, ready, m, size)
    if rule.line_search:
        ahead = select(verdict.shorter, lincomb(0.5, z, 0.5, za), ahead)
        length = jnp.where(verdict.shorter, m.length / 2, length)

    # Remember the last accepted iterate, and the rules for the next step.
    m = dataclasses.replace(_paused(m, verdict, wait, ready), length=length, reach=reach)
    return ahead, dataclasses.replace(
        m,
        z=za,
        f=fa,
        size=jnp.where(accepted, size, m.size),
        best=jnp.where(accepted, jnp.minimum(m.best, size), m.best),
    )


def _judge(rule: Rule, z: PyTree, g: PyTree, size: Float[Array, ""], m: Secants) -> _Verdict:
    """Whether the step that led to z was good."""
    better = size <= _WORSE * m.best
    beyond = shorter = jnp.asarray(False)
    if rule.line_search:
        enough = size <= (1 - _DECREASE * m.stride) * m.size
        shorter = (m.stride > _SHORTEST) & ~enough
        better = better & enough
    else:
        long = m.length >= jnp.minimum(_SHORT, m.reach)
        beyond = better & long & (size > _SHRINKS * m.size) & (dot(g, minus(z, m.z)) < 0)
        better = better & ~beyond
    rejected = (m.stride > 0) & ~better
    return _Verdict(rejected, shorter & rejected, rejected & ~shorter, beyond)


def _combination(
    rule: Rule, g: PyTree, verdict: _Verdict, wait: Int[Array, ""], m: Secants
) -> tuple[Float[Array, " m"], Bool[Array, ""], Int[Array, ""]]:
    """The coefficients (zeros: a Picard step), whether it is accelerated, and the valid rows."""
    count = jnp.where(verdict.back, 0, m.count)
    ready = ~verdict.rejected & (wait == 0) & (count > 0)
    c = solve(m, products(m.p, g), rule.ridge, False)
    broken = ready & ~jnp.all(jnp.isfinite(c))  # a breakdown: restart
    ready = ready & ~broken
    return jnp.where(ready, c, 0), ready, jnp.where(broken, 0, count)


def _paused(m: Secants, verdict: _Verdict, wait: Int[Array, ""], ready: Bool[Array, ""]) -> Secants:
    """The memory with the Picard steps to come, and the fraction of a full step taken now."""
    recovering = jnp.where(m.stride > 0, jnp.maximum(m.pause // 2, 1), m.pause)
    pause = jnp.where(verdict.back, jnp.minimum(2 * m.pause, _LONGEST_PAUSE), m.pause)
    return dataclasses.replace(
        m,
        stride=jnp.where(verdict.shorter, m.stride / 2, ready.astype(m.stride.dtype)),
        wait=jnp.where(ready | verdict.shorter, wait, jnp.maximum(wait - 1, 0)),
        pause=jnp.where(verdict.rejected, pause, recovering),
    )


def _reach(m: Secants, rejected: Bool[Array, ""], beyond: Bool[Array, ""]) -> Float[Array, ""]:
    """The longest length of the next step, by the verdict on the last one."""
    longer = jnp.clip(_STRETCH * m.length, m.reach, LONGEST)
    reach = jnp.where(rejected, m.reach, longer)
    return jnp.where(beyond, jnp.maximum(m.length / _STRETCH, 1), reach)


def _within(
    reach: Float[Array, ""],
    z: PyTree,
    ahead: PyTree,
    ready: Bool[Array, ""],
    m: Secants,
    size: Float[Array, ""],
) -> tuple[PyTree, Float[Array, ""]]:
    """The end of the step from z to `ahead`, cut to `reach` if accelerated, and its length."""
    step = minus(ahead, z)
    known = jnp.arange(m.sizes.size, dtype=m.count.dtype) < m.count
    unit = jnp.maximum(jnp.max(jnp.where(known, m.sizes, 0)), size)
    length = two_norm(step).astype(size.dtype) / jnp.where(ready & (unit > 0), unit, jnp.inf)
    cut = length > reach
    ahead = select(cut, lincomb(1, z, reach / jnp.where(cut, length, 1), step), ahead)
    return ahead, jnp.where(cut, reach, length)

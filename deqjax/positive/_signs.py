"""Checks that every number in f has the one sign for which rounding can be counted.

For numbers of one sign, the relative errors of sums and products add up; the relative error of a
difference is not known beforehand. For z >= 0, the sign of a value that depends on z follows from
the equations of f, **if** the arrays that it meets have their signs: weights, inputs, constants,
exponents, everything that does not depend on z. Such arrays are computed here as f computes them,
and checked when f runs, at the cost of a minimum over each. A scalar that is written into f may be
negative.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Bool

from .._compare import alone
from ._axes import after
from ._equations import body, is_softplus, refusal, scan_parts
from ._sign_rules import Held, Moving, Rule, join, rule, vouched


def signs(
    jaxpr: ClosedJaxpr, shape: tuple[int, ...], name: str, *, strict: bool = True
) -> Bool[Array, "*b"]:
    """Whether, for each problem, the arrays that z meets have the signs that they must have.

    `shape` is `(batch,)` if axis 0 of z enumerates problems, else `()`. An array, or a part of
    one, that belongs to one problem counts for that problem. A shared array, or one whose problem
    is not known, counts for all. If not `strict`, the result of an operation that may cancel is
    assumed to be nonnegative.

    **Raises:** `ValueError` if f adds numbers of opposite signs, whatever the arrays are.
    """
    walk = _Walk(name, strict)
    outs = walk.through(jaxpr, [Moving(axis=0 if shape else None)] * len(jaxpr.jaxpr.invars))
    good = walk.verdict()
    # If the problem axis of a result is lost, each array counts for all problems.
    if any(isinstance(x, Moving) and x.axis != 0 for x in outs):
        good = jnp.all(good)
    return jnp.broadcast_to(good, shape)


class _Walk:
    """A walk through a jaxpr, with a `Moving` per value that depends on z; others are values."""

    def __init__(self, name: str, strict: bool):
        self.name, self.strict = name, strict
        self.found: list[Array] = []

    def verdict(self) -> Bool[Array, "..."]:
        good = jnp.asarray(True)
        for each in self.found:
            good = good & each
        return good

    def through(self, closed: ClosedJaxpr, inputs: list[Any]) -> list[Any]:
        jaxpr = closed.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values |= dict(zip(jaxpr.invars, inputs, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else values[v]
        for eqn in jaxpr.eqns:
            if eqn.outvars:
                now = [read(v) for v in eqn.invars]
                moving = any(isinstance(x, Moving) for x in now)
                outs = self.equation(eqn, now) if moving else alone(jaxpr, eqn)(*now)
                values |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        kind = eqn.primitive.name
        if kind == "scan":
            return self.scan(eqn, inputs)
        if kind == "cond":
            return self.cond(eqn, inputs)
        if kind == "optimization_barrier":
            return inputs
        if is_softplus(eqn):
            kind = "softplus"
        elif (inside := body(eqn)) is not None:
            return self.through(inside, inputs)
        return [self.primitive(eqn, kind, inputs)] * len(eqn.outvars)

    def primitive(self, eqn: Any, kind: str, inputs: list[Any]) -> Moving:
        axes = {after(eqn, kind, i, x.axis) for i, x in enumerate(inputs) if isinstance(x, Moving)}
        axis = axes.pop() if len(axes) == 1 else None
        found = self.accepted(kind, rule(eqn, kind, inputs), inputs)
        for held in found.held:
            dims = range(len(eqn.invars[held.i].aval.shape))
            whose = (a for a in dims if axis is not None and after(eqn, kind, held.i, a) == axis)
            self.hold(held, next(whose, None))
        return Moving(found.sign, axis, found.always)

    def accepted(self, kind: str, found: Rule, inputs: list[Any]) -> Rule:
        if found.refused is not None and self.strict:
            raise refusal(self.name, kind, found.refused)
        return found if found.refused is None else vouched(inputs)

    def hold(self, held: Held, axis: int | None) -> None:
        """Checks an array when f runs, per problem if `axis` enumerates them."""
        x = jnp.asarray(held.value)
        if not jnp.issubdtype(x.dtype, jnp.floating) and not jnp.issubdtype(x.dtype, jnp.integer):
            return
        x = x if held.sign > 0 else -x
        good = x > 0 if held.strictly else x >= 0
        self.found.append(jnp.all(good, tuple(a for a in range(x.ndim) if a != axis)))

    def agree(self, kind: str, values: list[Any], axis: int | None) -> int:
        """The common sign of values that meet in one place: that of the first `Moving`."""
        found = self.accepted(kind, join([*enumerate(values)]), values)
        for held in found.held:
            self.hold(held, axis)
        return found.sign

    def cond(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        index, *rest = inputs
        walks = [_Walk(self.name, self.strict) for _ in eqn.params["branches"]]
        outs = [w.through(b, rest) for w, b in zip(walks, eqn.params["branches"], strict=True)]
        good = [w.verdict() for w in walks]
        known = not isinstance(index, Moving)
        self.found += [_choose(index, jnp.broadcast_arrays(*good))] if known else good

        def either(*cases):
            axes = {x.axis for x in cases if isinstance(x, Moving)}
            if known and not axes:
                return _choose(index, cases)
            axis = axes.pop() if len(axes) == 1 else None
            return Moving(self.agree("cond", [*cases], axis), axis)

        return [either(*cases) for cases in zip(*outs, strict=True)]

    def scan(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        inside, first, num = scan_parts(eqn)
        given = [
            x if isinstance(x, Moving) else jnp.asarray(x, v.aval.dtype)
            for x, v in zip(inputs[first:], eqn.invars[first:], strict=True)
        ]
        initial, xs = given[:num], given[num:]
        # The carries and rows that depend on z; None for the others.
        state = [x if isinstance(x, Moving) else None for x in initial]
        rows = [_moved(x, -1) for x in xs]

        # The body, on tracers (probe) for the signs of carries, then on arrays (run).
        def step(carry, row):
            walk, now = _Walk(self.name, self.strict), [*_fill(state, carry), *_fill(rows, row)]
            outs = walk.through(inside, [*inputs[:first], *now])
            return outs[:num], outs[num:], walk

        def probe(carry, row):
            for i, new in enumerate(step(carry, row)[0]):
                old = state[i]
                if isinstance(new, Moving):
                    axis = new.axis if old is None or old.axis == new.axis else None
                    seen[i] = Moving(new.sign if old is None else old.sign, axis)

        def run(carry, row):
            outs, ys, walk = step(carry, row)
            for old, new in zip(state, outs, strict=True):
                if old is not None:
                    walk.agree("scan", [old, new], old.axis)
            made[:] = [_moved(y, 1) for y in ys]
            kept = [x for x, old in zip(outs, state, strict=True) if old is None]
            kept = [jnp.asarray(x, c.dtype) for x, c in zip(kept, carry, strict=True)]
            return kept, ([jnp.asarray(y) for y in _still(ys)], walk.verdict())

        made: list[Moving | None] = []
        carry = lambda: [x for x, s in zip(initial, state, strict=True) if s is None]
        one = [jax.typeof(x).update(shape=x.shape[1:]) for x in _still(xs)]
        while True:  # until it is known which carries depend on z, and their problem axes
            seen = [*state]
            jax.eval_shape(probe, carry(), one)
            if seen == state:
                break
            state = seen
        # An initial array must have the sign that its carry takes on.
        for old, new in zip(initial, state, strict=True):
            if new is not None and not isinstance(old, Moving):
                self.agree("scan", [new, old], new.axis)
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        last, (ys, good) = jax.lax.scan(run, carry(), _still(xs), length, reverse)
        self.found.append(jnp.all(good, 0))
        return [*_fill(state, last), *_fill(made, ys)]


def _choose(index: Any, cases: Any) -> Array:
    return jax.lax.select_n(jnp.asarray(index), *map(jnp.asarray, cases))


def _moved(x: Any, by: int) -> Moving | None:
    """`x` with `by` more axes in front, None if it does not depend on z."""
    if not isinstance(x, Moving):
        return None
    axis = None if x.axis is None or x.axis + by < 0 else x.axis + by
    return Moving(x.sign, axis, x.always)


def _fill(places: list[Moving | None], values: list[Any]) -> list[Any]:
    left = iter(values)
    return [next(left) if place is None else place for place in places]


def _still(values: list[Any]) -> list[Any]:
    return [x for x in values if not isinstance(x, Moving)]

"""A bound on the distance of `f(z)` from its value in exact arithmetic, read off the jaxpr of f.

For numbers of one sign, the relative errors of sums and products in any order add up and are never
amplified: with unit roundoff u, a sum of m products has an error of at most `m u / (1 - m u)`
(Higham, Accuracy and stability of numerical algorithms, 2nd ed., 2002, equation 3.5). A function
passes on `|u sigma'(u) / sigma(u)|` of the error of its argument, for which the table of
`_rounding_rules.py` has a bound, and adds its own error. `_signs.py` proves that numbers have one
sign; where this depends on arrays, it proves so when f runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, Float, PyTree

from .._bilinear import asks_highest
from .._checks import check_int
from .._tree import unify, widen
from ._equations import (
    SWITCHES,
    body,
    everything,
    is_softplus,
    refusal,
    scan_parts,
    trace,
)
from ._rounding_rules import Operation, error
from ._signs import signs


def rounding(
    fn: Callable,
    z: PyTree,
    args: PyTree,
    fan_in: int | None,
    name: str = "certify",
    *,
    rank: int = 0,
    slack: float | None = None,
) -> Float[Array, "*b"]:
    """A bound on `|f^(z) - f(z)| / f(z)` for each problem, entry by entry, for z >= 0.

    Among the operations that depend on z, each sum counts its terms and each function its units in
    the last place. The bound is infinite if an array in f does not have the sign that is needed.
    Without a `slack`, it is also infinite if a number passes through float16, where digits vanish
    unnoticed, or through a convolution below the highest precision, which may cancel. `fn` is as
    `convert` returns it. A `slack`, or a `fan_in` (the number of terms of one sum, followed by one
    addition and one function), replaces the count, but not the check of the signs of arrays.

    **Raises:** `ValueError` for an operation about which nothing is known, or that cancels.
    """
    jaxpr = trace(fn, z, args)
    counted = slack is None and fan_in is None
    if slack is not None:
        slack = _relative(slack)
    elif not _normal(jaxpr.jaxpr) or _filtered(jaxpr.jaxpr):
        slack = math.inf
    else:
        slack = count(jaxpr, name) if fan_in is None else of_one_sum(z, fan_in, name)
    leaves = unify([widen(x) for x in jax.tree.leaves(z)])
    good = signs(jaxpr, leaves[0].shape[:rank], name, strict=counted)
    return jnp.where(good, jnp.asarray(slack, leaves[0].dtype), jnp.inf)


def count(jaxpr: ClosedJaxpr, name: str) -> float:
    """The bound for numbers of one sign, for every entry of every output."""
    outs = _Walk(name).through(jaxpr, [0.0] * len(jaxpr.jaxpr.invars))
    return _relative(max((out for out in outs if out is not None), default=0.0))


def of_one_sum(z: PyTree, fan_in: int, name: str) -> float:
    """The bound for a sum of `fan_in` terms, one addition and one function."""
    check_int(name, "fan_in", fan_in, "pass the number of terms of the longest sum in fn, or None.")
    unit = max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(z))
    return _relative((fan_in + 1 + 8) * unit)


def _normal(jaxpr: Jaxpr) -> bool:
    """Whether no float in `jaxpr` is float16, which has fewer exponents than float32."""
    each = lambda j: (*j.invars, *(v for eqn in j.eqns for v in eqn.outvars))
    dtypes = {getattr(v.aval, "dtype", None) for j in everything(jaxpr) for v in each(j)}
    return jnp.dtype(jnp.float16) not in dtypes


def _filtered(jaxpr: Jaxpr) -> bool:
    """Whether a convolution in `jaxpr` may be lowered to minimal filtering, which cancels."""
    kinds = ("deqjax_conv2d", "deqjax_conv2d_image")
    convs = [e for j in everything(jaxpr) for e in j.eqns if e.primitive.name in kinds]
    small = lambda e: e.invars[1].aval.shape[:2] == (3, 3)
    return any(small(e) and not asks_highest(e.params["precision"]) for e in convs)


def _relative(total: float) -> float:
    return total / (1 - total) if total < 1 else math.inf


class _Walk:
    """A walk through a jaxpr; its errors name the function `name`.

    A number bounds the relative error of a value that depends on z; other values have None.
    """

    def __init__(self, name: str):
        self.name = name

    def through(self, closed: ClosedJaxpr, errors: list[float | None]) -> list[float | None]:
        values: dict[Any, float | None] = dict(zip(closed.jaxpr.invars, errors, strict=True))
        read = lambda v: None if isinstance(v, Literal) else values.get(v)
        for eqn in closed.jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            if eqn.outvars and any(x is not None for x in inputs):
                values |= dict(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(v) for v in closed.jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[float | None]) -> list[float | None]:
        kind = eqn.primitive.name
        if kind == "scan":
            return self.scan(eqn, inputs)
        if kind == "cond":
            branches = (self.through(b, inputs[1:]) for b in eqn.params["branches"])
            return [_worst(outs) for outs in zip(*branches, strict=True)]
        if kind == "while":
            raise refusal(self.name, kind, "is a loop of no fixed length")
        if is_softplus(eqn):
            kind = "softplus"
        elif (inside := body(eqn)) is not None:
            return self.through(inside, inputs)
        dtypes = [v.aval.dtype for v in eqn.outvars]
        if kind in SWITCHES:
            return [None] * len(dtypes)  # f is continuous where it switches
        if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
            raise refusal(self.name, kind, "is not of real floating-point numbers")
        return [self.primitive(eqn, kind, inputs)] * len(dtypes)

    def primitive(self, eqn: Any, kind: str, inputs: list[float | None]) -> float:
        moving = [x for x in inputs if x is not None]
        unit = float(jnp.finfo(eqn.outvars[0].aval.dtype).eps) / 2
        return error(Operation(self.name, eqn, kind, inputs, max(moving), sum(moving), unit))

    def scan(self, eqn: Any, inputs: list[float | None]) -> list[float | None]:
        inside, first, num = scan_parts(eqn)
        carry, rest = inputs[first : first + num], inputs[first + num :]
        made: list[float | None] = [None] * (len(eqn.outvars) - num)
        for _ in range(eqn.params["length"]):
            outs = self.through(inside, [*inputs[:first], *carry, *rest])
            carry = outs[:num]
            made = [_worst(pair) for pair in zip(made, outs[num:], strict=True)]
            if any(x is not None and x > 1 for x in carry):
                return [math.inf] * len(eqn.outvars)  # no bound is left
        return [*carry, *made]


def _worst(errors: tuple[float | None, ...]) -> float | None:
    return max((x for x in errors if x is not None), default=None)

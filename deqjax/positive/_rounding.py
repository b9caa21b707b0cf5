"""How far rounding can take `f(z)` from what it would be in exact arithmetic: read off its jaxpr.

For numbers of one sign, sums and products in any order have a relative error, which adds up and is
never amplified: with unit roundoff u, a sum of m products is off by `m u / (1 - m u)` at most
(Higham, Accuracy and stability of numerical algorithms, 2nd ed., 2002, equation 3.5). A function
passes on `|u sigma'(u) / sigma(u)|` of the error of its argument, for which there is a bound of 1
or less for each one in the table, and adds its own. That numbers have one sign is proved beside
this, by `_signs.py`: as far as it depends on arrays, when f runs.
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
    constants,
    everything,
    is_softplus,
    refusal,
    scan_parts,
    terms,
    trace,
)
from ._signs import signs

# How much of a relative error each passes on, of arguments >= 0 (or of either sign, if odd), and
# by how many units in the last place XLA's version misses: the largest over 4e6 points log-uniform
# in [1e-10, 60] on a CPU, float32 and float64, rounded up (tanh 4.9 and 7.0, erf 4.9, expm1 5.9,
# log1p 3.6, logistic 1.8, atan 1.4, softplus 2.6). Not measured on other devices.
_FUNCTIONS = {
    **dict.fromkeys(("tanh", "erf", "expm1"), (1.0, 8)),
    **dict.fromkeys(("log1p", "atan", "logistic", "softplus"), (1.0, 4)),
    "sqrt": (0.5, 1),
    "cbrt": (1 / 3, 8),
    "rsqrt": (0.5, 4),
    "square": (2.0, 1),
    "integer_pow": (0.0, 0),  # by its exponent, below
    "pow": (0.0, 8),  # likewise
}
_MATRIX = frozenset(
    "dot_general conv_general_dilated deqjax_conv2d deqjax_conv2d_image deqjax_dense".split()
)
_EXACT = frozenset(
    "abs broadcast_in_dim clamp concatenate copy dynamic_slice dynamic_update_slice expand_dims "
    "gather max min name neg optimization_barrier pad pcast pvary reduce_max reduce_min "
    "reduce_window_max reshape rev select_n sharding_constraint slice split squeeze stack "
    "stop_gradient tile transpose".split()
)
# Of a float32 product on an accelerator unless the highest precision is asked for: bfloat16 inputs.
_FAST_PRODUCTS = 2.0**-7


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
    """A bound of `|f^(z) - f(z)| / f(z)` of each problem, entry by entry, for z >= 0.

    Of what depends on z, each sum counts its terms and each function its units in the last place.
    Infinite where an array in f has not the sign that this needs, and, unless a `slack` vouches for
    it, where a number passes through float16, in which digits vanish that no one misses, or through
    a convolution for which the highest precision is not asked, and which may then cancel.
    `fn` is as `convert` returns it;
    `slack`, or a `fan_in` (the number of terms of one sum, followed by one addition and one
    function) takes the place of what is counted, but not of the signs of arrays.

    **Raises:** `ValueError` for an operation of which nothing is known, or that cancels.
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
    """The bound for numbers of one sign, of every entry of every output."""
    outs = _Walk(name).through(jaxpr, [0.0] * len(jaxpr.jaxpr.invars))
    return _relative(max((out for out in outs if out is not None), default=0.0))


def of_one_sum(z: PyTree, fan_in: int, name: str) -> float:
    """The bound for a sum of `fan_in` terms, one addition and one function."""
    check_int(
        name, "fan_in", fan_in, "it is the number of terms of the longest sum in fn, or None."
    )
    unit = max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(z))
    return _relative((fan_in + 1 + 8) * unit)


def _normal(jaxpr: Jaxpr) -> bool:
    """Whether no float in it has fewer exponents than float32: none is float16."""
    each = lambda j: (*j.invars, *(v for eqn in j.eqns for v in eqn.outvars))
    dtypes = {getattr(v.aval, "dtype", None) for j in everything(jaxpr) for v in each(j)}
    return jnp.dtype(jnp.float16) not in dtypes


def _filtered(jaxpr: Jaxpr) -> bool:
    """Whether a convolution in it may be lowered to minimal filtering, which cancels."""
    kinds = ("deqjax_conv2d", "deqjax_conv2d_image")
    convs = [e for j in everything(jaxpr) for e in j.eqns if e.primitive.name in kinds]
    small = lambda e: e.invars[1].aval.shape[:2] == (3, 3)
    return any(small(e) and not asks_highest(e.params["precision"]) for e in convs)


def _relative(total: float) -> float:
    return total / (1 - total) if total < 1 else math.inf


class _Walk:
    """Through a jaxpr, for the function named in what it raises.

    A number is a bound of the relative error of what depends on z, None stands for what does not.
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
        largest, total = max(moving), sum(moving)
        unit = float(jnp.finfo(eqn.outvars[0].aval.dtype).eps) / 2
        length = terms(eqn)
        if kind in ("mul", "div"):
            # XLA divides by multiplying with a rounded reciprocal, of a square root by rsqrt.
            return total + (3 if kind == "div" else 1) * unit
        if kind in _MATRIX:
            fast = unit >= 2.0**-24 and not asks_highest(eqn.params.get("precision"))
            return total + (length or 1) * unit + _cast(eqn) + fast * _FAST_PRODUCTS
        if length is not None:
            return largest + length * unit
        if kind in ("add", "add_any"):
            return largest + unit
        if kind == "convert_element_type":
            before = float(jnp.finfo(eqn.invars[0].aval.dtype).eps) / 2
            return largest + (unit if unit > before else 0)
        if kind in _EXACT:
            return largest
        if kind in _FUNCTIONS:
            passed, units = _FUNCTIONS[kind]
            if kind == "integer_pow":
                passed = units = abs(eqn.params["y"])
            if kind == "pow":
                if inputs[1] is not None or not constants(eqn):
                    raise refusal(self.name, kind, "has an exponent that is no constant")
                passed = abs(constants(eqn)[-1])
            return passed * largest + units * unit
        what = "may cancel" if kind == "sub" else "is none whose rounding is known"
        raise refusal(self.name, kind, what)

    def scan(self, eqn: Any, inputs: list[float | None]) -> list[float | None]:
        inside, first, num = scan_parts(eqn)
        carry, rest = inputs[first : first + num], inputs[first + num :]
        made: list[float | None] = [None] * (len(eqn.outvars) - num)
        for _ in range(eqn.params["length"]):
            outs = self.through(inside, [*inputs[:first], *carry, *rest])
            carry = outs[:num]
            made = [_worst(pair) for pair in zip(made, outs[num:], strict=True)]
            if any(x is not None and x > 1 for x in carry):
                return [math.inf] * len(eqn.outvars)  # there is no bound any more
        return [*carry, *made]


def _worst(errors: tuple[float | None, ...]) -> float | None:
    return max((x for x in errors if x is not None), default=None)


def _cast(eqn: Any) -> float:
    """The rounding of a weight that a product takes in a shorter dtype than it has."""
    units = [float(jnp.finfo(v.aval.dtype).eps) / 2 for v in eqn.invars]
    return units[0] if eqn.primitive.name == "deqjax_dense" and units[0] > units[1] else 0.0

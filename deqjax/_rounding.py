"""How far rounding can take `f(z)` from what it would be in exact arithmetic: read off its jaxpr.

For numbers of one sign, sums and products in any order have a relative error, which adds up and is
never amplified: with unit roundoff u, a sum of m products is off by `m u / (1 - m u)` at most
(Higham, Accuracy and stability of numerical algorithms, 2nd ed., 2002, equation 3.5). A function
passes on `|u sigma'(u) / sigma(u)|` of the error of its argument, for which there is a bound of 1
or less for each one in the table, and adds its own. Whatever may cancel is refused.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from ._step import evaluate

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
_ODD = frozenset(("tanh", "erf", "atan"))
_PRODUCTS = frozenset(("mul", "div", "dot_general", "conv_general_dilated", "deqjax_conv2d"))
_EXACT = frozenset(
    "abs broadcast_in_dim clamp concatenate copy dynamic_slice dynamic_update_slice expand_dims "
    "gather max min name neg optimization_barrier pad pcast pvary reduce_max reduce_min "
    "reduce_window_max reshape rev select_n sharding_constraint slice split squeeze stack "
    "stop_gradient tile transpose".split()
)
_SWITCHES = frozenset("and eq ge gt is_finite le lt ne not or sign".split())
# Of a float32 product on an accelerator unless the highest precision is asked for: bfloat16 inputs.
_FAST_PRODUCTS = 2.0**-7


class _Known(NamedTuple):
    """Of a number that depends on z: a bound of its relative error, and whether it is <= 0."""

    error: float
    negative: bool = False


def rounding(
    fn: Callable, z: PyTree, args: PyTree, fan_in: int | None, name: str = "certify"
) -> float:
    """A bound of `|f^(z) - f(z)| / f(z)`, entry by entry; `fn` as `convert` returns it.

    Of what depends on z, each sum counts its terms and each function its units in the last place.
    `fan_in` in the place of None is the number of terms of one sum, followed by one addition and
    one function.

    **Raises:** `ValueError` for an operation of which nothing is known, or that cancels.
    """
    if fan_in is not None:
        return of_one_sum(z, fan_in, name)
    jaxpr = jax.make_jaxpr(lambda z: evaluate(fn, z, args)[0])(z).jaxpr
    outs = _Walk(name).through(jaxpr, [_Known(0.0)] * len(jaxpr.invars))
    return _relative(max(out.error for out in outs if out is not None) if any(outs) else 0.0)


def of_one_sum(z: PyTree, fan_in: int, name: str) -> float:
    """The bound for a sum of `fan_in` terms, one addition and one function."""
    if isinstance(fan_in, bool) or not isinstance(fan_in, int) or fan_in < 1:
        raise ValueError(
            f"{name} expects fan_in to be None or an int of at least 1, the number of terms of "
            f"the longest sum in fn, got {fan_in!r}."
        )
    unit = max(float(jnp.finfo(x.dtype).eps) / 2 for x in jax.tree.leaves(z))
    return _relative((fan_in + 1 + 8) * unit)


def _relative(total: float) -> float:
    return total / (1 - total) if total < 1 else math.inf


class _Walk:
    """Through a jaxpr, for the function named in what it raises."""

    def __init__(self, name: str):
        self.name = name

    def through(self, jaxpr: Jaxpr, known: list[_Known | None]) -> list[_Known | None]:
        """What is known of the outputs; None for what does not depend on z."""
        values: dict[Any, _Known | None] = dict(zip(jaxpr.invars, known, strict=True))
        read = lambda v: None if isinstance(v, Literal) else values.get(v)
        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            if eqn.outvars and any(x is not None for x in inputs):
                values |= dict(zip(eqn.outvars, self.equation(eqn, inputs), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[_Known | None]) -> list[_Known | None]:
        kind = eqn.primitive.name
        bodies = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
        if kind == "scan":
            return self.scan(eqn, inputs)
        if kind == "cond":
            branches = [b.jaxpr for b in eqn.params["branches"]]
            return [_worst(o) for o in zip(*(self.through(b, inputs[1:]) for b in branches),
                                           strict=True)]  # fmt: skip
        if _is_softplus(eqn):
            kind, bodies = "softplus", []
        if kind == "while":
            raise self.refusal(kind, "is a loop of no fixed length")
        if len(bodies) == 1:
            body = bodies[0].jaxpr if isinstance(bodies[0], ClosedJaxpr) else bodies[0]
            if len(body.invars) == len(inputs):
                return self.through(body, inputs)
        dtypes = [v.aval.dtype for v in eqn.outvars]
        if kind in _SWITCHES and not any(jnp.issubdtype(d, jnp.inexact) for d in dtypes):
            return [None] * len(dtypes)  # a comparison: f is continuous where it switches
        if not all(jnp.issubdtype(d, jnp.floating) for d in dtypes):
            raise self.refusal(kind, "is not of real floating-point numbers")
        moving = [x for x in inputs if x is not None]
        negative = sum(x.negative for x in moving) % 2 == 1
        return [self.primitive(eqn, kind, moving, negative, inputs)] * len(eqn.outvars)

    def primitive(self, eqn, kind, moving: list[_Known], negative: bool, inputs) -> _Known:
        unit = float(jnp.finfo(eqn.outvars[0].aval.dtype).eps) / 2
        largest, total = max(x.error for x in moving), sum(x.error for x in moving)
        constants = [v.val for v in eqn.invars if isinstance(v, Literal)]
        sign = any(jnp.ndim(c) == 0 and c < 0 for c in constants)
        if kind in _PRODUCTS:
            fast = kind not in ("mul", "div") and unit >= 2.0**-24 and _fast(eqn)
            error = total + (_terms(eqn) or 1) * unit + fast * _FAST_PRODUCTS
            return _Known(error, negative != sign)
        if (terms := _terms(eqn)) is not None:
            return _Known(largest + terms * unit, negative)
        if kind in ("add", "add_any"):
            if any(x.negative for x in moving) or sign:
                raise self.refusal(kind, "of numbers of opposite signs may cancel")
            return _Known(largest + unit)
        if kind == "convert_element_type":
            before = float(jnp.finfo(eqn.invars[0].aval.dtype).eps) / 2
            return _Known(largest + (unit if unit > before else 0), negative)
        if kind in _EXACT:
            if kind in ("neg", "abs"):
                negative = not negative if kind == "neg" else False
            elif any(x.negative for x in moving):
                negative = True
            return _Known(largest, negative)
        if kind in _FUNCTIONS:
            if kind == "expm1" and not negative:
                raise self.refusal(kind, "of a positive number multiplies its relative error")
            if negative and kind != "expm1" and kind not in _ODD:
                raise self.refusal(kind, "of a negative number multiplies its relative error")
            passed, units = _FUNCTIONS[kind]
            if kind == "integer_pow":
                passed = units = abs(eqn.params["y"])
            if kind == "pow":
                if inputs[1] is not None or not constants:
                    raise self.refusal(kind, "has an exponent that is no constant")
                passed = abs(float(constants[-1]))
            return _Known(passed * largest + units * unit, negative)
        what = "may cancel" if kind == "sub" else "is none whose rounding is known"
        raise self.refusal(kind, what)

    def scan(self, eqn: Any, inputs: list[_Known | None]) -> list[_Known | None]:
        body = eqn.params["jaxpr"].jaxpr
        first, carried = eqn.params["num_consts"], eqn.params["num_carry"]
        carry, rest = inputs[first : first + carried], inputs[first + carried :]
        outs: list[_Known | None] = []
        for _ in range(eqn.params["length"]):
            outs = self.through(body, [*inputs[:first], *carry, *rest])
            carry = outs[:carried]
            if any(x is not None and x.error > 1 for x in carry):
                break  # there is no bound any more
        return outs

    def refusal(self, kind: str, what: str) -> ValueError:
        return ValueError(
            f"{self.name} expects fn to consist of sums, products, quotients and functions of "
            f"nonnegative numbers whose rounding it can count; got {kind!r}, which {what}. Write "
            f"it otherwise (jnp.log1p, jax.nn.sigmoid, -jnp.expm1(-u)), or pass fan_in=the number "
            f"of terms of its longest sum if you know that its relative error is about that of one "
            f"such sum."
        )


def _worst(values: tuple[_Known | None, ...]) -> _Known | None:
    known = [x for x in values if x is not None]
    return max(known, key=lambda x: (x.negative, x.error)) if known else None


def _is_softplus(eqn: Any) -> bool:
    """Whether this is JAX's own, by its body, in which differences do not cancel."""
    if eqn.params.get("name") != "softplus" or len(eqn.invars) != 1:
        return False
    aval = eqn.invars[0].aval
    own = jax.make_jaxpr(jax.nn.softplus)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return str(own.jaxpr.eqns[0].params.get("jaxpr")) == str(eqn.params.get("jaxpr"))


def _fast(eqn: Any) -> bool:
    highest = "highest" in str(eqn.params.get("precision")).lower()
    return jax.default_backend() != "cpu" and not highest


def _terms(eqn: Any) -> int | None:
    """The length of the sums that an operation forms; None if it forms none."""
    shapes = [v.aval.shape for v in eqn.invars]
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            return math.prod(shapes[0][i] for i in contracted)
        case "conv_general_dilated":
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            return math.prod(shapes[1]) // shapes[1][features]
        case "deqjax_conv2d":
            return math.prod(shapes[1][:3])
        case "reduce_sum":
            return math.prod(shapes[0][i] for i in eqn.params["axes"])
        case "cumsum":
            return shapes[0][eqn.params["axis"]]
        case "reduce_window_sum":
            return math.prod(eqn.params["window_dimensions"])
        case _:
            return None

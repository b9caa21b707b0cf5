"""The relative error of each operation of f, from the errors of its operands."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from .._bilinear import asks_highest
from ._equations import constants, refusal, terms

# The factor of a relative error that each function passes on, for arguments >= 0 (or of either
# sign, if it is odd), and the error of XLA's version in units in the last place: the largest over
# 4e6 points log-uniform in [1e-10, 60] on a CPU, float32 and float64, rounded up (tanh 4.9 and 7.0,
# erf 4.9, expm1 5.9, log1p 3.6, logistic 1.8, atan 1.4, softplus 2.6). Not measured on other
# devices.
_FUNCTIONS = {
    **dict.fromkeys(("tanh", "erf", "expm1"), (1.0, 8)),
    **dict.fromkeys(("log1p", "atan", "logistic", "softplus"), (1.0, 4)),
    "sqrt": (0.5, 1),
    "cbrt": (1 / 3, 8),
    "rsqrt": (0.5, 4),
    "square": (2.0, 1),
}
_POW_UNITS = 8
_MATRIX = frozenset(
    "dot_general conv_general_dilated deqjax_conv2d deqjax_conv2d_image deqjax_dense".split()
)
_EXACT = frozenset(
    "abs broadcast_in_dim clamp concatenate copy dynamic_slice dynamic_update_slice expand_dims "
    "gather max min name neg optimization_barrier pad pcast pvary reduce_max reduce_min "
    "reduce_window_max reshape rev select_n sharding_constraint slice split squeeze stack "
    "stop_gradient tile transpose".split()
)
# The rounding of a float32 product on an accelerator below the highest precision, to bfloat16.
_FAST_PRODUCTS = 2.0**-7


class Operation(NamedTuple):
    """An operation on numbers, some of which have an error."""

    name: str  # the public function named in an error
    eqn: Any
    kind: str
    errors: list[float | None]  # of the operands
    largest: float
    total: float
    unit: float  # roundoff of the result


def error(op: Operation) -> float:
    """A bound on the relative error of the result."""
    return _RULES.get(op.kind, _unknown)(op)


def _scaled(op: Operation) -> float:
    # XLA divides by multiplying with a rounded reciprocal, and by a square root with rsqrt.
    return op.total + (3 if op.kind == "div" else 1) * op.unit


def _product(op: Operation) -> float:
    fast = op.unit >= 2.0**-24 and not asks_highest(op.eqn.params.get("precision"))
    return op.total + (terms(op.eqn) or 1) * op.unit + _cast(op.eqn) + fast * _FAST_PRODUCTS


def _cast(eqn: Any) -> float:
    """The rounding of a weight that a product casts to a shorter dtype."""
    units = [float(jnp.finfo(v.aval.dtype).eps) / 2 for v in eqn.invars]
    return units[0] if eqn.primitive.name == "deqjax_dense" and units[0] > units[1] else 0.0


def _summed(op: Operation) -> float:
    return op.largest + (terms(op.eqn) or 0) * op.unit


def _converted(op: Operation) -> float:
    before = float(jnp.finfo(op.eqn.invars[0].aval.dtype).eps) / 2
    return op.largest + (op.unit if op.unit > before else 0)


def _function(op: Operation) -> float:
    passed, units = _FUNCTIONS[op.kind]
    return passed * op.largest + units * op.unit


def _integer_power(op: Operation) -> float:
    exponent = abs(op.eqn.params["y"])
    return exponent * op.largest + exponent * op.unit


def _power(op: Operation) -> float:
    if op.errors[1] is not None or not constants(op.eqn):
        raise refusal(op.name, op.kind, "has an exponent that is no constant")
    return abs(constants(op.eqn)[-1]) * op.largest + _POW_UNITS * op.unit


def _unknown(op: Operation) -> float:
    what = "may cancel" if op.kind == "sub" else "is none whose rounding is known"
    raise refusal(op.name, op.kind, what)


_RULES: dict[str, Callable[[Operation], float]] = {
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(_MATRIX, _product),
    **dict.fromkeys(("reduce_sum", "cumsum", "reduce_window_sum"), _summed),
    **dict.fromkeys(("add", "add_any"), lambda op: op.largest + op.unit),
    **dict.fromkeys(_EXACT, lambda op: op.largest),
    **dict.fromkeys(_FUNCTIONS, _function),
    "convert_element_type": _converted,
    "integer_pow": _integer_power,
    "pow": _power,
}

"""The sign of the result of each operation of f, and the signs that its array operands must have.

As in `_signs.py`, a `Moving` is a value that depends on z. Any other value does not: a scalar that
is written into f, with a known sign, or an array, which is known when f runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._equations import SWITCHES, terms

ODD = frozenset(("tanh", "erf", "atan"))
_POSITIVE = frozenset("cbrt integer_pow log1p logistic pow rsqrt softplus sqrt square".split())
_PRODUCTS = frozenset(
    "conv_general_dilated deqjax_conv2d deqjax_conv2d_image deqjax_dense "
    "div dot_general mul".split()
)
_KEEPING = frozenset(
    "broadcast_in_dim convert_element_type copy dynamic_slice expand_dims gather name pcast pvary "
    "reduce_max reduce_min reduce_window_max reshape rev sharding_constraint slice split squeeze "
    "stop_gradient tile transpose".split()
)
# The number of operands that are numbers, None for all; the rest are indices.
_JOINING = {"add": 2, "add_any": 2, "concatenate": None, "stack": None}
_JOINING |= {"dynamic_update_slice": 2, "pad": 2}
_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_CANCELS = "of numbers of opposite signs may cancel"


class Moving(NamedTuple):
    """A value that depends on z: all of it >= 0, or all of it <= 0."""

    sign: int = 1
    axis: int | None = None  # the axis that enumerates problems, if it is known
    always: bool | None = None  # the outcome of a comparison, if it is known


class Held(NamedTuple):
    """The sign that operand i, or its used part, must have; it must not be 0 if `strictly`."""

    i: int
    value: Any
    sign: int
    strictly: bool = False


class Rule(NamedTuple):
    """The sign of a result whose operands are as `held` requires, or why it has none."""

    sign: int = 1
    held: tuple[Held, ...] = ()
    always: bool | None = None
    refused: str | None = None


def written(x: Any) -> bool:
    """Whether this is a scalar whose value is known."""
    return not isinstance(x, Moving | jax.Array) and np.ndim(x) == 0


def _sign(x: Any) -> int:
    """The sign that a `Moving` or a scalar has, and that an array must have."""
    return x.sign if isinstance(x, Moving) else -1 if written(x) and x < 0 else 1


def join(values: list[tuple[int, Any]]) -> Rule:
    """The rule for numbers that must share the sign of the first `Moving`; without one, be >= 0."""
    sign = next((x.sign for _, x in values if isinstance(x, Moving)), 1)
    return _all(sign, values)


def _all(sign: int, values: list[tuple[int, Any]]) -> Rule:
    settled = lambda x: isinstance(x, Moving) or written(x)
    wrong = any(settled(x) and _sign(x) != sign and not (written(x) and x == 0) for _, x in values)
    held = tuple(Held(i, x, sign) for i, x in values if not settled(x))
    return Rule(sign, held, refused=_CANCELS if wrong else None)


def vouched(inputs: list[Any]) -> Rule:
    """The rule for a result that the user vouches to be nonnegative."""
    floats = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return _all(1, [(i, x) for i, x in enumerate(inputs) if floats(x)])


def rule(eqn: Any, kind: str, inputs: list[Any]) -> Rule:
    """The rule of an equation with an operand that depends on z."""
    if kind in _RULES:
        return _RULES[kind](eqn, kind, inputs)
    if terms(eqn) is not None:
        return _kept(eqn, kind, inputs)
    if kind in SWITCHES or eqn.outvars[0].aval.dtype == bool:
        return Rule(always=_outcome(kind, inputs))
    what = "may cancel" if kind == "sub" else "is none whose rounding is known"
    return Rule(refused=what)


def _product(eqn: Any, kind: str, inputs: list[Any]) -> Rule:
    sign = 1
    for x in inputs:
        sign *= _sign(x)
    arrays = [(i, x) for i, x in enumerate(inputs) if not isinstance(x, Moving)]
    by = lambda i: kind == "div" and i == 1
    return Rule(sign, tuple(Held(i, x, 1, by(i)) for i, x in arrays if not written(x)))


def _joined(eqn: Any, kind: str, inputs: list[Any]) -> Rule:
    return join([*enumerate(inputs)][: _JOINING[kind]])


def _kept(eqn: Any, kind: str, inputs: list[Any]) -> Rule:
    first = inputs[0]
    kept = join([(0, first)])
    fill = eqn.params.get("fill_value")
    if fill is not None and not kept.sign * fill >= 0:
        return kept._replace(refused="fills in numbers of another sign")
    return kept._replace(always=first.always if isinstance(first, Moving) else None)


def _function(eqn: Any, kind: str, inputs: list[Any]) -> Rule:
    sign = _sign(inputs[0])
    if kind == "expm1" and sign > 0:
        return Rule(refused="of a positive number multiplies its relative error")
    if kind in _POSITIVE and sign < 0:
        return Rule(refused="of a negative number multiplies its relative error")
    return Rule(sign, _all(sign, [*enumerate(inputs)][:1]).held)


def _extremum(sign: int, values: list[tuple[int, Any]]) -> Rule:
    """A maximum (sign 1) is >= 0 if one number is; a minimum (sign -1) is <= 0 if one number is."""
    if any(isinstance(x, Moving) and x.sign == sign for _, x in values):
        return Rule(sign)
    return _all(-sign, values)


def _clamp(inputs: list[Any]) -> Rule:
    low, x, high = inputs
    if not isinstance(x, Moving):
        return join([*enumerate(inputs)])
    above = _extremum(1, [(0, low), (1, x)])
    below = _extremum(-1, [(1, Moving(above.sign)), (2, high)])
    return below._replace(held=above.held + below.held, refused=above.refused or below.refused)


def _select(inputs: list[Any]) -> Rule:
    which, *cases = inputs
    if isinstance(which, Moving):
        chosen = [*enumerate(cases, 1)]
        return join(chosen if which.always is None else [chosen[which.always]])
    # Only the selected entries of a case must have a sign.
    mask = jnp.asarray(which).astype(jnp.int32)
    used = lambda i, x: x if isinstance(x, Moving) else jnp.where(mask == i, jnp.asarray(x), 0)
    return join([(i + 1, used(i, x)) for i, x in enumerate(cases)])


def _outcome(kind: str, inputs: list[Any]) -> bool | None:
    """The outcome of comparing a value that depends on z with a number, if its sign decides it."""
    left, *right = inputs
    if kind == "not" and left.always is not None:
        return not left.always
    if kind not in _MIRRORED:
        return None
    (right,) = right
    if isinstance(right, Moving):
        left, right, kind = right, left, _MIRRORED[kind]
    if isinstance(right, Moving) or not written(right):
        return None
    if left.sign < 0:
        kind, right = _MIRRORED[kind], -right
    # Now the comparison is of a number u >= 0.
    if kind in ("lt", "ge"):
        return kind == "ge" if right <= 0 else None
    return kind == "gt" if right < 0 else None


_RULES: dict[str, Callable[[Any, str, list[Any]], Rule]] = {
    **dict.fromkeys(_PRODUCTS, _product),
    **dict.fromkeys(_JOINING, _joined),
    **dict.fromkeys(_KEEPING, _kept),
    **dict.fromkeys((*ODD, *_POSITIVE, "expm1"), _function),
    "neg": lambda eqn, kind, inputs: Rule(-inputs[0].sign),
    "abs": lambda eqn, kind, inputs: Rule(1),
    "max": lambda eqn, kind, inputs: _extremum(1, [*enumerate(inputs)]),
    "min": lambda eqn, kind, inputs: _extremum(-1, [*enumerate(inputs)]),
    "clamp": lambda eqn, kind, inputs: _clamp(inputs),
    "select_n": lambda eqn, kind, inputs: _select(inputs),
}

"""How far rounding can take `f(z)` from what it would be in exact arithmetic: read off its jaxpr.

For a function of nonnegative numbers that only adds, multiplies, divides and applies functions
sigma with `u sigma'(u) <= sigma(u)`, errors are relative, and they add up. With unit roundoff u,
m products and their sum in any order are off by `m u / (1 - m u)` at most (Higham, Accuracy and
stability of numerical algorithms, 2nd ed., 2002, equation 3.5); no difference can cancel.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from ._step import evaluate

# Units in the last place by which XLA's functions miss: the largest over 4e6 points log-uniform in
# [1e-10, 60] on a CPU, float32 and float64, rounded up (tanh 4.9 and 7.0, erf 4.9, expm1 5.9,
# log1p 3.6, logistic 1.8, atan 1.4, softplus 2.6).
_FUNCTIONS = {
    **dict.fromkeys(("tanh", "erf", "erfc", "expm1", "exp", "exp2", "log", "pow"), 8),
    **dict.fromkeys(("log1p", "logistic", "atan", "softplus", "cbrt", "sin", "cos"), 4),
    **dict.fromkeys(("add", "mul", "div", "sqrt", "square", "add_any"), 1),
    **dict.fromkeys(("rsqrt",), 2),
}
_EXACT = frozenset(
    "abs and argmax argmin broadcast_in_dim ceil clamp concatenate copy copy_p dynamic_slice "
    "dynamic_update_slice eq expand_dims floor gather ge gt iota is_finite le lt max min ne neg "
    "not optimization_barrier or pad pcast pvary reduce_and reduce_max reduce_min reduce_or "
    "reduce_precision reduce_window_max reshape rev select_n sharding_constraint sign slice "
    "squeeze stop_gradient transpose reduce_window_max_p".split()
)
# Of the products on an accelerator unless the highest precision is asked for: bfloat16 inputs.
_FAST_PRODUCTS = 2.0**-7


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
    total, _ = _of(jaxpr, [True] * len(jaxpr.invars), name)
    return _relative(total)


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


def _of(jaxpr: Jaxpr, depends: list[bool], name: str) -> tuple[float, list[bool]]:
    """The sum over the equations that depend on z, and which outputs do."""
    moving = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
    moves = lambda v: not isinstance(v, Literal) and v in moving
    total = 0.0
    for eqn in jaxpr.eqns:
        flags = [moves(v) for v in eqn.invars]
        if not any(flags):
            continue
        error, outs = _equation(eqn, flags, name)
        total += error
        moving.update(v for v, d in zip(eqn.outvars, outs, strict=True) if d)
    return total, [moves(v) for v in jaxpr.outvars]


def _equation(eqn: Any, flags: list[bool], name: str) -> tuple[float, list[bool]]:
    kind, every = eqn.primitive.name, [True] * len(eqn.outvars)
    dtype = eqn.outvars[0].aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return 0.0, every
    unit = float(jnp.finfo(dtype).eps) / 2
    if kind == "scan":
        return _scan(eqn, flags, name)
    if kind == "cond":
        parts = [_of(branch.jaxpr, flags[1:], name) for branch in eqn.params["branches"]]
        return max(error for error, _ in parts), every
    inner = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    label = eqn.params.get("name", kind)
    if label in _FUNCTIONS:  # a jitted function of JAX, softplus, whose body would seem to cancel
        return _FUNCTIONS[label] * unit, every
    if len(inner) == 1 and kind != "while":
        body = inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]
        if len(body.invars) == len(flags):
            return _of(body, flags, name)
    terms = _terms(eqn)
    if terms is not None:
        fast = (
            jax.default_backend() != "cpu"
            and "highest" not in str(eqn.params.get("precision")).lower()
        )
        return terms * unit + (_FAST_PRODUCTS if fast and "reduce" not in kind else 0.0), every
    if kind in _EXACT:
        return 0.0, every
    if kind == "convert_element_type":
        return unit, every
    if kind == "integer_power":
        return abs(eqn.params["y"]) * unit, every
    what = "cancels, so that its relative rounding has no bound" if kind == "sub" else "is unknown"
    raise ValueError(
        f"{name} expects fn to consist of sums, products, quotients and functions of nonnegative "
        f"numbers, whose rounding it can count; got {kind!r}, which {what}. Pass "
        f"fan_in=the number of terms of its longest sum if you know that its relative error is "
        f"about that of one such sum."
    )


def _scan(eqn: Any, flags: list[bool], name: str) -> tuple[float, list[bool]]:
    body = eqn.params["jaxpr"].jaxpr
    constants, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    while True:  # until no more of the carry depends on z
        error, outs = _of(body, flags, name)
        now = [a or b for a, b in zip(flags[constants:], outs[:carried], strict=False)]
        grown = flags[:constants] + now + flags[constants + carried :]
        if grown == flags:
            return eqn.params["length"] * error, outs
        flags = grown


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

"""The axis of an operation's result that corresponds, entry for entry, to an axis of an operand.

This follows the axis that enumerates the problems of a batch through f. An operation that is not
known here, or that mixes the entries of the axis, loses it: None.
"""

import math
from typing import Any

# Results have the shapes of their operands, except for scalars and axes of length 1.
_ELEMENTWISE = frozenset(
    "abs add add_any and atan cbrt clamp convert_element_type copy cos div eq erf exp exp2 expm1 "
    "ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg not or pcast pow "
    "pvary rsqrt select_n sharding_constraint sign sin square sqrt stop_gradient sub tanh xor "
    "softplus".split()
)
_REDUCTIONS = frozenset(("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"))
_CUMULATIVE = frozenset(("cumsum", "cummax", "cummin", "cumprod", "split"))


def after(eqn: Any, kind: str, i: int, axis: int | None) -> int | None:
    """The axis of the result that is `axis` of operand i, unchanged; None if there is none."""
    shape, out = eqn.invars[i].aval.shape, eqn.outvars[0].aval.shape
    if axis is None:
        return None
    p, full = eqn.params, axis < len(out) and out[axis] == shape[axis]
    # Families of operations with one rule.
    if kind in _ELEMENTWISE:
        return axis if full and len(shape) == len(out) else None
    if kind in _REDUCTIONS:
        return None if axis in p["axes"] else axis - sum(a < axis for a in p["axes"])
    if kind in _CUMULATIVE:
        return None if axis == p["axis"] else axis
    # Operations with rules of their own.
    match kind:
        case "broadcast_in_dim":
            to = p["broadcast_dimensions"][axis]
            return to if out[to] == shape[axis] else None
        case "transpose":
            return p["permutation"].index(axis)
        case "reshape":
            before = math.prod(shape[:axis])
            same = lambda j: math.prod(out[:j]) == before and out[j] == shape[axis]
            return next((j for j in range(len(out)) if same(j)), None)
        case "squeeze":
            return axis - sum(a < axis for a in p["dimensions"])
        case "rev":
            return None if axis in p["dimensions"] else axis
        case "concatenate":
            return None if axis == p["dimension"] else axis
        case "slice":
            return axis if full else None
        case "dynamic_slice" | "pad":
            return axis if full and i == 0 else None
        case "dynamic_update_slice":
            return axis if full and i <= 1 else None
        case "gather":
            return _gather(p, shape, axis) if i == 0 else None
        case "dot_general":
            return _dot_general(p["dimension_numbers"], eqn, i, axis)
        case "conv_general_dilated":
            numbers = p["dimension_numbers"]
            plain = i == 0 and axis == numbers.lhs_spec[0] and p["batch_group_count"] == 1
            return numbers.out_spec[0] if plain else None
        case "deqjax_conv2d" | "deqjax_conv2d_image":
            return 0 if i == 0 and axis == 0 else None
        case "deqjax_dense":
            kept = axis < len(shape) - 1 if i == 0 else axis == 1
            return (axis if i == 0 else len(out) - 1) if kept else None
    return None


def _dot_general(numbers: Any, eqn: Any, i: int, axis: int) -> int | None:
    contracted, shared = numbers
    if axis in contracted[i]:
        return None
    if axis in shared[i]:
        return tuple(shared[i]).index(axis)
    free = lambda i: [
        a
        for a in range(len(eqn.invars[i].aval.shape))
        if a not in contracted[i] and a not in shared[i]
    ]
    return len(shared[0]) + i * len(free(0)) + free(i).index(axis)


def _gather(p: Any, shape: tuple[int, ...], axis: int) -> int | None:
    numbers = p["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if axis in gone or axis in numbers.start_index_map or p["slice_sizes"][axis] != shape[axis]:
        return None
    kept = [a for a in range(len(shape)) if a not in gone]
    return numbers.offset_dims[kept.index(axis)]

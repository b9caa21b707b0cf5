"""Checks of numbers, choices and states that a user passes."""

import inspect
import math
import warnings
from numbers import Integral, Real
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree


def number(value: Any) -> float:
    """A real number as a Python float; NaN, which lies in no range, for anything else.

    A NumPy scalar would promote a bfloat16 to its own dtype, float32 or float64."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def to_numbers(owner: Any, *names: str) -> None:
    """Makes these fields of a frozen dataclass Python floats."""
    for name in names:
        object.__setattr__(owner, name, number(getattr(owner, name)))


def is_int(value: Any, least: float = 1) -> bool:
    """Whether `value` is a known integer of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_int(owner: str, name: str, value: Any, instead: str, least: int = 1) -> int:
    """Returns `value` as an int of at least `least`, or raises `ValueError`.

    `instead` says in the error what to do.
    """
    if not is_int(value, least):
        raise ValueError(
            f"{owner} expects {name} to be an int of at least {least}, got {value!r}; {instead}"
        )
    return int(value)


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless `value` is one of the choices."""
    if value not in choices:
        shown = ", ".join(f'"{x}"' for x in choices[:-1]) + f' or "{choices[-1]}"'
        raise ValueError(
            f"{owner} expects {name} to be {shown}, got {value!r}; choose one of them."
        )


def check_size(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is the length of an axis."""
    check_int("The layer", name, value, "pass the length of an axis.")


def renamed(old: str, new: str) -> None:
    """Warns, at the line of the user's code that calls, that `old` is named `new` now."""
    message = f"{old} is {new} now; the old name will be removed in the next release."
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("deqjax", "equinox"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecationWarning, stacklevel=level)


def float_state(z: PyTree) -> PyTree:
    """`z` as strongly typed arrays of real or complex floating point, integers promoted."""
    leaves = jax.tree.leaves(z)
    if not leaves:
        raise ValueError(
            f"deqjax expects z0 to hold at least one float array, got {z!r}; pass a number or an "
            f"array."
        )
    for x in leaves:
        dtype = jnp.result_type(x) if eqx.is_array_like(x) else type(x).__name__
        if isinstance(dtype, str) or not jnp.issubdtype(dtype, jnp.number):
            raise ValueError(
                f"deqjax expects z0 to be a pytree of real or complex floating-point arrays, or "
                f"of integers, which are promoted, got a leaf of type {dtype}; cast it, for "
                f"instance with jnp.asarray(z0, float). (Without a z0, nn.DEQ starts from zeros "
                f"like x.)"
            )

    def strong(x):
        dtype = jnp.result_type(x)
        return jnp.asarray(x, float if jnp.issubdtype(dtype, jnp.integer) else dtype)

    return jax.tree.map(strong, z)


def check_real(name: str, z: PyTree, instead: str) -> None:
    """Raises `ValueError` if a leaf of `z` is complex; `instead` says what to do."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(z) if eqx.is_array_like(x)]
    for dtype in dtypes:
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(f"{name} expects a state of real numbers, got {dtype}; {instead}")

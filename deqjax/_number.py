"""What a number given by hand has to be."""

import math
from numbers import Integral, Real
from typing import Any


def number(value: Any) -> float:
    """A real number as a Python float, and NaN, which lies in no range, for anything else.

    A float, since a NumPy scalar has a dtype, and makes float32 or float64 of a bfloat16."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def check_size(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(
            f"Expected {name} to be an int >= 1, got {value!r}. Pass the length of an axis that "
            f"there is."
        )

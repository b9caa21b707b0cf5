"""Rows of results: how they are picked, and how their numbers are written."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]


def number(x: float | None) -> float:
    """A measured number; JSON's null was not finite, and counts as worse than any other."""
    return math.inf if x is None or not math.isfinite(x) else x


def worst(rows: Iterable[Row], name: str) -> float:
    return max((number(row[name]) for row in rows), default=math.inf)


def total(rows: Iterable[Row], name: str) -> int:
    return sum(row[name] for row in rows)


def pick(rows: list[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


def values(rows: Iterable[Row], *names: str) -> list[Any]:
    """The different values of a column, or of several together, in order."""
    if len(names) == 1:
        return list(dict.fromkeys(row[names[0]] for row in rows))
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def grouped(rows: list[Row], name: str) -> list[tuple[Any, list[Row]]]:
    """The values of a column, each with its rows."""
    return [(value, pick(rows, **{name: value})) for value in values(rows, name)]


def show(x: float | None) -> str:
    if x is None or math.isnan(x):
        return "-"
    if math.isinf(x):
        return "not finite"
    return f"{x:.3g}" if x == 0 or 1e-2 <= abs(x) < 1e4 else f"{x:.1e}"


def tiny(x: float) -> str:
    """An error, whose order is what counts."""
    return "0" if x == 0 else f"{x:.0e}" if math.isfinite(x) else "not finite"


def mib(x: float) -> str:
    return f"{x / 2**20:.1f}"


def milliseconds(seconds: Iterable[float]) -> str:
    """The median over rounds."""
    return f"{1e3 * statistics.median(seconds):.3g}"

"""Numbers, tables and claims as every measuring script prints them."""

import math
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Results = dict[str, Any]


def number(x: float | None) -> float:
    """A measured number; JSON's null was not finite, and counts as worse than any other."""
    return math.inf if x is None or not math.isfinite(x) else x


def worst(rows: Iterable[Row], name: str) -> float:
    return max((number(row[name]) for row in rows), default=math.inf)


def pick(rows: list[Row], **where: Any) -> list[Row]:
    return [row for row in rows if all(row[k] == v for k, v in where.items())]


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head, all columns but the first are numbers."""
    head, *rest = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" + "---:|" * (len(rows[0]) - 1), *rest])


def show(x: float | None) -> str:
    if x is None or math.isnan(x):
        return "-"
    if math.isinf(x):
        return "not finite"
    return f"{x:.3g}" if x == 0 or 1e-2 <= abs(x) < 1e4 else f"{x:.1e}"


def tiny(x: float) -> str:
    """Errors: what counts is their order."""
    return "0" if x == 0 else f"{x:.0e}" if math.isfinite(x) else "not finite"


def mib(x: float) -> str:
    return f"{x / 2**20:.1f}"


def claims_table(lines: list[Row]) -> str:
    said = {True: "yes", False: "**no**", None: "stated"}
    # Of a smoke run nothing is promised, and what happens to hold is no news either.
    holds = lambda r: "too small to say" if r.get("smoke") else said[r["holds"]]
    columns = lambda r: [r["claim"], show(r["measured"]), show(r["bound"]), holds(r)]
    return markdown([["must hold", "measured", "at most", "holds"], *map(columns, lines)])


class Claims:
    """Lines of the table of claims. A bound of None: stated, nothing promised."""

    def __init__(self):
        self.lines: list[Row] = []

    def add(self, text: str, measured: float | None, bound: float | None) -> None:
        """`measured=None`: not measured, which neither holds nor fails."""
        said = None if bound is None or measured is None else bool(measured <= bound)
        self.lines.append({"claim": text, "measured": measured, "bound": bound, "holds": said})


def said(lines: list[Row]) -> str:
    """The table of claims; one that could not be measured says so."""
    text = claims_table([line | {"measured": line["measured"]} for line in lines])
    missing = {line["claim"] for line in lines if line["measured"] is None}
    rows = text.splitlines()
    for i, row in enumerate(rows):
        if row.split(" | ")[0][2:] in missing:
            bound = row.split(" | ")[2]
            rows[i] = f"| {row.split(' | ')[0][2:]} | not measured | {bound} | - |"
    return "\n".join(rows)

"""The table that a script ends with."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Columns named by the keys of the first row, as wide as they have to be."""
    cells = [list(rows[0])] + [[str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    return "\n".join(lines)


def ending(rows: list[dict[str, Any]], smoke: bool, *about: str) -> str:
    """The table below the lines that say what it is about."""
    first = "A smoke run: nothing is learned, and the figures say nothing. " * smoke
    return "\n".join([f"\n{first}{about[0]}", *about[1:], "", table(rows)])

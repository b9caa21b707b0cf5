"""The table that a script ends with."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Columns named by the keys of the first row, as wide as they have to be."""
    cells = [list(rows[0])] + [[str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    return "\n".join(lines)

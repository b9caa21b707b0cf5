"""The claims and tables of `kernels.py`."""

from bench.report import Claims, Report, table
from bench.rows import Row

REPORT = Report()


@REPORT.claim("convolution")
def _convolution(table: Claims, rows: list[Row]) -> None:
    filtered = [row for row in rows if row["channels"] >= 32 and row["pixels"] >= 8]
    for part, what in (("f", "value"), ("vjp", "value and cotangents")):
        text = f"convolution by minimal filtering: {what}, time / the direct sums', worst"
        table.add(text, max(row[f"{part}, ours / sums"] for row in filtered), 0.95)


@REPORT.claim("attention")
def _attention(table: Claims, rows: list[Row]) -> None:
    found = {row["way"]: row["over by hand"] for row in rows}
    for way in ("float", "float, jax.vmap", "exact"):
        bound = None if way == "exact" else 0.8
        table.add(f"attention: {way}, time / that of a loop by hand", found[way], bound)


@REPORT.claim("concave")
def _concave(table: Claims, found: dict[str, list[Row]]) -> None:
    peer = {row["way"]: row["over PyTorch"] for row in found["peer"]}
    best = [v for k, v in peer.items() if v is not None and k != "PyTorch"]
    text = "concave convolution: value and gradient, time / PyTorch's, best"
    table.add(text, min(best, default=None), 0.8)
    for row in found["steps"]:
        if row["method"] == "Anderson":
            text = f"a step of Anderson, {row['state']}, in evaluations of the cell"
            table.add(text, row["over f"], 1.3)


def _table(rows: list[Row]) -> str:
    text = lambda x: "-" if x is None else f"{x:.3g}" if isinstance(x, float) else x
    return table([{title: text(x) for title, x in row.items()} for row in rows])


REPORT.table("Convolution, 3 x 3: an evaluation in a loop", "convolution")(_table)
REPORT.table("Value and gradient of a reversible solve", "attention")(_table)


@REPORT.table("Value and gradient of a positive concave convolution", "concave")
def _peers(found: dict[str, list[Row]]) -> str:
    return _table(found["peer"])


@REPORT.table("A step of a solve, in evaluations", "concave")
def _steps(found: dict[str, list[Row]]) -> str:
    return _table(found["steps"])


claims, tables = REPORT.claims, REPORT.tables

"""Which promises of certificates hold."""

from bench.certificates.time import ratios
from bench.report import Claims, Results, Row, number, pick


def claims(results: Results) -> list[Row]:
    table = Claims()
    for section, add in CLAIMS.items():
        if section in results:
            add(table, results[section])
    return table.lines


def _tightness(table: Claims, rows: list[Row]) -> None:
    for row in pick(rows, ordinary=True, dtype="float32", stop="batch"):
        case = f"{row['cell']}, rho(W) {row['W']:g}, x about {row['x']:g}, float32"
        table.add(f"{case}: bound / true error", number(row["ratio"]), 1.5)
        table.add(f"{case}: the same, worst example", number(row["worst ratio"]), None)
        table.add(f"{case}: JVPs, median example", row["products"][0], 3)
        table.add(f"{case}: JVPs, worst example", row["products"][1], 3)
    table.add("bounds of error that are too small, in all rows", sum(r["false"] for r in rows), 0)


def _hard(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        case = f"{row['cell']}, rho(W) {row['W']:g}, x about {row['x']:g}, {row['dtype']}"
        if row["possible"]:
            good = row["certified"] == 1
            total = row["evaluations"] + sum(row["certificate"]) if good else float("inf")
            text = f"{case}: evaluations and JVPs to a certified {row['rtol']:g}"
            table.add(text, number(total), 60)
            table.add(
                f"{case}, {row['rtol']:g}: share that certify cannot bound", row["unbounded"], 0
            )
        else:
            text = f"{case}: share of examples said to be solved to {row['rtol']:g}"
            table.add(text, row["certified"], 0)


def _coverage(table: Claims, rows: list[Row]) -> None:
    for by in dict.fromkeys(row["by"] for row in rows):
        for dtype in ("float64", "float32"):
            mine = pick(rows, by=by, dtype=dtype)
            false = sum(sum(row["false"].values()) for row in mine)
            count = sum(row["problems"] for row in mine)
            table.add(f"{by}, {dtype}: violations in {count:,} random problems", false, 0)


def _refused(table: Claims, rows: list[Row]) -> None:
    bad = [r for r in rows if not (r["kept out"] or r["check"] or r["certify"] == "ValueError")]
    table.add(f"maps without the theorem, of {len(rows)}, that nothing refuses", len(bad), 0)
    missed = [r for r in rows if not r["check"]]
    table.add("the same, of those that check_hypotheses passes", len(missed), 0)
    alone = [r for r in rows if noticed(r) != "yes"]
    table.add("those that certify alone does not notice, or not everywhere", len(alone), None)


def noticed(row: Row) -> str:
    """Of a map with one fixed point, that the enclosures of it are true in spite of all."""
    if row["certify"] == "ValueError" or not any(row["certify"]):
        return "yes"
    return "no, and it is right" if row["fixed points"] == 1 else "no"


def _time(table: Claims, rows: Row) -> None:
    for row in rows["rows"]:
        found = ratios(row)
        for name in ("certify / solve", "no radius / solve"):
            table.add(f"{row['problem']}: time of {name}", found[name], None)
        for name in (key for key in found if "floor" in key):
            table.add(f"{row['problem']}: time of {name}", found[name], 1.15)
        if "f / matmul" in found:
            text = f"{row['problem']}: time of f / of a matmul of as many products"
            table.add(text, found["f / matmul"], None)


def _mates(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        text = f"{row['by']}, {row['dtype']}: arrays that batch-mates change, of {row['arrays']}"
        table.add(text, row["differ"], 0)


CLAIMS = {
    "tightness": _tightness,
    "hard": _hard,
    "coverage": _coverage,
    "refused": _refused,
    "time": _time,
    "mates": _mates,
}

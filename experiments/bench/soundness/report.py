"""What the search for false numbers found: its claims and its tables."""

import json
import math

from bench.report import Claims, Results, Row, markdown, said

# What is promised: as many tried at least, none false. A smoke run promises the second alone.
CERTIFICATES, MIXED, FAMILIES, NORMALISED, PROGRAMS, KINDS, PLACES, GRADIENTS, CALLS = (
    10_000, 2_000, 12, 500, 300, 42, 19, 200, 2_000
)  # fmt: skip
MOST_MAPS, MOST_MIB, MOST_MS = 1_000, 200, 10


def claims(results: Results) -> list[Row]:
    lines = []
    for section, add in CLAIMS.items():
        if section in results:
            table = Claims()
            add(table, results[section])
            smoke = results["runs"][section]["config"]["smoke"]
            lines += [line for line in table.lines if not (smoke and _COUNT in line["claim"])]
    return lines


def total(rows: list[Row], key: str) -> int:
    return sum(row[key] for row in rows)


_COUNT = "short of"


def _short(table: Claims, of: str, found: int, promised: int) -> None:
    table.add(f"{of}: {found:,}, {_COUNT} {promised:,} by", max(promised - found, 0), 0)


def _certificates(table: Claims, rows: list[Row]) -> None:
    asked = [row for row in rows if row["by"] == "certify"]
    for by in dict.fromkeys(row["by"] for row in rows):
        for mixed in (False, True):
            mine = [row for row in rows if row["by"] == by and row["mixed"] == mixed]
            of = "arrays of both signs" if mixed else "arrays of at least 0"
            text = f"{by}, {of}: false of {total(mine, 'tried'):,}"
            table.add(f"{text}, of which {total(mine, 'held'):,} held", total(mine, "false"), 0)
    # A family that is refused in words had as many certificates asked for.
    _short(table, "random certificates", total(asked, "asked") - total(asked, "unknown"),
           CERTIFICATES)  # fmt: skip
    mixed = [row for row in asked if row["mixed"]]
    _short(table, "of them with arrays of both signs", total(mixed, "asked"), MIXED)
    _short(table, "families", len({row["family"] for row in asked}), FAMILIES)
    ordinary = [row for row in asked if not row["mixed"] and row["dtype"] == "float32"]
    share = 1 - total(ordinary, "held") / max(total(ordinary, "asked"), 1)
    table.add("certify, arrays of at least 0, float32: share that does not hold", share, None)


def _layers(table: Claims, rows: list[Row]) -> None:
    mine = [row for row in rows if row["normalised"]]
    rest = [row for row in rows if not row["normalised"]]
    for of, some in (("normalised cells", mine), ("other cells", rest)):
        text = f"{of} outside the enclosure, of {total(some, 'tried'):,}"
        table.add(f"{text}, of which {total(some, 'held'):,} held", total(some, "false"), 0)
    _short(table, "normalised cells", total(mine, "tried"), NORMALISED)


def _reversal(table: Claims, rows: list[Row]) -> None:
    table.add(f"gradients lost in {len(rows)} programs of exact reversal", total(rows, "lost"), 0)
    pulled = [row for row in rows if "jit(pull)" in row["context"]]
    table.add(f"of them under jit(pull), of {len(pulled)}", total(pulled, "lost"), 0)
    _short(table, "programs", len(rows), PROGRAMS)
    _short(table, "kinds of cell", len({row["cell"] for row in rows}), KINDS)
    _short(table, "contexts", len({row["context"] for row in rows}), PLACES)


def _implicit(table: Claims, rows: list[Row]) -> None:
    known = [row for row in rows if row["known"]]
    text = f"finite implicit gradients off by over 10 times the estimate, of {len(known)}"
    table.add(text, total(known, "false"), 0)
    _short(table, "J", len(known), GRADIENTS)
    # Where there is a gradient: beyond 1 / eps there is none, and the estimate is infinite.
    kinds = ("triangular", "Jordan")
    ratios = [r["condition / true"] for r in known if r["finite"] and r["kind"] in kinds]
    good = [r for r in ratios if r is not None and 0.1 <= r <= 10]
    table.add(
        "triangular and Jordan, finite: share whose condition is off by over 10 times",
        1 - len(good) / max(len(ratios), 1), None,
    )  # fmt: skip


def _programs(table: Claims, rows: list[Row]) -> None:
    calls = min(row["calls"] for row in rows)
    _short(table, "eager calls of each entry point", calls, CALLS)
    table.add(f"maps of memory that {len(rows)} entry points leave", total(rows, "maps"), MOST_MAPS)
    table.add("MiB of resident memory that they leave", total(rows, "MiB"), MOST_MIB)
    table.add("compilations for new lambdas of the same body", total(rows, "compilations"), 0)
    # A tanh cell, at the least work that there is: what f's tracing and the call cost.
    solve = next((row["ms"] for row in rows if row["entry"] == "fixed_point"), None)
    table.add("CPU ms of an eager solve of 64 units with a new lambda", solve, MOST_MS)


CLAIMS = {
    "certificates": _certificates,
    "layers": _layers,
    "reversal": _reversal,
    "implicit": _implicit,
    "programs": _programs,
}


def tables(results: Results) -> str:
    """What was found, as Markdown."""
    parts = [said(results["claims"])]
    for name, (title, table) in TABLES.items():
        if name in results:
            parts += [f"## {title}", table(results[name])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def _counterexamples(rows: list[Row], keys: tuple[str, ...]) -> str:
    """The worst ones, with the seed that draws them again."""
    found = [{k: row[k] for k in keys} | example for row in rows for example in row["worst"]]
    lines = [f"* `{json.dumps(example)}`" for example in found]
    return "\n".join([f"{total(rows, 'false')} counterexamples; the worst of each row:", *lines])


def certificates_table(rows: list[Row]) -> str:
    table = [["family", "by", "dtype", "tried", "held", "no reference", "**false**", "refused"]]
    for row in rows:
        counts = [f"{row[k]:,}" for k in ("tried", "held", "unknown", "false")]
        refused = "in words" if row["refused"] else ""
        name = f"{row['family']}{' (both signs)' if row['mixed'] else ''}"
        table.append([name.replace("|", "/"), row["by"], row["dtype"], *counts, refused])
    about = "family", "by", "dtype", "seed"
    return f"{markdown(table)}\n\n{_counterexamples(rows, about)}"


def layers_table(rows: list[Row]) -> str:
    head = ["cell", "dtype", "tried", "held", "no reference", "**false**"]
    table = [[*head, "bound, median of those that held", "refused"]]
    for row in rows:
        counts = [f"{row[k]:,}" for k in ("tried", "held", "unknown", "false")]
        bound = "-" if row["bound"] is None else f"{row['bound']:.1e}"
        refused = "in words" if row["refused"] else ""
        table.append([row["kind"], row["dtype"], *counts, bound, refused])
    return f"{markdown(table)}\n\n{_counterexamples(rows, ('kind', 'dtype', 'seed'))}"


def reversal_table(rows: list[Row]) -> str:
    table = [["context", "programs", "**lost**", "largest error of the others"]]
    for name in dict.fromkeys(row["context"] for row in rows):
        mine = [row for row in rows if row["context"] == name]
        good = [row["error"] for row in mine if not row["lost"]]
        worst = f"{max(good):.1e}" if good else "-"
        table.append([name, str(len(mine)), str(total(mine, "lost")), worst])
    keys = "cell", "context", "beta", "seed", "error", "said"
    lost = [{k: row[k] for k in keys} for row in rows if row["lost"]]
    lines = [f"* `{json.dumps(row)}`" for row in lost]
    return "\n".join([markdown(table), "", f"{len(lost)} lost:", *lines])


def implicit_table(rows: list[Row]) -> str:
    head = ["J", "tried", "no reference", "finite", "**false**", "largest error"]
    table = [[*head, "error / estimate", "condition / true: from", "to"]]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        known = [row for row in mine if row["known"]]
        finite = [row for row in known if row["finite"]]
        ratios = [r["condition / true"] for r in finite if r["condition / true"] is not None]
        over = [row["error"] / row["estimate"] for row in finite if row["estimate"]]
        counts = [len(mine), len(mine) - len(known), len(finite), total(known, "false")]
        figures = [max((row["error"] for row in finite), default=0), max(over, default=0),
                   min(ratios, default=math.nan), max(ratios, default=math.nan)]  # fmt: skip
        table.append([kind, *map(str, counts), *(f"{x:.1e}" for x in figures)])
    false = [row for row in rows if row["false"] and row["known"]]
    lines = [f"* `{json.dumps(row)}`" for row in false]
    return "\n".join([markdown(table), "", f"{len(false)} false:", *lines])


def programs_table(rows: list[Row]) -> str:
    table = [["entry point", "calls", "compilations", "maps", "MiB", "CPU ms a call"]]
    for row in rows:
        name, size, ms = row["entry"], f"{row['MiB']:.0f}", f"{row['ms']:.1f}"
        counts = [f"{row[k]:,}" for k in ("calls", "compilations", "maps")]
        table.append([name, *counts, size, ms])
    return markdown(table)


TABLES = {
    "certificates": ("Certificates", certificates_table),
    "layers": ("Cells with a theorem of their own", layers_table),
    "reversal": ("Exact reversal", reversal_table),
    "implicit": ("Implicit gradients", implicit_table),
    "programs": ("Eager calls, a new lambda each time", programs_table),
}
NOTE = """\
Certificates: false is a bound of which z* is on the wrong side, by more than the reference is in
doubt (1e-13 of an entry at most), or a tolerance that a successful solve misses. Refused: the
ValueError that says that the rounding of f is not counted. No reference: excluded from all counts.

Exact reversal: error of (w, x, z0) by array, relative to it or to 3 % of all. Lost: not finite, or
above the tolerance of the dtype. MiB, maps: of the process, after the calls less before."""

"""The claims and tables of the search for false numbers."""

import json
import math
from collections.abc import Iterable
from typing import Any

from bench.report import Claims, Report, Results, table
from bench.rows import Row, grouped, pick, total, values

NOTE = """\
Certificates: false is a bound of which z* is on the wrong side, by more than the reference is in
doubt (1e-13 of an entry at most), or a tolerance that a successful solve misses. Refused: the
ValueError that says that the rounding of f is not counted. No reference: excluded from all counts.

Exact reversal: error of (w, x, z0) by array, relative to it or to 3 % of all. Lost: not finite, or
above the tolerance of the dtype. MiB, maps: of the process, after the calls less before."""
REPORT = Report(NOTE)

# Promised: at least so many tried, and none false. A smoke run promises only the second.
CERTIFICATES, MIXED, FAMILIES, NORMALISED, PROGRAMS, KINDS, PLACES, GRADIENTS, CALLS = (
    10_000, 2_000, 12, 500, 300, 42, 19, 200, 2_000
)  # fmt: skip
MOST_MAPS, MOST_MIB, MOST_MS = 1_000, 200, 10
_COUNT = "short of"


def claims(results: Results) -> list[Row]:
    lines = REPORT.claims(results)
    smoke = any(run["config"]["smoke"] for run in results["runs"].values())
    return [line for line in lines if not (smoke and _COUNT in line["claim"])]


def _short(table: Claims, of: str, found: int, promised: int) -> None:
    table.add(f"{of}: {found:,}, {_COUNT} {promised:,} by", max(promised - found, 0), 0)


def _false(table: Claims, text: str, rows: list[Row]) -> None:
    said = f"{text} {total(rows, 'tried'):,}, of which {total(rows, 'held'):,} held"
    table.add(said, total(rows, "false"), 0)


@REPORT.claim("certificates")
def _certificates(table: Claims, rows: list[Row]) -> None:
    asked = pick(rows, by="certify")
    for by in values(rows, "by"):
        for mixed, of in ((False, "arrays of at least 0"), (True, "arrays of both signs")):
            _false(table, f"{by}, {of}: false of", pick(rows, by=by, mixed=mixed))
    # A family that is refused in words had as many certificates asked for.
    known = total(asked, "asked") - total(asked, "unknown")
    _short(table, "random certificates", known, CERTIFICATES)
    _short(
        table, "of them with arrays of both signs", total(pick(asked, mixed=True), "asked"), MIXED
    )
    _short(table, "families", len(values(asked, "family")), FAMILIES)
    ordinary = pick(asked, mixed=False, dtype="float32")
    share = 1 - total(ordinary, "held") / max(total(ordinary, "asked"), 1)
    table.add("certify, arrays of at least 0, float32: share that does not hold", share, None)


@REPORT.claim("layers")
def _layers(table: Claims, rows: list[Row]) -> None:
    mine = pick(rows, normalised=True)
    _false(table, "normalised cells outside the enclosure, of", mine)
    _false(table, "other cells outside the enclosure, of", pick(rows, normalised=False))
    _short(table, "normalised cells", total(mine, "tried"), NORMALISED)


@REPORT.claim("reversal")
def _reversal(table: Claims, rows: list[Row]) -> None:
    table.add(f"gradients lost in {len(rows)} programs of exact reversal", total(rows, "lost"), 0)
    pulled = [row for row in rows if "jit(pull)" in row["context"]]
    table.add(f"of them under jit(pull), of {len(pulled)}", total(pulled, "lost"), 0)
    _short(table, "programs", len(rows), PROGRAMS)
    _short(table, "kinds of cell", len(values(rows, "cell")), KINDS)
    _short(table, "contexts", len(values(rows, "context")), PLACES)


@REPORT.claim("implicit")
def _implicit(table: Claims, rows: list[Row]) -> None:
    known = pick(rows, known=True)
    text = f"finite implicit gradients off by over 10 times the estimate, of {len(known)}"
    table.add(text, total(known, "false"), 0)
    _short(table, "J", len(known), GRADIENTS)
    # Where there is a gradient: beyond 1 / eps there is none, and the estimate is infinite.
    finite = [row for row in pick(known, finite=True) if row["kind"] in ("triangular", "Jordan")]
    good = [x for x in _conditions(finite) if 0.1 <= x <= 10]
    text = "triangular and Jordan, finite: share whose condition is off by over 10 times"
    table.add(text, 1 - len(good) / max(len(finite), 1), None)


def _conditions(rows: list[Row]) -> list[float]:
    return [x for row in rows if (x := row["condition / true"]) is not None]


@REPORT.claim("programs")
def _programs(table: Claims, rows: list[Row]) -> None:
    calls = min(row["calls"] for row in rows)
    _short(table, "eager calls of each entry point", calls, CALLS)
    table.add(f"maps of memory that {len(rows)} entry points leave", total(rows, "maps"), MOST_MAPS)
    table.add("MiB of resident memory that they leave", total(rows, "MiB"), MOST_MIB)
    table.add("compilations for new lambdas of the same body", total(rows, "compilations"), 0)
    # A tanh cell, at the least work that there is: what f's tracing and the call cost.
    solve = next((row["ms"] for row in pick(rows, entry="fixed_point")), None)
    table.add("CPU ms of an eager solve of 64 units with a new lambda", solve, MOST_MS)


def _counts(row: Row) -> dict[str, str]:
    titles = {"tried": "tried", "held": "held", "no reference": "unknown", "**false**": "false"}
    return {title: f"{row[key]:,}" for title, key in titles.items()}


def _refused(row: Row) -> dict[str, str]:
    return {"refused": "in words" if row["refused"] else ""}


def _listed(said: str, examples: Iterable[Any]) -> str:
    return "\n".join([said, *(f"* `{json.dumps(example)}`" for example in examples)])


def _counterexamples(rows: list[Row], *keys: str) -> str:
    """The worst ones, with the seed that draws them again."""
    found = ({k: row[k] for k in keys} | example for row in rows for example in row["worst"])
    return _listed(f"{total(rows, 'false')} counterexamples; the worst of each row:", found)


@REPORT.table("Certificates", "certificates")
def certificates_table(rows: list[Row]) -> str:
    signs = lambda row: f"{row['family']}{' (both signs)' if row['mixed'] else ''}"
    about = lambda row: {"family": signs(row).replace("|", "/"), "by": row["by"]}
    lines = [about(r) | {"dtype": r["dtype"]} | _counts(r) | _refused(r) for r in rows]
    return f"{table(lines)}\n\n{_counterexamples(rows, 'family', 'by', 'dtype', 'seed')}"


@REPORT.table("Cells with a theorem of their own", "layers")
def layers_table(rows: list[Row]) -> str:
    title, lines = "bound, median of those that held", []
    for row in rows:
        bound = {title: "-" if row["bound"] is None else f"{row['bound']:.1e}"}
        about = {"cell": row["kind"], "dtype": row["dtype"]}
        lines.append(about | _counts(row) | bound | _refused(row))
    return f"{table(lines)}\n\n{_counterexamples(rows, 'kind', 'dtype', 'seed')}"


@REPORT.table("Exact reversal", "reversal")
def reversal_table(rows: list[Row]) -> str:
    lines = []
    for name, mine in grouped(rows, "context"):
        good = [row["error"] for row in pick(mine, lost=False)]
        found = {"context": name, "programs": len(mine), "**lost**": total(mine, "lost")}
        most = f"{max(good):.1e}" if good else "-"
        lines.append(found | {"largest error of the others": most})
    keys = "cell", "context", "beta", "seed", "error", "said"
    lost = [{k: row[k] for k in keys} for row in pick(rows, lost=True)]
    return f"{table(lines)}\n\n{_listed(f'{len(lost)} lost:', lost)}"


@REPORT.table("Implicit gradients", "implicit")
def implicit_table(rows: list[Row]) -> str:
    lines = []
    for kind, mine in grouped(rows, "kind"):
        known = pick(mine, known=True)
        finite = pick(known, finite=True)
        over = [row["error"] / row["estimate"] for row in finite if row["estimate"]]
        counts = {
            "J": kind,
            "tried": len(mine),
            "no reference": len(mine) - len(known),
            "finite": len(finite),
            "**false**": total(known, "false"),
        }
        figures = {
            "largest error": max((row["error"] for row in finite), default=0),
            "error / estimate": max(over, default=0),
            "condition / true: from": min(_conditions(finite), default=math.nan),
            "to": max(_conditions(finite), default=math.nan),
        }
        lines.append(counts | {title: f"{x:.1e}" for title, x in figures.items()})
    false = pick(rows, false=True, known=True)
    return f"{table(lines)}\n\n{_listed(f'{len(false)} false:', false)}"


@REPORT.table("Eager calls, a new lambda each time", "programs")
def programs_table(rows: list[Row]) -> str:
    counts = lambda row: {k: f"{row[k]:,}" for k in ("calls", "compilations", "maps")}
    last = lambda row: {"MiB": f"{row['MiB']:.0f}", "CPU ms a call": f"{row['ms']:.1f}"}
    return table([{"entry point": row["entry"]} | counts(row) | last(row) for row in rows])


tables = REPORT.tables

"""The claims and the tables of the experiment on certificates."""

import json
import math
import statistics

from bench.certificates.random import SOURCES
from bench.certificates.time import ratios
from bench.report import Claims, Report, markdown, table
from bench.rows import Row, milliseconds, number, pick, show, total, values
from bench.timing import median_ratio

NOTE = """\
Tightness: float32, Picard from 0 until the step of the whole batch is below 1e-4 of its size (own
stop: until each example's own is, entry by entry; then only the ratio); true error and bound: the
largest of any entry and example; rho(J) and its bracket: medians over eight examples; JVPs: without
the two for the bracket. Bold: the design's ordinary cases.

Hard problems: f: evaluations of PositiveConcaveSolver; Picard: steps to a true error of that, which
Picard itself cannot tell; Bracketing: to a certified one. JVPs: with the two for the bracket.

Time: float32, medians over rounds, each ratio of the same round. Floor of value and gradient:
evaluations, and one for the linearisation, x f, VJPs in z x one, and the VJP in W and x; each
compiled alone."""
REPORT = Report(NOTE)


def _case(row: Row) -> str:
    return f"{row['cell']}, rho(W) {row['W']:g}, x about {row['x']:g}, {row['dtype']}"


@REPORT.claim("tightness")
def _tightness(table: Claims, rows: list[Row]) -> None:
    for row in pick(rows, ordinary=True, dtype="float32", stop="batch"):
        table.add(f"{_case(row)}: bound / true error", number(row["ratio"]), 1.5)
        table.add(f"{_case(row)}: the same, worst example", number(row["worst ratio"]), None)
        table.add(f"{_case(row)}: JVPs, median example", row["products"][0], 3)
        table.add(f"{_case(row)}: JVPs, worst example", row["products"][1], 3)
    table.add("bounds of error that are too small, in all rows", total(rows, "false"), 0)


@REPORT.claim("hard")
def _hard(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        case, to = _case(row), f"{row['rtol']:g}"
        if not row["possible"]:
            text = f"{case}: share of examples said to be solved to {to}"
            table.add(text, row["certified"], 0)
            continue
        good = row["certified"] == 1
        work = row["evaluations"] + sum(row["certificate"]) if good else math.inf
        table.add(f"{case}: evaluations and JVPs to a certified {to}", number(work), 60)
        table.add(f"{case}, {to}: share that certify cannot bound", row["unbounded"], 0)


@REPORT.claim("coverage")
def _coverage(table: Claims, rows: list[Row]) -> None:
    for by in values(rows, "by"):
        for dtype in ("float64", "float32"):
            mine = pick(rows, by=by, dtype=dtype)
            false = sum(sum(row["false"].values()) for row in mine)
            text = f"{by}, {dtype}: violations in {total(mine, 'problems'):,} random problems"
            table.add(text, false, 0)


@REPORT.claim("refused")
def _refused(table: Claims, rows: list[Row]) -> None:
    bad = [r for r in rows if not (r["kept out"] or r["check"] or r["certify"] == "ValueError")]
    table.add(f"maps without the theorem, of {len(rows)}, that nothing refuses", len(bad), 0)
    missed = [r for r in rows if not r["check"]]
    table.add("the same, of those that check_hypotheses passes", len(missed), 0)
    alone = [r for r in rows if _noticed(r) != "yes"]
    table.add("those that certify alone does not notice, or not everywhere", len(alone), None)


def _noticed(row: Row) -> str:
    """The enclosures of a map with one fixed point are true in spite of all."""
    if row["certify"] == "ValueError" or not any(row["certify"]):
        return "yes"
    return "no, and it is right" if row["fixed points"] == 1 else "no"


@REPORT.claim("time")
def _time(table: Claims, timing: Row) -> None:
    for row in timing["rows"]:
        for name, found in ratios(row).items():
            if "3 + 3" not in name:
                name = name.replace("f / matmul", "f / of a matmul of as many products")
                text = f"{row['problem']}: time of {name}"
                table.add(text, found, 1.15 if "floor" in name else None)


@REPORT.claim("mates")
def _mates(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        text = f"{row['by']}, {row['dtype']}: arrays that batch-mates change, of {row['arrays']}"
        table.add(text, row["differ"], 0)


def _error(x: float | None) -> str:
    return "infinite" if x is None else f"{x:.1e}"


@REPORT.table("Tightness", "tightness")
def tightness_table(rows: list[Row]) -> str:
    lines = []
    for row in pick(rows, dtype="float32", stop="batch"):
        about = {k: row[k] for k in ("cell", "W", "x", "ordinary")}
        (wide,) = pick(rows, **about, dtype="float64", stop="batch")
        own = [pick(rows, **about, dtype=d, stop="example")[0] for d in ("float32", "float64")]
        name = f"{row['cell']}, {row['W']:g}, {row['x']:g}"
        lines.append(
            {
                "cell, rho(W), x": f"**{name}**" if row["ordinary"] else name,
                "rho(J)": f"{row['radius']:.4f}",
                "its bracket": f"{row['low']:.4f} to {row['high']:.4f}",
                "true error": _error(row["true"]),
                "bound": _error(row["bound"]),
                "ratio": show(row["ratio"]),
                "worst, median example": f"{show(row['worst ratio'])}, {show(row['median ratio'])}",
                "JVPs: median, worst": ", ".join(map(str, row["products"])),
                "float64: true, bound": f"{_error(wide['true'])}, {_error(wide['bound'])}",
                "own stop: f32, f64": ", ".join(show(r["ratio"]) for r in own),
            }
        )
    return table(lines)


@REPORT.table("Hard problems", "hard")
def hard_table(rows: list[Row]) -> str:
    count = lambda x: "-" if x is None else f"{x:,}"
    line = lambda row: {
        "cell, rho(W), x, dtype": f"{row['cell']}, {row['W']:g}, {row['x']:g}, {row['dtype']}",
        "to": f"{row['rtol']:g}",
        "solved": f"{row['certified']:.0%}",
        "f": count(row["evaluations"]),
        "f without upper": count(row["without upper"]),
        "certify: f + JVPs": " + ".join(map(str, row["certificate"])),
        "true error": _error(row["true"]),
        "its own bound": _error(row["own bound"]),
        "certify's": _error(row["bound"]),
        "Picard": count(row["picard"]),
        "Bracketing": count(row["bracketing"]),
    }
    return table([line(row) for row in rows])


@REPORT.table("Coverage", "coverage")
def coverage_table(rows: list[Row]) -> str:
    kinds = ("lower end", "upper end", "relative error", "spectral radius", "tolerance")
    lines, sources = [], [["holds, by source of z", *SOURCES]]
    for by in values(rows, "by"):
        for dtype in ("float64", "float32"):
            mine = pick(rows, by=by, dtype=dtype)
            count = total(mine, "problems")
            held = sum(good for row in mine for _, good in row["sources"])
            known = {k: [r["false"][k] for r in mine if k in r["false"]] for k in kinds}
            lines.append(
                {"violations": f"{by}, {dtype}", "problems": f"{count:,}"}
                | {kind: sum(found) if found else "" for kind, found in known.items()}
                | {"holds, or solved": f"{held:,} ({held / count:.1%})"}
                | {"reference in doubt by": f"{max(row['doubt'] for row in mine):.0e}"}
            )
            if by == "certify":
                each = zip(*(row["sources"] for row in mine), strict=True)
                sums = [[sum(x) for x in zip(*pairs, strict=True)] for pairs in each]
                sources.append([dtype, *(f"{good:,} of {n:,}" for n, good in sums)])
    found = [example for row in rows for example in row["counterexamples"]]
    radius = max((row["radius in doubt by"] for row in pick(rows, by="certify")), default=0.0)
    said = (
        f"{len(found)} counterexamples. A comparison allows for the doubt of the reference alone: "
        f"of an entry of z*, relative, that in the table; of rho(J) {radius:.0e}."
    )
    examples = [f"```json\n{json.dumps(example)}\n```" for example in found]
    return "\n\n".join([table(lines), markdown(sources), said, *examples])


@REPORT.table("Maps without the theorem", "refused")
def refused_table(rows: list[Row]) -> str:
    def certified(holds: str | list[bool]) -> str:
        if isinstance(holds, str):
            return holds
        where = f"{sum(holds)} of {len(holds)} points"
        return f"holds at {where}" if any(holds) else "holds nowhere"

    line = lambda row: {
        "map": row["case"],
        "fixed points": row["fixed points"],
        "the cell": row["cell"],
        "check_hypotheses refutes": ", ".join(row["check"]) or "nothing",
        "certify": certified(row["certify"]),
        "certify alone notices": _noticed(row),
    }
    return table([line(row) for row in rows])


@REPORT.table("Time", "time")
def time_table(timing: Row) -> str:
    lines = [["", "ms", "/ solve", "/ (3 f + 3 JVPs)", "counts"]]
    three = "3 evaluations, 3 JVPs"
    for row in timing["rows"]:
        n, s = row["counts"], row["all_seconds"]
        load = " to ".join(f"{x:.1f}" for x in row["load"])
        lines.append([f"**{row['problem']}** (load {load})", "", "", "", ""])
        notes = {"solve": f"{n['evaluations']} evaluations"}
        notes |= {"certify": f"{n['products']} JVPs, bound {_error(n['bound'])}"}
        notes |= {name: f"{k} VJPs in z" for name, k in n.get("VJPs", {}).items()}
        for name, seconds in s.items():
            ms, over = milliseconds(seconds), ["", ""]
            if name in ("certify", "certify, no radius", three, "solve"):
                over = [f"{median_ratio(seconds, s[of]):.2f}" for of in ("solve", three)]
            if name in ("f", "f, looped", "matmul"):
                notes[name] = f"{n['flop'] / statistics.median(seconds) / 1e9:.0f} GFLOP/s"
            lines.append([name, ms, *over, notes.get(name, "")])
    return markdown(lines)


@REPORT.table("Batch-mates", "mates")
def mates_table(rows: list[Row]) -> str:
    pair = lambda x: " / ".join(f"{v:,}" for v in x)
    line = lambda row: {
        "batch-mates easy / hard": f"{row['by']}, {row['dtype']}",
        "Picard evaluations of the mates": pair(row["picard"]),
        "steps of the mates": pair(row["steps"]),
        "of the kept": row["steps kept"],
        "arrays": row["arrays"],
        "that differ": row["differ"],
    }
    return table([line(row) for row in rows])


claims, tables = REPORT.claims, REPORT.tables

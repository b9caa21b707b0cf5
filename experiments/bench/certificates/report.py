"""The tables of the experiment on certificates."""

import json
import statistics

from bench.certificates.claims import noticed
from bench.certificates.random import SOURCES
from bench.report import Results, Row, markdown, pick, said, show


def tables(results: Results) -> str:
    """What was measured, as Markdown."""
    parts = [said(results["claims"])]
    for name, (title, table) in TABLES.items():
        if name in results:
            parts += [f"## {title}", table(results[name])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def tightness_table(rows: list[Row]) -> str:
    head = ["cell, rho(W), x", "rho(J)", "its bracket", "true error", "bound", "ratio"]
    table = [
        [
            *head,
            "worst, median example",
            "JVPs: median, worst",
            "float64: true, bound",
            "own stop: f32, f64",
        ]
    ]
    for row in pick(rows, dtype="float32", stop="batch"):
        about = {k: row[k] for k in ("cell", "W", "x", "ordinary")}
        (wide,) = pick(rows, **about, dtype="float64", stop="batch")
        own = [pick(rows, **about, dtype=d, stop="example")[0] for d in ("float32", "float64")]
        name = f"{row['cell']}, {row['W']:g}, {row['x']:g}"
        table.append(
            [
                f"**{name}**" if row["ordinary"] else name,
                f"{row['radius']:.4f}",
                f"{row['low']:.4f} to {row['high']:.4f}",
                _error(row["true"]),
                _error(row["bound"]),
                show(row["ratio"]),
                f"{show(row['worst ratio'])}, {show(row['median ratio'])}",
                ", ".join(map(str, row["products"])),
                f"{_error(wide['true'])}, {_error(wide['bound'])}",
                ", ".join(show(r["ratio"]) for r in own),
            ]
        )
    return markdown(table)


def _error(x: float | None) -> str:
    return "infinite" if x is None else f"{x:.1e}"


def hard_table(rows: list[Row]) -> str:
    head = ["cell, rho(W), x, dtype", "to", "solved", "f", "f without upper", "certify: f + JVPs"]
    table = [[*head, "true error", "its own bound", "certify's", "Picard", "Bracketing"]]
    count = lambda x: "-" if x is None else f"{x:,}"
    for row in rows:
        table.append(
            [
                f"{row['cell']}, {row['W']:g}, {row['x']:g}, {row['dtype']}",
                f"{row['rtol']:g}",
                f"{row['certified']:.0%}",
                count(row["evaluations"]),
                count(row["without upper"]),
                " + ".join(map(str, row["certificate"])),
                _error(row["true"]),
                _error(row["own bound"]),
                _error(row["bound"]),
                count(row["picard"]),
                count(row["bracketing"]),
            ]
        )
    return markdown(table)


def coverage_table(rows: list[Row]) -> str:
    kinds = ("lower end", "upper end", "relative error", "spectral radius", "tolerance")
    parts = []
    table = [["violations", "problems", *kinds, "holds, or solved", "reference in doubt by"]]
    sources = [["holds, by source of z", *SOURCES]]
    for by in dict.fromkeys(row["by"] for row in rows):
        for dtype in ("float64", "float32"):
            mine = pick(rows, by=by, dtype=dtype)
            total = sum(row["problems"] for row in mine)
            held = sum(good for row in mine for _, good in row["sources"])
            known = lambda k, mine=mine: [r["false"][k] for r in mine if k in r["false"]]
            counts = [str(sum(known(k))) if known(k) else "" for k in kinds]
            doubt = max(row["doubt"] for row in mine)
            share = f"{held:,} ({held / total:.1%})"
            table.append([f"{by}, {dtype}", f"{total:,}", *counts, share, f"{doubt:.0e}"])
            if by == "certify":
                each = zip(*(row["sources"] for row in mine), strict=True)
                sums = [[sum(x) for x in zip(*pairs, strict=True)] for pairs in each]
                sources.append([dtype, *(f"{good:,} of {n:,}" for n, good in sums)])
    parts += [markdown(table), markdown(sources)]
    found = [example for row in rows for example in row["counterexamples"]]
    radius = max((row["radius in doubt by"] for row in pick(rows, by="certify")), default=0.0)
    parts.append(
        f"{len(found)} counterexamples. A comparison allows for the doubt of the reference alone: "
        f"of an entry of z*, relative, that in the table; of rho(J) {radius:.0e}."
    )
    parts += [f"```json\n{json.dumps(example)}\n```" for example in found]
    return "\n\n".join(parts)


def refused_table(rows: list[Row]) -> str:
    head = ["map", "fixed points", "the cell", "check_hypotheses refutes", "certify"]
    table = [[*head, "certify alone notices"]]
    for row in rows:
        said = row["certify"]
        if said != "ValueError":
            where = f"{sum(said)} of {len(said)} points"
            said = f"holds at {where}" if any(said) else "holds nowhere"
        checks = ", ".join(row["check"]) or "nothing"
        table.append(
            [row["case"], str(row["fixed points"]), row["cell"], checks, said, noticed(row)]
        )
    return markdown(table)


def time_table(timing: Row) -> str:
    table = [["", "ms", "/ solve", "/ (3 f + 3 JVPs)", "counts"]]
    for row in timing["rows"]:
        n, s = row["counts"], row["all_seconds"]
        load = " to ".join(f"{x:.1f}" for x in row["load"])
        table.append([f"**{row['problem']}** (load {load})", "", "", "", ""])
        counted = {
            "solve": f"{n['evaluations']} evaluations",
            "certify": f"{n['products']} JVPs, bound {_error(n['bound'])}",
        }
        counted |= {name: f"{k} VJPs in z" for name, k in n.get("VJPs", {}).items()}
        for name, seconds in s.items():
            ms = 1e3 * statistics.median(seconds)
            whole = name in ("certify", "certify, no radius", "3 evaluations, 3 JVPs", "solve")
            over = [_median(seconds, s[of]) for of in ("solve", "3 evaluations, 3 JVPs")]
            rate = n["flop"] / ms / 1e6 if name in ("f", "f, looped", "matmul") else None
            note = counted.get(name, "" if rate is None else f"{rate:.0f} GFLOP/s")
            table.append([name, f"{ms:.3g}", *(over if whole else ["", ""]), note])
    return markdown(table)


def _median(a: list[float], b: list[float]) -> str:
    return f"{statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f}"


def mates_table(rows: list[Row]) -> str:
    head = ["batch-mates easy / hard", "Picard evaluations of the mates", "steps of the mates"]
    table = [[*head, "of the kept", "arrays", "that differ"]]
    for row in rows:
        pair = lambda x: " / ".join(f"{v:,}" for v in x)
        mine = [pair(row["picard"]), pair(row["steps"]), str(row["steps kept"])]
        table.append(
            [f"{row['by']}, {row['dtype']}", *mine, str(row["arrays"]), str(row["differ"])]
        )
    return markdown(table)


TABLES = {
    "tightness": ("Tightness", tightness_table),
    "hard": ("Hard problems", hard_table),
    "coverage": ("Coverage", coverage_table),
    "refused": ("Maps without the theorem", refused_table),
    "time": ("Time", time_table),
    "mates": ("Batch-mates", mates_table),
}
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

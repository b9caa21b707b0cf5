"""The promises that hold for gradients, and tables of all that was measured."""

import math
from typing import Any

from bench.gradients import REVERSIBLE
from bench.report import Claims, Report, table
from bench.rows import Row, grouped, mib, number, pick, show, tiny, values, worst
from bench.timing import median_ratio
from bench.ways import OF_THE_FIXED_POINT, TITLES

NOTE = (
    "Error: relative, over parameters and input together, against float64 autodiff of the same "
    "steps.\n\\* Gradients of the fixed point and not of the steps, against the same reference: "
    "they differ by design.\nReversal residual: the largest difference of a state that is known, "
    "exact: as such, float: relative.\nGuard used: the largest difference of a repeated evaluation "
    "of f, over the largest that the guard digits correct.\nFloor: one f, and one f with its VJP, "
    "each compiled alone."
)
REPORT = Report(NOTE)


@REPORT.claim("errors")
def _errors(table: Claims, rows: list[Row]) -> None:
    exact = pick(rows, method="exact")
    for method in ("exact", "isolated"):
        if not (mine := pick(rows, method=method)):
            continue
        text = f"{method}: reversal residual, worst of {len(mine)} solves"
        table.add(text, worst(mine, "residual"), 0)
    for dtype in values(exact, "dtype"):
        text = f"exact: share of the guard used in {dtype}, worst"
        table.add(text, worst(pick(exact, dtype=dtype), "guard"), 0.5)
        text = f"exact: gradient error / that of {dtype} checkpointed autodiff, worst"
        single = dtype == "float32"
        ratio = _error_ratio(pick(rows, dtype=dtype), 1e-4 if single else math.inf)
        table.add(text + " where < 1e-4" * single, ratio, 10 if single else None)


def _error_ratio(rows: list[Row], limit: float) -> float:
    """The largest over the solves in which autodiff itself is as good as it should be."""
    solve = lambda row: (row["cell"], row["d"], row["evaluations"])
    base = {solve(row): number(row["error"]) for row in pick(rows, method="checkpointed")}
    found = {solve(row): number(row["error"]) for row in pick(rows, method="exact")}
    return max((found[k] / x for k, x in base.items() if x < limit), default=math.nan)


@REPORT.claim("rounded")
def _rounded(table: Claims, rows: list[Row]) -> None:
    for kind in values(rows, "kind"):
        exact, isolated = (pick(rows, kind=kind, method=m) for m in ("exact", "isolated"))
        table.add(f"exact, {kind}: reversal residual", worst(exact, "residual"), 0)
        table.add(f"exact, {kind}: share of the guard used", worst(exact, "guard"), 0.5)
        missed = sum(row["residual"] == 0 for row in isolated)
        table.add(f"isolated, {kind}: failures not caught, of {len(isolated)} solves", missed, 0)


@REPORT.claim("residuals")
def _residuals(table: Claims, rows: list[Row]) -> None:
    text = "exact: bytes kept per state element beyond 8 + whole words of digits"
    table.add(text, max(row["per_element"] - row["bound"] for row in rows), 0)
    other = [[r["other"] for r in pick(rows, cell=c, d=d)] for c, d in values(rows, "cell", "d")]
    text = "exact: other bytes kept, growth with depth"
    table.add(text, max(max(x) - min(x) for x in other), 0)


@REPORT.claim("memory")
def _memory(table: Claims, rows: list[Row]) -> None:
    both = [pick(rows, method=method) for method in ("exact", "isolated")]
    if all(both):
        text = "exact: temporary bytes / (those of isolated + the guard's), worst"
        sizes = lambda row, beside: zip(row["bytes"], beside["bytes"], row["guard"], strict=True)
        pairs = zip(*both, strict=True)
        ratios = [a / (b + guard) for pair in pairs for a, b, guard in sizes(*pair)]
        table.add(text, max(ratios), 1.0)
    rows = pick(rows, method="float")
    for few, many in {tuple(row["evaluations"]) for row in rows}:
        text = f"float: temporary memory at {many} evaluations / at {few} - 1, worst block"
        table.add(text, max(max(r["bytes"]) / min(r["bytes"]) - 1 for r in rows), 0.02)


@REPORT.claim("time")
def _time(table: Claims, timing: Row) -> None:
    ratio, seconds = relative_times(timing), timing["seconds"]
    rounds = timing["all_seconds"]
    if {"exact", "float"} <= ratio.keys():
        text = "exact: time / that of the float state, pairwise"
        table.add(text, median_ratio(rounds["exact"], rounds["float"]), 1.02)
    if "exact" in ratio:
        table.add("exact: time per evaluation / floor", ratio["exact"][0], None)
        table.add("exact: time per evaluation / floor in a loop", ratio["exact"][2], None)
    if "isolated" in ratio:
        table.add("isolated: time per evaluation / (floor + one f)", ratio["isolated"][1], 1.10)
        table.add("isolated: the same, floor and f in a loop", ratio["isolated"][3], None)
    if "float" in ratio:
        # RevDEQ's own code and banax reached these, each against the floor of its run.
        for bound, whose in ((1.05, ""), (0.93, "; RevDEQ's 0.93"), (0.88, "; banax's 0.88")):
            table.add(f"float: time per evaluation / floor{whose}", ratio["float"][0], bound)
        text = "float: time / that of RevDEQ's scheme written out, pairwise"
        table.add(text, median_ratio(rounds["float"], rounds["published scheme"]), None)
        table.add("float: time per evaluation / floor in a loop", ratio["float"][2], None)
    for text, part in (("f: time / its", "f"), ("f with its VJP: time / their", "vjp")):
        found = seconds[part] / seconds[f"products of {part}"]
        table.add(f"{text} matrix products alone", found, None)


@REPORT.claim("vmap")
def _vmap(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        for name in ("seconds", "bytes"):
            text = f"{row['method']}: {name} of jax.vmap / of batched=True"
            table.add(text, row[name][1] / row[name][0], None)


SOLVES: dict[str, str] = {"published scheme": "RevDEQ's scheme, written out"} | {
    str(method): title for method, title in TITLES.items()
}


def relative_times(timing: Row) -> dict[str, tuple[float, float, float, float]]:
    """Time per evaluation / floor, / (floor + one f), and both again inside a loop."""
    seconds = timing["seconds"]
    pieces = [(seconds[f"f{where}"], seconds[f"vjp{where}"]) for where in ("", " in a loop")]
    (a, b), (c, d) = [(f + vjp, f + vjp + f) for f, vjp in pieces]
    solves = {k: v / timing["evaluations"] for k, v in seconds.items() if k in SOLVES}
    return {name: (t / a, t / b, t / c, t / d) for name, t in solves.items()}


def fraction(d: int | str) -> str:
    """1 - beta."""
    if isinstance(d, str):
        return f"{d} per channel"
    return f"{'-' if d < 0 else ''}1/{abs(d)}"


def titled(method: str) -> str:
    return TITLES[method] + (" *" if method in OF_THE_FIXED_POINT else "")  # type: ignore[index]


def _found(rows: list[Row], method: str) -> dict[Any, str]:
    """The worst error over the cells at each number of evaluations, and the worst residual."""
    mine = pick(rows, method=method)
    depths = sorted(values(rows, "evaluations"))
    found = {n: tiny(worst(pick(mine, evaluations=n), "error")) for n in depths}
    residual = tiny(worst(mine, "residual")) if method in REVERSIBLE else "-"
    guard = f"{worst(mine, 'guard'):.2f}" if method == "exact" else "-"
    return found | {"reversal residual": residual, "guard used": guard}


def error_table(rows: list[Row]) -> str:
    """A table of one dtype and 1 - beta."""
    return table([{"gradient error": titled(m)} | _found(rows, m) for m in TITLES])


@REPORT.table("In short", "errors", "memory", "time")
def summary_table(errors: list[Row], memory: list[Row], timing: Row) -> str:
    """Error by depth, growth of memory and time at one 1 - beta; the worst block."""
    d, dtype = timing["d"], errors[0]["dtype"]
    rows, ratio = pick(errors, dtype=dtype, d=d), relative_times(timing)
    few, many = memory[0]["evaluations"]
    lines = []
    for method in TITLES:
        grown = [b / a for a, b in (row["bytes"] for row in pick(memory, method=method))]
        lines.append(
            {f"{dtype}, 1 - beta = {fraction(d)}: error at": titled(method)}
            | _found(rows, method)
            | {f"memory at {many} / {few}": f"{max(grown):.2f}" if grown else "-"}
            | {"time / floor": f"{ratio[method][0]:.2f}" if method in ratio else "-"}
        )
    return table(lines)


@REPORT.table("", "errors")
def error_tables(rows: list[Row]) -> str:
    parts = []
    for dtype, d in values(rows, "dtype", "d"):
        parts.append(f"## {dtype}, 1 - beta = {fraction(d)}, worst block")
        parts.append(error_table(pick(rows, dtype=dtype, d=d)))
    return "\n\n".join(parts)


@REPORT.table(
    "An f rounded differently at every evaluation; the error against f in float32", "rounded"
)
def rounded_table(rows: list[Row]) -> str:
    depths, lines = sorted(values(rows, "evaluations")), []
    for kind, method in values(rows, "kind", "method"):
        mine = pick(rows, kind=kind, method=method)
        found = {n: tiny(worst(pick(mine, evaluations=n), "error")) for n in depths}
        guard = f"{worst(mine, 'guard'):.2f}" if method == "exact" else "-"
        line = {"error against float32 autodiff": f"{kind}: {titled(method)}"} | found
        lines.append(
            line | {"reversal residual": tiny(worst(mine, "residual")), "guard used": guard}
        )
    return table(lines)


@REPORT.table("Memory", "memory")
def memory_table(rows: list[Row]) -> str:
    few, many = rows[0]["evaluations"]
    lines = []
    for method, mine in grouped(rows, "method"):
        found = {row["cell"]: row["bytes"] for row in mine}
        sizes = {cell: f"{mib(a)} / {mib(b)}" for cell, (a, b) in found.items()}
        lines.append({f"temporary MiB at {few} / {many} evaluations": titled(method)} | sizes)
    return table(lines)


@REPORT.table("Residuals", "residuals")
def residual_table(rows: list[Row]) -> str:
    title, lines = "bytes kept per state element (8 + digits + guard), evaluations", []
    for d in values(rows, "d"):
        found = {n: pick(rows, d=d, evaluations=n) for n in sorted(values(rows, "evaluations"))}
        most = {n: show(max(row["per_element"] for row in some)) for n, some in found.items()}
        kept = {n: f"{most[n]} ({some[0]['bound']})" for n, some in found.items()}
        lines.append({title: f"1 - beta = {fraction(d)}"} | kept)
    return table(lines)


PARTS = {
    "f": "one f",
    "f in a loop": "one f, in a loop",
    "products of f": "its matrix products alone",
    "vjp": "one f with its VJP",
    "vjp in a loop": "one f with its VJP, in a loop",
    "products of vjp": "their matrix products alone",
}


@REPORT.table("Time", "time")
def time_table(timing: Row) -> str:
    def line(name: str, title: str, over: int, floor: str = "", inside: str = "") -> Row:
        return {
            "attention block": title,
            "ms per evaluation": f"{1e3 * timing['seconds'][name] / over:.1f}",
            "/ floor": floor,
            "/ floor in a loop": inside,
            "MiB": mib(timing["bytes"][name]),
        }

    lines = [line(part, title, 1) for part, title in PARTS.items()]
    for solve, (floor, _, inside, _) in relative_times(timing).items():
        ratios = (f"{floor:.2f}", f"{inside:.2f}")
        lines.append(line(solve, SOLVES[solve], timing["evaluations"], *ratios))
    return table(lines)


@REPORT.table("Vmap", "vmap")
def vmap_table(rows: list[Row]) -> str:
    batch, width = rows[0]["shape"]
    lines = []
    for row in rows:
        (t1, t2), (b1, b2) = row["seconds"], row["bytes"]
        lines.append(
            {
                f"tanh(W z + x), {width} wide, batch {batch}": titled(row["method"]),
                "batched ms / MiB": f"{1e3 * t1:.0f} / {mib(b1)}",
                "vmap ms / MiB": f"{1e3 * t2:.0f} / {mib(b2)}",
                "ratio": f"{t2 / t1:.1f} / {b2 / b1:.1f}",
            }
        )
    return table(lines)


claims, tables = REPORT.claims, REPORT.tables

"""The promises that hold for solvers, and the tables of their comparison."""

import math
import statistics
from collections.abc import Callable

from bench.compare.evaluations import ratio
from bench.compare.methods import OURS, PAIRS, THEIRS
from bench.report import Claims, Report, markdown, table
from bench.rows import Row, grouped, mib, milliseconds, number, pick, show
from bench.timing import floors, median_ratio

NOTE = (
    "Evaluations: to `||f(z) - z|| <= tol ||z*||`, float64; Newton: n + 1 a step, for its dense "
    "Jacobian.\nFloor: evaluations, and one for the linearisation, x f; VJPs in z x one; one VJP "
    "in the parameters; each compiled alone, linearised beforehand. All ratios of times: medians "
    "over rounds, each against the same round.\nGradient error: against float64, relative, in "
    "parameters and input together; jaxopt solves to its own default tolerance."
)
REPORT = Report(NOTE)

ACCELERATED = ("Anderson", "Broyden")
# A method of ours with jaxopt's; and the best of both sides.
VERSUS = (*PAIRS.items(), ("best", "best"))


def _against(text: str, ours: str, theirs: str) -> str:
    said = f"{text} of {ours} / of {theirs}"
    return said.replace("best / of best", "our best / of jaxopt's best")


def by_problem(rows: list[Row]) -> dict[str, dict[str, Row]]:
    return {name: {row["method"]: row for row in mine} for name, mine in grouped(rows, "problem")}


def count(row: Row | None) -> float:
    """Evaluations to the tolerance; infinite where it was not met."""
    return math.inf if row is None or not row["met"] else row["evaluations"]


@REPORT.claim("evaluations")
def _evaluations(table: Claims, rows: list[Row]) -> None:
    problems = by_problem(rows)
    for method in ACCELERATED:
        hard = [count(p.get(method)) for name, p in problems.items() if "0.996" in name]
        table.add(f"{method}: evaluations on tanh, rho(J) 0.996", max(hard, default=None), 100)
    for method in ACCELERATED:
        worst = max((_excess(p, method) for p in problems.values()), default=None)
        text = f"{method}: evaluations - max(1.2 Picard, Picard + 2), worst of {len(problems)}"
        table.add(text, worst, 0)
    counted = [r for r in rows if r["steps"] and r["met"] and "every" not in r]
    differ = max((abs(r["steps"] - r["evaluations"]) for r in counted), default=None)
    table.add("evaluations counted by the front door - step by step, worst", differ, 0)
    kinds: dict[str, Callable] = {"evaluations": _count_ratio, "seconds": _time_ratio}
    for what, of in kinds.items():
        for ours, theirs in VERSUS:
            found = {name: of(list(p.values()), ours, theirs) for name, p in problems.items()}
            measured = {name: x for name, x in found.items() if x is not None}
            text = f"{_against(what, ours, theirs)}, worst of {len(measured)} problems"
            name = max(measured, key=lambda name: measured[name], default="")
            table.add(text + (f": {name}" if name else ""), measured.get(name), 1)


def _excess(problem: dict[str, Row], method: str) -> float:
    """Evaluations above the limit; where Picard diverges that is nothing but the ceiling."""
    mine, picard = count(problem[method]), count(problem["Picard"])
    return math.inf if mine == math.inf else mine - max(1.2 * picard, picard + 2)


def _names(ours: str, theirs: str) -> tuple[list[str], list[str]]:
    return list(OURS) if ours == "best" else [ours], list(THEIRS) if theirs == "best" else [theirs]


def _count_ratio(rows: list[Row], ours: str, theirs: str) -> float | None:
    """The ratio of evaluations; None where nothing of jaxopt's has met the tolerance."""
    least = lambda names: min((count(r) for r in rows if r["method"] in names), default=math.inf)
    a, b = map(least, _names(ours, theirs))
    return None if b == math.inf else a / b


def _time_ratio(rows: list[Row], ours: str, theirs: str) -> float | None:
    """The ratio of times where both have met the tolerance, and else that of evaluations."""
    if _count_ratio(rows, ours, theirs) in (None, math.inf):
        return _count_ratio(rows, ours, theirs)
    return ratio(rows, *(_fastest(rows, names) for names in _names(ours, theirs)))


def _fastest(rows: list[Row], names: list[str]) -> str:
    timed = [r for r in rows if r["method"] in names and r["all_seconds"]]
    return min(timed, key=lambda r: statistics.median(r["all_seconds"]))["method"]


@REPORT.claim("mixed")
def _mixed(table: Claims, rows: list[Row]) -> None:
    met = [number(x) / row["tol"] for row in rows for x in row["residuals"]]
    table.add("mixed batch: residual / tolerance, worst example of any method", max(met), 1)
    pairs = [p for row in rows for p in zip(row["evaluations"], row["alone"], strict=True)]
    text = "mixed batch: evaluations of an example in the batch - alone, worst"
    table.add(text, max(abs(a - b) for a, b in pairs), 0)
    easy = [max(row["evaluations"][:-1]) / row["evaluations"][-1] for row in rows]
    table.add("mixed batch: evaluations of the easy / of the hard, worst", max(easy), None)


@REPORT.claim("overhead")
def _overhead(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        text = f"{row['method']}: time beyond f / time its history takes to move, {row['mode']}"
        table.add(text, number(row["ratio"]), 1.5)


def _floors(row: Row, method: str, where: str = "") -> list[float]:
    seconds = row["all_seconds"]
    last = seconds[f"last VJP{where}"]
    n = row["counts"][method]
    return floors(seconds | {"last VJP": last}, n["evaluations"], n["VJPs"], where)


@REPORT.claim("floor")
def _floor(table: Claims, row: Row) -> None:
    seconds = row["all_seconds"]
    for method in ("Picard", "Picard, batched"):
        text = f"dense tanh, {method}, value and gradient: time / floor"
        table.add(text, median_ratio(seconds[method], _floors(row, method)), 1.1)
        inside = median_ratio(seconds[method], _floors(row, method, ", looped"))
        table.add(f"{text}, pieces in a loop", inside, None)
    for ours, theirs in PAIRS.items():
        known = theirs in seconds
        found = median_ratio(seconds[ours], seconds[theirs]) if known else None
        table.add(_against("dense tanh, value and gradient: time", ours, theirs), found, 1)


@REPORT.claim("blocks")
def _blocks(table: Claims, rows: list[Row]) -> None:
    for name, mine in grouped(rows, "block"):
        bound = 0.5 if name == "attention" else None
        for ours, theirs in VERSUS:
            sides = _names(ours, theirs)
            known = any(r["method"] in sides[1] for r in mine)
            found = ratio(mine, *(_fastest(mine, side) for side in sides)) if known else None
            table.add(_against(f"{name}, solve and gradient: time", ours, theirs), found, bound)


@REPORT.table("Evaluations", "evaluations")
def evaluation_table(rows: list[Row]) -> str:
    methods, lines = [*OURS, "Newton", *THEIRS], []
    for name, p in by_problem(rows).items():
        about = {"evaluations (ms)": name, "rho": f"{next(iter(p.values()))['rho']:.3g}"}
        lines.append(about | {method: _cell(p.get(method), method) for method in methods})
    return table(lines)


def _cell(row: Row | None, method: str) -> str:
    if row is None:
        return "not installed" if method in THEIRS else "-"
    if not row["met"]:
        return "not met"
    time = f" ({milliseconds(row['all_seconds'])})" if row["all_seconds"] else ""
    return f"{row['evaluations']:,}{time}"


@REPORT.table("Mixed", "mixed")
def mixed_table(rows: list[Row]) -> str:
    lines = [["mixed batch", "easy: evaluations", "hard", "residual / tolerance, worst"]]
    for row in rows:
        *easy, hard = row["evaluations"]
        worst = max(number(x) for x in row["residuals"]) / row["tol"]
        lines.append([row["method"], f"{min(easy)} to {max(easy)}", f"{hard:,}", show(worst)])
    return markdown(lines)


@REPORT.table("Overhead", "overhead")
def overhead_table(rows: list[Row]) -> str:
    title = f"state of {rows[0]['size']:,}, {rows[0]['bandwidth'] / 1e9:.1f} GB/s"
    line = lambda row: {
        title: f"{row['method']}, {row['mode']}",
        "ms a step beyond f": f"{1e3 * row['seconds']:.3g}",
        "f, ms": f"{1e3 * row['f']:.3g}",
        "MiB its history moves": mib(row["bytes"]),
        "ratio": show(row["ratio"]),
    }
    return table([line(row) for row in rows])


@REPORT.table("Floor", "floor")
def floor_table(row: Row) -> str:
    batch, width = row["shape"]
    lines = [[f"tanh(z W + x), {width} wide, batch {batch}", "ms", "evaluations", "/ floor"]]
    for name, seconds in row["all_seconds"].items():
        counts = row["counts"].get(name, {})
        floor = f"{median_ratio(seconds, _floors(row, name)):.2f}" if "VJPs" in counts else ""
        lines.append([name, milliseconds(seconds), counts.get("evaluations", ""), floor])
    lines += [[name, "not installed", "", ""] for name in THEIRS if name not in row["counts"]]
    return markdown(lines)


@REPORT.table("Blocks", "blocks")
def block_table(rows: list[Row]) -> str:
    lines = [["solve and gradient", "ms", "evaluations", "MiB", "gradient error"]]
    for name, mine in grouped(rows, "block"):
        for row in mine:
            found = [milliseconds(row["all_seconds"]), row["evaluations"], mib(row["bytes"])]
            lines.append([f"{name}, {row['method']}", *found, show(row["error"])])
        absent = [method for method in THEIRS if not pick(mine, method=method)]
        lines += [[f"{name}, {method}", "not installed", "", "", ""] for method in absent]
    return markdown(lines)


claims, tables = REPORT.claims, REPORT.tables

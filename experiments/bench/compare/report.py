"""What the comparison of solvers says: which promises hold, and its tables."""

import math
import statistics

from bench.compare.evaluations import ratio
from bench.compare.methods import OURS, PAIRS, THEIRS
from bench.report import Claims, Results, Row, markdown, mib, number, pick, said, show
from bench.timing import median_ratio

ACCELERATED = ("Anderson", "Broyden")


def claims(results: Results) -> list[Row]:
    table = Claims()
    if "evaluations" in results:
        _evaluations(table, results["evaluations"])
    if "mixed" in results:
        _mixed(table, results["mixed"])
    for row in results.get("overhead", []):
        text = f"{row['method']}: time beyond f / time its history takes to move, {row['mode']}"
        table.add(text, number(row["ratio"]), 1.5)
    if "floor" in results:
        _floor(table, results["floor"])
    for name in dict.fromkeys(row["block"] for row in results.get("blocks", [])):
        rows = pick(results["blocks"], block=name)
        bound = 0.5 if name == "attention" else None
        for ours, theirs in (*PAIRS.items(), ("best", "best")):
            text = f"{name}, solve and gradient: time of {ours} / of {theirs}"
            text = text.replace("best / of best", "our best / of jaxopt's best")
            table.add(text, _versus(rows, ours, theirs), bound)
    return table.lines


def by_problem(rows: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["problem"], {})[row["method"]] = row
    return found


def count(row: Row | None) -> float:
    """Evaluations to the tolerance; infinite where it was not met."""
    return math.inf if row is None or not row["met"] else row["evaluations"]


def _evaluations(table: Claims, rows: list[Row]) -> None:
    problems = by_problem(rows)
    for method in ACCELERATED:
        hard = [count(p.get(method)) for name, p in problems.items() if "0.996" in name]
        table.add(f"{method}: evaluations on tanh, rho(J) 0.996", max(hard, default=None), 100)
    for method in ACCELERATED:
        excess = []
        for p in problems.values():
            picard = count(p["Picard"])
            # Where Picard diverges there is nothing to exceed but the ceiling.
            limit = max(1.2 * picard, picard + 2)
            mine = count(p[method])
            excess.append(math.inf if mine == math.inf else mine - limit)
        text = f"{method}: evaluations - max(1.2 Picard, Picard + 2), worst of {len(problems)}"
        table.add(text, max(excess, default=None), 0)
    counted = [r for r in rows if r["steps"] and r["met"] and "every" not in r]
    differ = max((abs(r["steps"] - r["evaluations"]) for r in counted), default=None)
    table.add("evaluations counted by the front door - step by step, worst", differ, 0)
    for what, of, bound in (
        ("evaluations", _count_ratio, 1),
        ("seconds", _time_ratio, 1),
    ):
        for ours, theirs in (*PAIRS.items(), ("best", "best")):
            found = {name: of(list(p.values()), ours, theirs) for name, p in problems.items()}
            measured = {name: x for name, x in found.items() if x is not None}
            text = f"{what} of {ours} / of {theirs}, worst of {len(measured)} problems"
            text = text.replace("best / of best", "our best / of jaxopt's best")
            name = max(measured, key=lambda name: measured[name], default=None)
            table.add(
                text + (f": {name}" if name else ""),
                None if name is None else measured[name],
                bound,
            )


def _names(ours: str, theirs: str) -> tuple[list[str], list[str]]:
    return list(OURS) if ours == "best" else [ours], list(THEIRS) if theirs == "best" else [theirs]


def _count_ratio(rows: list[Row], ours: str, theirs: str) -> float | None:
    """None where nothing of jaxopt's has met the tolerance."""
    a, b = (
        min((count(r) for r in rows if r["method"] in names), default=math.inf)
        for names in _names(ours, theirs)
    )
    return None if b == math.inf else a / b


def _time_ratio(rows: list[Row], ours: str, theirs: str) -> float | None:
    """Likewise; that one of ours has not is no better than any time."""
    if _count_ratio(rows, ours, theirs) in (None, math.inf):
        return _count_ratio(rows, ours, theirs)
    return ratio(rows, *(_fastest(rows, names) for names in _names(ours, theirs)))


def _fastest(rows: list[Row], names: list[str]) -> str:
    timed = [r for r in rows if r["method"] in names and r["all_seconds"]]
    return min(timed, key=lambda r: statistics.median(r["all_seconds"]))["method"]


def _versus(rows: list[Row], ours: str, theirs: str) -> float | None:
    mine, other = _names(ours, theirs)
    if not any(r["method"] in other for r in rows):
        return None
    return ratio(rows, _fastest(rows, mine), _fastest(rows, other))


def _mixed(table: Claims, rows: list[Row]) -> None:
    met = [number(x) / row["tol"] for row in rows for x in row["residuals"]]
    table.add("mixed batch: residual / tolerance, worst example of any method", max(met), 1)
    pairs = [p for row in rows for p in zip(row["evaluations"], row["alone"], strict=True)]
    text = "mixed batch: evaluations of an example in the batch - alone, worst"
    table.add(text, max(abs(a - b) for a, b in pairs), 0)
    easy = [max(row["evaluations"][:-1]) / row["evaluations"][-1] for row in rows]
    table.add("mixed batch: evaluations of the easy / of the hard, worst", max(easy), None)


def floors(row: Row, method: str, where: str = "") -> list[float]:
    """Of each round, in seconds: evaluations x f + VJPs x one VJP + the last, in the parameters.

    The backward pass linearises f at the solution, which is one evaluation more.
    """
    n, seconds = row["counts"][method], row["all_seconds"]
    f, vjp, last = (seconds[f"{name}{where}"] for name in ("f", "VJP", "last VJP"))
    parts = zip(f, vjp, last, strict=True)
    return [(n["evaluations"] + 1) * a + n["VJPs"] * b + c for a, b, c in parts]


def _floor(table: Claims, row: Row) -> None:
    seconds = row["all_seconds"]
    for method in ("Picard", "Picard, batched"):
        text = f"dense tanh, {method}, value and gradient: time / floor"
        table.add(text, median_ratio(seconds[method], floors(row, method)), 1.1)
        inside = median_ratio(seconds[method], floors(row, method, ", looped"))
        table.add(f"{text}, pieces in a loop", inside, None)
    for ours, theirs in PAIRS.items():
        known = theirs in seconds
        found = median_ratio(seconds[ours], seconds[theirs]) if known else None
        table.add(f"dense tanh, value and gradient: time of {ours} / of {theirs}", found, 1)


def tables(results: Results) -> str:
    """What was measured, as Markdown."""
    parts = [said(results["claims"])]
    for name, table in TABLES.items():
        if name in results:
            parts += [f"## {name.capitalize()}", table(results[name])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def evaluation_table(rows: list[Row]) -> str:
    methods = [*OURS, "Newton", *THEIRS]
    table = [["evaluations (ms)", "rho", *methods]]
    for name, p in by_problem(rows).items():
        rho = next(iter(p.values()))["rho"]
        table.append([name, f"{rho:.3g}", *(_cell(p.get(m), m) for m in methods)])
    return markdown(table)


def _cell(row: Row | None, method: str) -> str:
    if row is None:
        return "not installed" if method in THEIRS else "-"
    if not row["met"]:
        return "not met"
    seconds = row["all_seconds"]
    time = f" ({1e3 * statistics.median(seconds):.3g})" if seconds else ""
    return f"{row['evaluations']:,}{time}"


def mixed_table(rows: list[Row]) -> str:
    table = [["mixed batch", "easy: evaluations", "hard", "residual / tolerance, worst"]]
    for row in rows:
        *easy, hard = row["evaluations"]
        worst = max(number(x) for x in row["residuals"]) / row["tol"]
        table.append([row["method"], f"{min(easy)} to {max(easy)}", f"{hard:,}", show(worst)])
    return markdown(table)


def overhead_table(rows: list[Row]) -> str:
    size, bandwidth = rows[0]["size"], rows[0]["bandwidth"]
    head = f"state of {size:,}, {bandwidth / 1e9:.1f} GB/s"
    table = [[head, "ms a step beyond f", "f, ms", "MiB its history moves", "ratio"]]
    for row in rows:
        times = [f"{1e3 * row[k]:.3g}" for k in ("seconds", "f")]
        title = f"{row['method']}, {row['mode']}"
        table.append([title, *times, mib(row["bytes"]), show(row["ratio"])])
    return markdown(table)


def floor_table(row: Row) -> str:
    batch, width = row["shape"]
    table = [[f"tanh(z W + x), {width} wide, batch {batch}", "ms", "evaluations", "/ floor"]]
    for name, seconds in row["all_seconds"].items():
        counts = row["counts"].get(name, {})
        floor = f"{median_ratio(seconds, floors(row, name)):.2f}" if "VJPs" in counts else ""
        known = str(counts["evaluations"]) if counts else ""
        table.append([name, f"{1e3 * statistics.median(seconds):.3g}", known, floor])
    missing = [[name, "not installed", "", ""] for name in THEIRS if name not in row["counts"]]
    return markdown(table + missing)


def block_table(rows: list[Row]) -> str:
    table = [["solve and gradient", "ms", "evaluations", "MiB", "gradient error"]]
    for name in dict.fromkeys(row["block"] for row in rows):
        mine = pick(rows, block=name)
        for row in mine:
            time = f"{1e3 * statistics.median(row['all_seconds']):.3g}"
            found = [time, str(row["evaluations"]), mib(row["bytes"]), show(row["error"])]
            table.append([f"{name}, {row['method']}", *found])
        absent = [m for m in THEIRS if not pick(mine, method=m)]
        table += [[f"{name}, {m}", "not installed", "", "", ""] for m in absent]
    return markdown(table)


TABLES = {
    "evaluations": evaluation_table,
    "mixed": mixed_table,
    "overhead": overhead_table,
    "floor": floor_table,
    "blocks": block_table,
}
NOTE = (
    "Evaluations: to `||f(z) - z|| <= tol ||z*||`, float64; Newton: n + 1 a step, for its dense "
    "Jacobian.\nFloor: evaluations, and one for the linearisation, x f; VJPs in z x one; one VJP "
    "in the parameters; each compiled alone, linearised beforehand. All ratios of times: medians "
    "over rounds, each against the same round.\nGradient error: against float64, relative, in "
    "parameters and input together; jaxopt solves to its own default tolerance."
)

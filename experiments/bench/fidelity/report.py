"""What the numbers say: which promises hold, and tables of all that was measured."""

import math
import statistics

from bench.gradients import REVERSIBLE
from bench.report import Results, Row, markdown, mib, number, pick, show, tiny, worst
from bench.ways import OF_THE_FIXED_POINT, TITLES


def claims(results: Results) -> list[Row]:
    """What must hold, as far as it was measured; a bound of None: stated, nothing promised."""
    lines: list[Row] = []

    def claim(text: str, measured: float, bound: float | None) -> None:
        holds = None if bound is None else bool(measured <= bound)
        lines.append({"claim": text, "measured": measured, "bound": bound, "holds": holds})

    if "errors" in results:
        exact = pick(results["errors"], method="exact")
        solves = f"worst of {len(exact)} solves"
        claim(f"exact: reversal residual, {solves}", worst(exact, "residual"), 0)
        for dtype in dict.fromkeys(row["dtype"] for row in exact):
            ratio = _error_ratio(pick(results["errors"], dtype=dtype))
            text = f"exact: gradient error / that of {dtype} checkpointed autodiff, worst"
            single = dtype == "float32"
            claim(text + " where < 1e-4" * single, ratio, 10 if single else None)
    if "residuals" in results:
        rows = results["residuals"]
        text = "exact: bytes kept per state element beyond 8 + whole words of digits"
        claim(text, max(row["per_element"] - row["bound"] for row in rows), 0)
        cases = {(row["cell"], row["d"]) for row in rows}
        other = [[r["other"] for r in pick(rows, cell=c, d=d)] for c, d in cases]
        claim("exact: other bytes kept, growth with depth", max(max(x) - min(x) for x in other), 0)
    rows = pick(results.get("memory", []), method="float")
    for few, many in {tuple(row["evaluations"]) for row in rows}:
        text = f"float: temporary memory at {many} evaluations / at {few} - 1, worst block"
        claim(text, max(max(r["bytes"]) / min(r["bytes"]) - 1 for r in rows), 0.02)
    if "time" in results:
        ratio, seconds = relative_times(results["time"]), results["time"]["seconds"]
        if "exact" in ratio:
            claim("exact: time per evaluation / (floor + one f)", ratio["exact"][1], 1.10)
            claim("exact: the same, floor and f in a loop", ratio["exact"][3], None)
        if "float" in ratio:
            # RevDEQ's own code and banax reached these, each against the floor of its run.
            for bound, whose in ((1.05, ""), (0.93, "; RevDEQ's 0.93"), (0.88, "; banax's 0.88")):
                claim(f"float: time per evaluation / floor{whose}", ratio["float"][0], bound)
            text = "float: time / that of RevDEQ's scheme written out, pairwise"
            rounds = [results["time"]["all_seconds"][k] for k in ("float", "published scheme")]
            pairs = zip(*rounds, strict=True)
            claim(text, statistics.median(a / b for a, b in pairs), None)
            claim("float: time per evaluation / floor in a loop", ratio["float"][2], None)
        claim("f: time / its matrix products alone", seconds["f"] / seconds["products of f"], None)
        text = "f with its VJP: time / their matrix products alone"
        claim(text, seconds["vjp"] / seconds["products of vjp"], None)
    for row in results.get("vmap", []):
        for name in ("seconds", "bytes"):
            text = f"{row['method']}: {name} of jax.vmap / of batched=True"
            claim(text, row[name][1] / row[name][0], None)
    return lines


def _error_ratio(rows: list[Row]) -> float:
    """Of one dtype, over the solves in which autodiff itself is as good as it should be."""
    solve = lambda row: (row["cell"], row["d"], row["evaluations"])
    base = {solve(row): number(row["error"]) for row in pick(rows, method="checkpointed")}
    limit = 1e-4 if rows[0]["dtype"] == "float32" else math.inf
    found = {solve(row): number(row["error"]) for row in pick(rows, method="exact")}
    return max((found[k] / x for k, x in base.items() if x < limit), default=math.nan)


def relative_times(timing: Row) -> dict[str, tuple[float, float, float, float]]:
    """Time per evaluation / floor, / (floor + one f), and both again inside a loop."""
    seconds = timing["seconds"]
    pieces = [(seconds[f"f{where}"], seconds[f"vjp{where}"]) for where in ("", " in a loop")]
    (a, b), (c, d) = [(f + vjp, f + vjp + f) for f, vjp in pieces]
    solves = {k: v / timing["evaluations"] for k, v in seconds.items() if k in SOLVES}
    return {name: (t / a, t / b, t / c, t / d) for name, t in solves.items()}


SOLVES: dict[str, str] = {"published scheme": "RevDEQ's scheme, written out"} | {
    str(method): title for method, title in TITLES.items()
}


def fraction(d: int) -> str:
    """1 - beta."""
    return f"{'-' if d < 0 else ''}1/{abs(d)}"


def titled(method: str) -> str:
    return TITLES[method] + (" *" if method in OF_THE_FIXED_POINT else "")  # type: ignore[index]


def error_table(rows: list[Row]) -> str:
    """Of one dtype and 1 - beta: worst over the cells, by method and number of evaluations."""
    depths = sorted({row["evaluations"] for row in rows})
    table = [["gradient error", *map(str, depths), "reversal residual"]]
    for method in TITLES:
        mine = pick(rows, method=method)
        found = [tiny(worst(pick(mine, evaluations=n), "error")) for n in depths]
        residual = tiny(worst(mine, "residual")) if method in REVERSIBLE else "-"
        table.append([titled(method), *found, residual])
    return markdown(table)


def summary_table(results: Results) -> str:
    """At one 1 - beta: error by depth, what memory grows by, time; the worst block."""
    d, dtype = results["time"]["d"], results["errors"][0]["dtype"]
    rows = pick(results["errors"], dtype=dtype, d=d)
    depths = sorted({row["evaluations"] for row in rows})
    few, many = results["memory"][0]["evaluations"]
    ratio = relative_times(results["time"])
    columns = ["reversal residual", f"memory at {many} / {few}", "time / floor"]
    table = [[f"{dtype}, 1 - beta = {fraction(d)}: error at", *map(str, depths), *columns]]
    for method in TITLES:
        mine, sizes = pick(rows, method=method), pick(results["memory"], method=method)
        found = [tiny(worst(pick(mine, evaluations=n), "error")) for n in depths]
        found.append(tiny(worst(mine, "residual")) if method in REVERSIBLE else "-")
        grown = [b / a for a, b in (row["bytes"] for row in sizes)]
        found.append(f"{max(grown):.2f}" if grown else "-")
        table.append(
            [titled(method), *found, f"{ratio[method][0]:.2f}" if method in ratio else "-"]
        )
    return markdown(table)


def memory_table(rows: list[Row]) -> str:
    few, many = rows[0]["evaluations"]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    table = [[f"temporary MiB at {few} / {many} evaluations", *cells]]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [pick(rows, cell=c, method=method)[0]["bytes"] for c in cells]
        table.append([titled(method), *(f"{mib(a)} / {mib(b)}" for a, b in found)])
    return markdown(table)


def residual_table(rows: list[Row]) -> str:
    depths = sorted({row["evaluations"] for row in rows})
    table = [["bytes kept per state element (8 + digits), evaluations", *map(str, depths)]]
    for d in dict.fromkeys(row["d"] for row in rows):
        columns = []
        for n in depths:
            found = pick(rows, d=d, evaluations=n)
            most = max(row["per_element"] for row in found)
            columns.append(f"{show(most)} ({found[0]['bound']})")
        table.append([f"1 - beta = {fraction(d)}", *columns])
    return markdown(table)


PARTS = {
    "f": "one f",
    "f in a loop": "one f, in a loop",
    "products of f": "its matrix products alone",
    "vjp": "one f with its VJP",
    "vjp in a loop": "one f with its VJP, in a loop",
    "products of vjp": "their matrix products alone",
}


def time_table(timing: Row) -> str:
    n, seconds, sizes = timing["evaluations"], timing["seconds"], timing["bytes"]
    table = [["attention block", "ms per evaluation", "/ floor", "/ floor in a loop", "MiB"]]
    for part, title in PARTS.items():
        table.append([title, f"{1e3 * seconds[part]:.1f}", "", "", mib(sizes[part])])
    for solve, (floor, _, inside, _) in relative_times(timing).items():
        found = [f"{1e3 * seconds[solve] / n:.1f}", f"{floor:.2f}", f"{inside:.2f}"]
        table.append([SOLVES[solve], *found, mib(sizes[solve])])
    return markdown(table)


def vmap_table(rows: list[Row]) -> str:
    batch, width = rows[0]["shape"]
    block = f"tanh(W z + x), {width} wide, batch {batch}"
    table = [[block, "batched ms / MiB", "vmap ms / MiB", "ratio"]]
    for row in rows:
        (t1, t2), (b1, b2) = row["seconds"], row["bytes"]
        columns = [f"{1e3 * t:.0f} / {mib(b)}" for t, b in ((t1, b1), (t2, b2))]
        table.append([titled(row["method"]), *columns, f"{t2 / t1:.1f} / {b2 / b1:.1f}"])
    return markdown(table)

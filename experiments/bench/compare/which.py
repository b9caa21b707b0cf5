"""Which gradient when: what the comparison of adjoints says, and its tables."""

import math
from typing import Any

from bench.compare.adjoints import JAXOPT_ROW
from bench.compare.methods import JAXOPT
from bench.report import Claims, Results, Row, markdown, number, pick, said, show, tiny

# What each needs, and what it is for; bias, memory and cost are measured.
NEEDS = {
    "Implicit": "a converged z*; nothing else",
    "Implicit, series": "rho(J) below about 0.9",
    "Implicit, Anderson": "a converged z*",
    "Implicit, Broyden": "a converged z*; memory for 32 copies of z",
    "Implicit, GMRES": "a converged z*; a batch is one system; no shard_map",
    "Implicit, BiCGStab": "a converged z*; a batch is one system; no shard_map",
    "Phantom": "memory for 5 evaluations of f; tolerance of a bias",
    "NeumannPhantom": "tolerance of a bias",
    "JacobianFree": "tolerance of a bias; rho(J) small",
    "Broyden (SHINE)": "the solver deqjax.Broyden; tolerance of a bias",
    "RecursiveCheckpoint": "a fixed number of steps",
    "Reversible, exact": "the solver deqjax.Reversible; f that gives the same bits again",
    JAXOPT_ROW: "jaxopt",
}


def claims(results: Results) -> list[Row]:
    table = Claims()
    if "memory" in results:
        rows = {row["size"]: row["bytes"] for row in results["memory"]}
        small, middle, large = sorted(rows)
        text = f"implicit backward at state size {middle:,}: temporary MiB"
        table.add(text, rows[middle] / 2**20, 8)
        growth = max(rows[middle] / rows[small], rows[large] / rows[middle])
        table.add("the same: bytes at twice the size / at the size", growth, 2.05)
    for row in results.get("guarantee", []):
        text = f"implicit gradient, default, rho {row['rho']}: error / (10 tol / (1 - rho)), or NaN"
        # A NaN is allowed, and says so; a wrong number is not.
        wrong = 0.0 if row["nan"] else number(row["error"]) / row["bound"]
        table.add(text + (" (NaN)" if row["nan"] else ""), wrong, 1)
    if "adjoints" in results:
        rows = pick(results["adjoints"], problem="linear")
        for name in ("Implicit", "Implicit, Broyden", "Implicit, GMRES"):
            found = [r["error"] for r in pick(rows, method=name) if r["error"] is not None]
            table.add(
                f"{name}: error on z = A z + b, worst rho, NaN aside",
                max(found, default=math.nan),
                None,
            )
    return table.lines


def tables(results: Results) -> str:
    """What was measured, as Markdown."""
    parts = [said(results["claims"])]
    if "adjoints" in results:
        rows = results["adjoints"]
        parts += ["## Which gradient when", which_table(rows)]
        parts += ["## Gradient error", error_table(rows)]
        parts += ["## Memory and time", cost_table(rows)]
    if "guarantee" in results:
        parts += ["## The default implicit gradient", guarantee_table(results["guarantee"])]
    if "memory" in results:
        parts += ["## Memory of the implicit backward pass", memory_table(results["memory"])]
    return "\n\n".join([*parts, NOTE]) + "\n"


def columns(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Title and selection of each problem."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        title = row["problem"] if row["rho"] is None else f"{row['problem']}, rho {row['rho']:g}"
        found[title] = {"problem": row["problem"], "rho": row["rho"]}
    return found


def methods(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def error_table(rows: list[Row]) -> str:
    titles = columns(rows)
    table = [["gradient error", *titles]]
    for name in methods(rows):
        found = [pick(rows, method=name, **where)[0]["error"] for where in titles.values()]
        table.append([name, *map(_error, found)])
    return markdown(table + _missing(len(titles)))


def _missing(n: int) -> list[list[str]]:
    return [] if JAXOPT is not None else [[JAXOPT_ROW, *["not installed"] * n]]


def _error(x: float | None) -> str:
    return "NaN" if x is None or math.isnan(x) else tiny(x)


def cost_table(rows: list[Row]) -> str:
    """Temporary memory in copies of z, and milliseconds of solve and gradient."""
    titles = columns(rows)
    table = [["copies of z / ms", *titles]]
    for name in methods(rows):
        found = [pick(rows, method=name, **where)[0] for where in titles.values()]
        cells = [f"{r['bytes'] / (4 * r['size']):.0f} / {split(r)}" for r in found]
        table.append([name, *cells])
    return markdown(table + _missing(len(titles)))


def split(row: Row) -> str:
    """Milliseconds of the solve, and of what the gradient adds to them."""
    backward = max(row["backward"], 0)  # below the noise of the solve
    return f"{1e3 * (row['seconds'] - backward):.3g} + {1e3 * backward:.3g}"


def which_table(rows: list[Row]) -> str:
    """Bias, memory, cost, needs: on the attention block, bias also at the largest rho."""
    line = pick(rows, problem="linear")
    top = max(row["rho"] for row in line)
    block = next((r["problem"] for r in rows if r["rho"] is None), "linear")
    mine = pick(rows, problem=block, rho=top if block == "linear" else None)
    head = [f"bias ({block})", f"bias (rho {top:g})", "memory, copies of z", "ms, solve + gradient"]
    table = [["gradient", *head, "needs"]]
    for name in methods(rows):
        row = pick(mine, method=name)[0]
        far = pick(line, method=name, rho=top)[0]
        memory = f"{row['bytes'] / (4 * row['size']):.0f}"
        time = split(row)
        biases = [_error(row["error"]), _error(far["error"])]
        table.append([name, *biases, memory, time, NEEDS[name]])
    return markdown(table)


def guarantee_table(rows: list[Row]) -> str:
    table = [["rho", "products", "error", "10 tol / (1 - rho)"]]
    for row in rows:
        found = "NaN" if row["nan"] else tiny(number(row["error"]))
        table.append([f"{row['rho']:g}", str(row["steps"]), found, tiny(row["bound"])])
    return markdown(table)


def memory_table(rows: list[Row]) -> str:
    table = [["state size", "temporary MiB", "copies of z"]]
    for row in rows:
        sizes = [f"{row['bytes'] / 2**20:.2f}", show(row["bytes"] / (4 * row["size"]))]
        table.append([f"{row['size']:,}", *sizes])
    return markdown(table)


NOTE = (
    "Error: relative, over all of args together, against the implicit gradient in float64 (linear: "
    "dense). All in float32; solves to 2e-6. RecursiveCheckpoint and Reversible "
    "differentiate their steps, so that the bias is what those have not reached. Memory: "
    "temporary bytes of solve and gradient over the bytes of one z, which with few entries of z "
    "is mostly parameters. Time: of the solve, by the solver that goes with it, + what the "
    "gradient adds."
)

"""Which gradient when: the claims of the comparison of adjoints, and its tables."""

import math
from collections.abc import Callable
from typing import Any

from bench.compare.adjoints import JAXOPT_ROW
from bench.compare.methods import JAXOPT
from bench.report import Claims, Report, markdown, table
from bench.rows import Row, grouped, number, pick, show, tiny, values

NOTE = (
    "Error: relative, over all of args together, against the implicit gradient in float64 (linear: "
    "dense). All in float32; solves to 2e-6. RecursiveCheckpoint and Reversible "
    "differentiate their steps, so that the bias is what those have not reached. Memory: "
    "temporary bytes of solve and gradient over the bytes of one z, which with few entries of z "
    "is mostly parameters. Time: of the solve, by the solver that goes with it, + what the "
    "gradient adds."
)
REPORT = Report(NOTE)

# The needs and uses of each; bias, memory and cost are measured.
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
    "Reversible, exact": "the solver deqjax.Reversible; f equal from call to call up to rounding",
    JAXOPT_ROW: "jaxopt",
}


@REPORT.claim("memory")
def _memory(table: Claims, rows: list[Row]) -> None:
    found = {row["size"]: row["bytes"] for row in rows}
    small, middle, large = sorted(found)
    text = f"implicit backward at state size {middle:,}: temporary MiB"
    table.add(text, found[middle] / 2**20, 8)
    growth = max(found[middle] / found[small], found[large] / found[middle])
    table.add("the same: bytes at twice the size / at the size", growth, 2.05)


@REPORT.claim("guarantee")
def _guarantee(table: Claims, rows: list[Row]) -> None:
    for row in rows:
        text = f"implicit gradient, default, rho {row['rho']}: error / (10 tol / (1 - rho)), or NaN"
        # A NaN is allowed, and says so; a wrong number is not.
        wrong = 0.0 if row["nan"] else number(row["error"]) / row["bound"]
        table.add(text + (" (NaN)" if row["nan"] else ""), wrong, 1)


@REPORT.claim("adjoints")
def _adjoints(table: Claims, rows: list[Row]) -> None:
    for name in ("Implicit", "Implicit, Broyden", "Implicit, GMRES"):
        mine = pick(rows, problem="linear", method=name)
        found = [row["error"] for row in mine if row["error"] is not None]
        text = f"{name}: error on z = A z + b, worst rho, NaN aside"
        table.add(text, max(found, default=math.nan), None)


def columns(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Title and selection of each problem."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        title = row["problem"] if row["rho"] is None else f"{row['problem']}, rho {row['rho']:g}"
        found[title] = {"problem": row["problem"], "rho": row["rho"]}
    return found


def _by_method(rows: list[Row], title: str, cell: Callable[[Row], str]) -> str:
    """A line per method, a column per problem."""
    titles, lines = columns(rows), []
    for name, mine in grouped(rows, "method"):
        found = {of: cell(pick(mine, **where)[0]) for of, where in titles.items()}
        lines.append({title: name} | found)
    if JAXOPT is None:
        lines.append({title: JAXOPT_ROW} | dict.fromkeys(titles, "not installed"))
    return table(lines)


@REPORT.table("Which gradient when", "adjoints")
def which_table(rows: list[Row]) -> str:
    """Bias, memory, cost, needs: on the attention block, bias also at the largest rho."""
    line = pick(rows, problem="linear")
    top = max(row["rho"] for row in line)
    block = next((r["problem"] for r in rows if r["rho"] is None), "linear")
    mine = pick(rows, problem=block, rho=top if block == "linear" else None)
    lines = []
    for name in values(rows, "method"):
        (row,), (far,) = pick(mine, method=name), pick(line, method=name, rho=top)
        lines.append(
            {
                "gradient": name,
                f"bias ({block})": _error(row["error"]),
                f"bias (rho {top:g})": _error(far["error"]),
                "memory, copies of z": _copies(row),
                "ms, solve + gradient": _split(row),
                "needs": NEEDS[name],
            }
        )
    return table(lines)


@REPORT.table("Gradient error", "adjoints")
def error_table(rows: list[Row]) -> str:
    return _by_method(rows, "gradient error", lambda row: _error(row["error"]))


def _error(x: float | None) -> str:
    return "NaN" if x is None or math.isnan(x) else tiny(x)


@REPORT.table("Memory and time", "adjoints")
def cost_table(rows: list[Row]) -> str:
    """Temporary memory in copies of z, and milliseconds of solve and gradient."""
    return _by_method(rows, "copies of z / ms", lambda row: f"{_copies(row)} / {_split(row)}")


def _copies(row: Row) -> str:
    return f"{row['bytes'] / (4 * row['size']):.0f}"


def _split(row: Row) -> str:
    """Milliseconds of the solve, and of what the gradient adds to them."""
    backward = max(row["backward"], 0)  # below the noise of the solve
    return f"{1e3 * (row['seconds'] - backward):.3g} + {1e3 * backward:.3g}"


@REPORT.table("The default implicit gradient", "guarantee")
def guarantee_table(rows: list[Row]) -> str:
    lines = [["rho", "products", "error", "10 tol / (1 - rho)"]]
    for row in rows:
        found = "NaN" if row["nan"] else tiny(number(row["error"]))
        lines.append([f"{row['rho']:g}", row["steps"], found, tiny(row["bound"])])
    return markdown(lines)


@REPORT.table("Memory of the implicit backward pass", "memory")
def memory_table(rows: list[Row]) -> str:
    lines = [["state size", "temporary MiB", "copies of z"]]
    for row in rows:
        copies = show(row["bytes"] / (4 * row["size"]))
        lines.append([f"{row['size']:,}", f"{row['bytes'] / 2**20:.2f}", copies])
    return markdown(lines)


claims, tables = REPORT.claims, REPORT.tables

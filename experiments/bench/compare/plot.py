"""Plots of both comparisons."""

import math
from pathlib import Path
from typing import Any

from bench.plotting import BLUE, GREEN, GREY, ORANGE, PALE, PINK, RED, SKY, plain, plt, save, ticks
from bench.rows import Row, pick, values

STYLE: dict[str, dict[str, Any]] = {
    "Picard": {"color": GREY, "linewidth": 2.6},
    "damped Picard": {"color": PALE, "linewidth": 2},
    "Anderson": {"color": BLUE, "linewidth": 2.2},
    "Broyden": {"color": GREEN, "linewidth": 2.2},
    "Newton": {"color": PINK, "linewidth": 1.2, "marker": "o", "markersize": 3.5},
    "jaxopt Picard": {"color": ORANGE, "linewidth": 1.3, "linestyle": "--"},
    "jaxopt Anderson": {"color": RED, "linewidth": 1.5, "linestyle": "--"},
}
BOTTOM, TOP = 1e-12, 1e2


def plot_residuals(rows: list[Row], tol: float, path: Path) -> None:
    """Residual against evaluations, one panel per problem."""
    names = values(rows, "problem")
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    grid: Any = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    size = (4.2 * columns, 1 + 2.8 * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, **grid)
    longest = max(len(row["history"]) for row in rows)
    drawn: dict[str, Any] = {}
    for panel, name in zip(panels.flat, names, strict=False):
        for row in pick(rows, problem=name):
            drawn[row["method"]] = _draw(panel, row, longest)
        panel.axhline(tol, color="black", linewidth=0.7, linestyle=":")
        panel.set_title(f"{name}", fontsize=10)
        plain(panel, xscale="log", yscale="log", xlim=(1, longest), ylim=(BOTTOM, TOP))
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for column in panels.T:
        above = [panel for panel in column if panel.get_visible()]
        above[-1].set_xlabel("evaluations of f")
        above[-1].tick_params(labelbottom=True)
    for panel in panels[:, 0]:
        panel.set_ylabel("$\\|f(z) - z\\| / \\|z^*\\|$")
    order = [name for name in STYLE if name in drawn]
    place: Any = {"loc": "outside upper center", "ncols": len(order) if columns > 2 else 3}
    figure.legend([drawn[name] for name in order], order, frameon=False, **place)
    save(figure, path, dpi=110)


def _draw(panel: Any, row: Row, longest: int) -> Any:
    """A line, cut where it leaves the panel or is no number."""
    every = row.get("every", 1)
    points = [(every * (i + 1), y) for i, y in enumerate(row["history"])]
    finite = lambda y: y is not None and math.isfinite(y) and y <= 10 * TOP
    keep = [(x, max(y, BOTTOM)) for x, y in points if finite(y) and x <= longest]
    first = next((i for i, (_, y) in enumerate(keep) if y <= BOTTOM), len(keep) - 1)
    xs, ys = zip(*keep[: first + 1], strict=True) if keep else ((), ())
    whole = {"clip_on": every == 1}  # a dot on the edge is one step that solves the problem
    line = panel.plot(xs, ys, **STYLE[row["method"]], **whole)[0]
    line.set_in_layout(False)  # without points and unclipped, it would claim the whole figure
    return line


ADJOINTS: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": line, "marker": marker, "markersize": 5}
    for line, marker in (("-", "o"), ("--", "s"))
    for color in (BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY)
)


def plot_gradients(rows: list[Row], path: Path) -> None:
    """Gradient error against rho on the linear family; a cross at the top is a NaN."""
    rhos, top = sorted(values(rows, "rho")), 10.0
    figure, panel = plt.subplots(figsize=(9.5, 5.6))
    for method, style in zip(values(rows, "method"), ADJOINTS * 2, strict=False):
        found = {row["rho"]: row["error"] for row in pick(rows, method=method)}
        good = {r: e for r, e in found.items() if e is not None and math.isfinite(e)}
        x = [1 / (1 - r) for r in sorted(good)]
        # The two phantom gradients lie on each other: the one below is the broader.
        width = 5 if method == "Phantom" else 1.6
        y = [max(good[r], 1e-8) for r in sorted(good)]
        panel.plot(x, y, label=method, linewidth=width, **style)
        lost = [1 / (1 - r) for r in found if r not in good]
        panel.scatter(lost, [top] * len(lost), marker="x", color=style["color"], clip_on=False)
    bound = [10 * 1.2e-6 / (1 - r) for r in rhos]
    panel.plot([1 / (1 - r) for r in rhos], bound, "k:", label="10 tol / (1 - rho)")
    plain(panel, xscale="log", yscale="log", ylim=(1e-8, top))
    ticks(panel, [1 / (1 - r) for r in rhos], [f"{r:g}" for r in rhos])
    panel.set(xlabel="rho(J), evenly in log(1 - rho)", ylabel="relative gradient error")
    panel.set_title("Error of the gradient on z = A z + b (× at the top: NaN)", fontsize=11)
    panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    save(figure, path)

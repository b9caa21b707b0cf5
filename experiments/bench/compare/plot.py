"""Plots of both comparisons."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt

# Colours that the colour-blind tell apart too (Okabe and Ito's).
STYLE: dict[str, dict[str, Any]] = {
    "Picard": {"color": "#555555", "linewidth": 2.6},
    "damped Picard": {"color": "#bbbbbb", "linewidth": 2},
    "Anderson": {"color": "#0072b2", "linewidth": 2.2},
    "Broyden": {"color": "#009e73", "linewidth": 2.2},
    "Newton": {"color": "#cc79a7", "linewidth": 1.2, "marker": "o", "markersize": 3.5},
    "jaxopt Picard": {"color": "#e69f00", "linewidth": 1.3, "linestyle": "--"},
    "jaxopt Anderson": {"color": "#d55e00", "linewidth": 1.5, "linestyle": "--"},
}
BOTTOM, TOP = 1e-12, 1e2


def plot_residuals(rows: list[dict[str, Any]], tol: float, path: Path) -> None:
    """Residual against evaluations, one panel a problem."""
    names = list(dict.fromkeys(row["problem"] for row in rows))
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (4.2 * columns, 1 + 2.8 * lines)
    figure, panels = plt.subplots(
        lines,
        columns,
        figsize=size,
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    longest = max(len(row["history"]) for row in rows)
    drawn: dict[str, Any] = {}
    for panel, name in zip(panels.flat, names, strict=False):
        for row in rows:
            if row["problem"] == name:
                drawn[row["method"]] = _draw(panel, row, longest)
        panel.axhline(tol, color="black", linewidth=0.7, linestyle=":")
        panel.set_title(f"{name}", fontsize=10)
        panel.set(xscale="log", yscale="log", xlim=(1, longest), ylim=(BOTTOM, TOP))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels.flat[len(names) :]:
        panel.set_visible(False)
    for column in range(columns):
        above = [p for p in panels[:, column] if p.get_visible()]
        above[-1].set_xlabel("evaluations of f")
        above[-1].tick_params(labelbottom=True)
    for row in panels:
        row[0].set_ylabel("$\\|f(z) - z\\| / \\|z^*\\|$")
    order = [name for name in STYLE if name in drawn]
    figure.legend(
        [drawn[name] for name in order],
        order,
        loc="outside upper center",
        ncols=len(order) if columns > 2 else 3,
        frameon=False,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(panel: Any, row: dict[str, Any], longest: int) -> Any:
    """A line, cut where it leaves the panel or is no number."""
    every = row.get("every", 1)
    keep = [
        (every * (i + 1), max(y, BOTTOM))
        for i, y in enumerate(row["history"])
        if y is not None and math.isfinite(y) and y <= 10 * TOP
    ]
    keep = [(x, y) for x, y in keep if x <= longest]
    first = next((i for i, (_, y) in enumerate(keep) if y <= BOTTOM), len(keep) - 1)
    xs, ys = zip(*keep[: first + 1], strict=True) if keep else ((), ())
    whole = {"clip_on": every == 1}  # a dot on the edge is one step that solves the problem
    line = panel.plot(xs, ys, **STYLE[row["method"]], **whole)[0]
    line.set_in_layout(False)  # without points and unclipped, it would claim the whole figure
    return line


ADJOINTS: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": line, "marker": marker, "markersize": 5}
    for line, marker in (("-", "o"), ("--", "s"))
    for color in ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
)


def plot_gradients(rows: list[dict[str, Any]], path: Path) -> None:
    """Gradient error against rho on the linear family; a cross at the top is a NaN."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rhos = sorted({row["rho"] for row in rows})
    figure, panel = plt.subplots(figsize=(9.5, 5.6))
    top = 10.0
    for method, style in zip(methods, ADJOINTS * 2, strict=False):
        found = {row["rho"]: row["error"] for row in rows if row["method"] == method}
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
    panel.set(xscale="log", yscale="log", ylim=(1e-8, top))
    panel.set_xticks([1 / (1 - r) for r in rhos], [f"{r:g}" for r in rhos])
    panel.minorticks_off()
    panel.set_xlabel("rho(J), evenly in log(1 - rho)")
    panel.set_ylabel("relative gradient error")
    panel.set_title("Error of the gradient on z = A z + b (× at the top: NaN)", fontsize=11)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The plot of certificates: how tight they are."""

import math
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D

from bench.plotting import BLUE, GREEN, ORANGE, PINK, RED, plain, plt, save
from bench.rows import Row, pick

COLORS = {
    "tanh": BLUE,
    "relu6": RED,
    "sigmoid": GREEN,
    "soft_sign": PINK,
    "convolution, tanh": ORANGE,
}
BOTTOM, TOP = 1e-7, 1e3
LEAST = 1e-4  # of 1 - rho that is drawn


def plot_tightness(rows: list[Row], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.4), layout="constrained")
    _errors(left, rows)
    _radii(right, pick(rows, stop="batch"))
    for panel in (left, right):
        plain(panel, xscale="log", yscale="log")
    dot = lambda label, **face: Line2D([], [], marker="o", linestyle="", label=label, **face)
    shown = {k: color for k, color in COLORS.items() if pick(rows, cell=k)}
    handles = [dot(name.replace("_", ""), color=color) for name, color in shown.items()]
    handles.append(dot("float32", color="black"))
    handles.append(dot("float64", color="black", markerfacecolor="white"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    save(figure, path)


def _face(row: Row, marker: str = "o") -> dict[str, Any]:
    color, single = COLORS[row["cell"]], row["dtype"] == "float32"
    return {
        "marker": marker,
        "markersize": 4.5 if single else 7,
        "markerfacecolor": color if single else "none",
        "markeredgecolor": color,
        "markeredgewidth": 1.1,
        "linestyle": "",
        "color": color,
    }


def _errors(panel: Any, rows: list[Row]) -> None:
    """Certified error against the true one; a bound that is infinite is a triangle on top."""
    lost = False
    for row in rows:
        if row["true"] == 0:  # z* to the last bit has no place on this axis
            continue
        bound = row["bound"]
        finite = bound is not None and math.isfinite(bound) and bound < TOP
        face = _face(row, "o" if finite else "^")
        panel.plot(row["true"], bound if finite else TOP, clip_on=finite, **face)
        lost = lost or not finite
    ends = (BOTTOM, 1e1)
    panel.plot(ends, ends, color="black", linewidth=0.9)
    panel.plot(ends, [1.5 * x for x in ends], color="black", linewidth=0.9, linestyle=":")
    panel.text(0.35, 0.2, "bound = error", fontsize=9, ha="left", va="top")
    panel.text(0.6, 1.4, "1.5 times it", fontsize=9, ha="right", va="bottom")
    panel.set(xlim=ends, ylim=(5e-8, TOP))
    panel.set(xlabel="true relative error, largest of a batch", ylabel="certified relative error")
    more = f"; triangles: above {TOP:g}, or infinite" if lost else ""
    panel.set_title(f"Error after Picard to a step of 1e-4{more}", fontsize=10)


def _radii(panel: Any, rows: list[Row]) -> None:
    """`1 - rho(J)` as a bar from the upper to the lower bound of the radius, at the true value."""
    outside = False
    for row in rows:
        high, low = (1 - row[k] for k in ("high", "low"))
        at = (1 - row["radius"]) * (1.03 if row["dtype"] == "float64" else 0.97)
        shown = high > LEAST
        panel.plot([at] * 2, [max(high, LEAST), low], **_face(row, "") | {"linestyle": "-"})
        panel.plot([at], [low], **_face(row, "_"))
        panel.plot(
            [at], [high if shown else LEAST], clip_on=shown, **_face(row, "_" if shown else "v")
        )
        outside = outside or not shown
    ends = (6e-4, 1.15)
    panel.plot(ends, ends, color="black", linewidth=0.9)
    panel.set(xlim=ends, ylim=(LEAST, 1.3))
    panel.set(xlabel="true 1 - rho(J)", ylabel="1 - bracket of rho(J)")
    more = "; triangles: rho(J) < 1 is not shown" if outside else ""
    panel.set_title(f"Bracket of the spectral radius{more}", fontsize=10)

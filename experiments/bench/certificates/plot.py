"""The plot of certificates: how tight they are."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

# Okabe and Ito's, which the colour-blind tell apart too.
COLORS = {
    "tanh": "#0072b2",
    "relu6": "#d55e00",
    "sigmoid": "#009e73",
    "soft_sign": "#cc79a7",
    "convolution, tanh": "#e69f00",
}
BOTTOM, TOP = 1e-7, 1e3
LEAST = 1e-4  # of 1 - rho that is drawn


def plot_tightness(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.4), layout="constrained")
    _errors(left, rows)
    _radii(right, [row for row in rows if row["stop"] == "batch"])
    for panel in (left, right):
        panel.set(xscale="log", yscale="log")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=name.replace("_", ""))
        for name, color in COLORS.items()
        if any(row["cell"] == name for row in rows)
    ]
    dots: dict[str, Any] = {"marker": "o", "linestyle": "", "color": "black"}
    handles.append(Line2D([], [], label="float32", **dots))
    handles.append(Line2D([], [], label="float64", markerfacecolor="white", **dots))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _face(row: dict[str, Any]) -> dict[str, Any]:
    color = COLORS[row["cell"]]
    single = row["dtype"] == "float32"
    return {
        "marker": "o",
        "markersize": 4.5 if single else 7,
        "markerfacecolor": color if single else "none",
        "markeredgecolor": color,
        "markeredgewidth": 1.1,
        "linestyle": "",
        "color": color,
    }


def _errors(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Certified error against the true one; a bound that is infinite is a triangle on top."""
    lost = False
    for row in rows:
        if row["true"] == 0:  # z* to the last bit has no place on this axis
            continue
        bound = row["bound"]
        finite = bound is not None and math.isfinite(bound) and bound < TOP
        style = _face(row) | ({} if finite else {"marker": "^"})
        panel.plot(row["true"], bound if finite else TOP, clip_on=finite, **style)
        lost = lost or not finite
    ends = (BOTTOM, 1e1)
    panel.plot(ends, ends, color="black", linewidth=0.9)
    panel.plot(ends, [1.5 * x for x in ends], color="black", linewidth=0.9, linestyle=":")
    panel.text(0.35, 0.2, "bound = error", fontsize=9, ha="left", va="top")
    panel.text(0.6, 1.4, "1.5 times it", fontsize=9, ha="right", va="bottom")
    panel.set(xlim=ends, ylim=(5e-8, TOP))
    panel.set_xlabel("true relative error, largest of a batch")
    panel.set_ylabel("certified relative error")
    more = f"; triangles: above {TOP:g}, or infinite" if lost else ""
    panel.set_title(f"Error after Picard to a step of 1e-4{more}", fontsize=10)


def _radii(panel: Any, rows: list[dict[str, Any]]) -> None:
    """`1 - rho(J)` as a bar from the upper to the lower bound of the radius, at the true value."""
    outside = False
    for row in rows:
        true, (high, low) = 1 - row["radius"], (1 - row[k] for k in ("high", "low"))
        style = _face(row) | {"linestyle": "-"}
        wide = row["dtype"] == "float64"
        shift = 1.03 if wide else 0.97
        panel.plot([true * shift] * 2, [max(high, LEAST), low], **style | {"marker": ""})
        panel.plot([true * shift], [low], **style | {"marker": "_"})
        if high > LEAST:
            panel.plot([true * shift], [high], **style | {"marker": "_"})
        else:
            panel.plot([true * shift], [LEAST], **style | {"marker": "v"}, clip_on=False)
            outside = True
    ends = (6e-4, 1.15)
    panel.plot(ends, ends, color="black", linewidth=0.9)
    panel.set(xlim=ends, ylim=(LEAST, 1.3))
    panel.set_xlabel("true 1 - rho(J)")
    panel.set_ylabel("1 - bracket of rho(J)")
    more = "; triangles: rho(J) < 1 is not shown" if outside else ""
    panel.set_title(f"Bracket of the spectral radius{more}", fontsize=10)

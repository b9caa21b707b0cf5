"""Gradient error against depth, one panel for each 1 - beta."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.fidelity.report import fraction
from bench.plotting import STYLE, plain, plt, save, ticks
from bench.rows import Row, pick, values, worst
from bench.ways import PER_CHANNEL

LABELS: dict[str, str] = {
    "exact": "exact reversal",
    "isolated": "exact, f isolated",
    "float": "float reversal",
    "float64 state": "float reversal,\nfloat64 state",
    "segmented": "segmented reversal",
    "checkpointed": "checkpointed autodiff",
    "implicit": "implicit",
    "phantom": "phantom",
}
BOTTOM, TOP = 1e-8, 1e2


def plot_errors(rows: list[Row], dtype: str, path: Path) -> None:
    """Draws `rows` of `errors`: the worst cell of each number of evaluations."""
    rows = pick(rows, dtype=dtype)
    inverses = [d for d in values(rows, "d") if d != PER_CHANNEL]
    depths = sorted(values(rows, "evaluations"))
    columns = min(2, len(inverses))
    lines = -(-len(inverses) // columns)
    height = 1.2 + 3.1 * lines
    grid: Any = {"figsize": (10, height), "sharex": True, "sharey": True, "squeeze": False}
    figure, panels = plt.subplots(lines, columns, **grid)
    figure.subplots_adjust(0.075, 0.5 / height, 0.83, 1 - 0.85 / height, 0.05, 0.16)
    for panel, d in zip(panels.flat, inverses, strict=False):
        ends = {m: _draw(panel, pick(rows, d=d, method=m), depths, m) for m in STYLE}
        panel.set_title(f"$1 - \\beta = {fraction(d)}$", fontsize=11)
        plain(panel, xscale="log", yscale="log", ylim=(BOTTOM, TOP))
        ticks(panel, depths, [f"{n:,}" for n in depths])
        if panel in panels[:, -1]:
            _label(panel, ends)
    for panel in panels[-1]:
        panel.set_xlabel("evaluations of the block")
    for panel in panels[:, 0]:
        panel.set_ylabel("relative gradient error")
    title = f"Gradient error against float64 autodiff of the same steps, {dtype}\n"
    figure.suptitle(title, x=0.075, ha="left")
    said = (
        f"the worst of {', '.join(values(rows, 'cell'))}; × at the top edge: not finite, or above "
        f"{TOP:g}; dashed: gradients of the fixed point, not of the steps"
    )
    figure.text(0.075, 1 - 0.52 / height, said, fontsize=9)
    save(figure, path)


def _draw(panel: Any, rows: list[Row], depths: Sequence[int], method: str) -> float:
    """Draws a line and returns where it ends."""
    error = np.array([worst(pick(rows, evaluations=n), "error") for n in depths])
    outside = ~(error < TOP)
    shown = np.clip(np.where(outside, TOP, error), BOTTOM, TOP)
    panel.plot(depths, shown, marker="o", markersize=3.5, clip_on=False, **STYLE[method])
    color = STYLE[method]["color"]
    style = {"color": color, "marker": "x", "s": 55, "linewidth": 2, "clip_on": False, "zorder": 5}
    panel.scatter(np.array(depths)[outside], shown[outside], **style)
    return float(shown[-1])


def _label(panel: Any, ends: dict[str, float]) -> None:
    """Writes each method beside the end of its line, moved apart where they would overlap."""
    position = lambda y: np.log(y / BOTTOM) / np.log(TOP / BOTTOM)
    order = sorted(ends, key=lambda m: (ends[m], list(LABELS).index(m)))
    heights = np.array([position(ends[m]) for m in order])
    gap = 0.088
    for _ in range(200):  # push overlapping neighbours apart until none are left
        for j in range(len(order) - 1):
            overlap = heights[j] + gap - heights[j + 1]
            if overlap > 0:
                heights[j] -= overlap / 2
                heights[j + 1] += overlap / 2
        heights = np.clip(heights, 0.02, 1.02)
    for method, height in zip(order, heights, strict=True):
        color = "#888888" if method == "checkpointed" else STYLE[method]["color"]
        over = {"transform": panel.transAxes, "color": color, "clip_on": False}
        panel.plot([0.985, 1.045], [position(ends[method]), height], linewidth=0.7, **over)
        style = {"fontsize": 9, "va": "center", "linespacing": 0.9}
        panel.text(1.055, height, LABELS[method], **style, **over)

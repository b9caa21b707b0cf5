"""Memory and throughput against depth, one column a block."""

from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, StrMethodFormatter

from bench.plotting import RED, STYLE, plain, plt, save, ticks
from bench.rows import pick, values
from bench.throughput.report import SECTIONS, TITLES, totals

LINES: dict[str, dict[str, Any]] = {
    "exact": STYLE["exact"],
    "checkpointed": {"color": "#888888", "linewidth": 2.4},
    "explicit": {"color": RED, "linewidth": 2.4},
}


def plot_depths(results: dict[str, Any], path: Path) -> None:
    """Temporary memory and tokens or images a second of the solves, in float32."""
    sections = [name for name in SECTIONS if name in results]
    size = (1 + 4.5 * len(sections), 6)
    grid: Any = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, panels = plt.subplots(2, len(sections), **grid)
    for (memory, speed), section in zip(panels.T, sections, strict=True):
        found = results[section]
        rows = pick(totals(found["blocks"]), dtype="float32")
        rows = pick(rows, batch=rows[0]["batch"])
        for variant, style in LINES.items():
            mine = sorted(pick(rows, variant=variant), key=lambda row: row["evaluations"])
            timed = [row for row in mine if row["seconds"] is not None]
            style = {"marker": "o", "markersize": 4, "label": TITLES[variant], **style}
            rate = [row["units"] / row["seconds"] for row in timed]
            memory.plot(_depths(mine), [row["bytes"] / 2**20 for row in mine], **style)
            speed.plot(_depths(timed), rate, **style)
        title = f"{section}, batch {rows[0]['batch']}, float32\n{found['size']}"
        memory.set_title(title, fontsize=9)
        plain(memory, ylabel="temporary memory, MiB", xscale="log")
        plain(speed, ylabel=f"{found['unit']} a second", xscale="log", yscale="log")
        speed.set(xlabel="evaluations of the block")
        speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        memory.set_ylim(0, None)
        depths = sorted(values(rows, "evaluations"))
        for panel in (memory, speed):
            ticks(panel, depths, list(map(str, depths)))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    save(figure, path)


def _depths(rows: list[dict[str, Any]]) -> list[int]:
    return [row["evaluations"] for row in rows]

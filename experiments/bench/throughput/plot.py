"""Memory and throughput against depth, one column a block."""

from pathlib import Path
from typing import Any

import matplotlib

from bench.report import pick
from bench.style import STYLE
from bench.throughput.report import SECTIONS, TITLES, totals

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, StrMethodFormatter

LINES: dict[str, dict[str, Any]] = {
    "exact": STYLE["exact"],
    "checkpointed": {"color": "#888888", "linewidth": 2.4},
    "explicit": {"color": "#d55e00", "linewidth": 2.4},
}


def plot_depths(results: dict[str, Any], path: Path) -> None:
    """Temporary memory and tokens or images a second of the solves, in float32."""
    sections = [name for name in SECTIONS if name in results]
    figure, panels = plt.subplots(
        2, len(sections), figsize=(1 + 4.5 * len(sections), 6), squeeze=False, layout="constrained"
    )
    for column, section in enumerate(sections):
        found = results[section]
        rows = pick(totals(found["blocks"]), dtype="float32")
        rows = pick(rows, batch=rows[0]["batch"])
        memory, speed = panels[:, column]
        for variant, style in LINES.items():
            mine = sorted(pick(rows, variant=variant), key=lambda row: row["evaluations"])
            depth = [row["evaluations"] for row in mine]
            style = {"marker": "o", "markersize": 4, "label": TITLES[variant], **style}
            memory.plot(depth, [row["bytes"] / 2**20 for row in mine], **style)
            timed = [row for row in mine if row["seconds"] is not None]
            rate = [row["units"] / row["seconds"] for row in timed]
            speed.plot([row["evaluations"] for row in timed], rate, **style)
        memory.set_title(
            f"{section}, batch {rows[0]['batch']}, float32\n{found['size']}", fontsize=9
        )
        memory.set(ylabel="temporary memory, MiB")
        speed.set(ylabel=f"{found['unit']} a second", xlabel="evaluations of the block")
        speed.set_yscale("log")
        speed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        speed.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        memory.set_ylim(0, None)
        depths = sorted({row["evaluations"] for row in rows})
        for panel in (memory, speed):
            panel.set_xscale("log")
            panel.set_xticks(depths, list(map(str, depths)))
            panel.minorticks_off()
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)

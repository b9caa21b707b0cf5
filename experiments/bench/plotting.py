"""The look of every plot, and the colours of the ways of differentiating."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt

# Colours that the colour-blind tell apart too (Okabe and Ito's).
BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY, PALE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#bbbbbb",
)  # fmt: skip
# Where two lines lie on each other the one below is the broader.
STYLE: dict[str, dict[str, Any]] = {
    "checkpointed": {"color": PALE, "linewidth": 7, "solid_capstyle": "round"},
    "float": {"color": RED, "linewidth": 5},
    "float64 state": {"color": ORANGE, "linewidth": 1.8},
    "implicit": {"color": PINK, "linewidth": 1.4, "linestyle": "--"},
    "phantom": {"color": GREY, "linewidth": 1.4, "linestyle": "--"},
    "segmented": {"color": GREEN, "linewidth": 1.8},
    "isolated": {"color": SKY, "linewidth": 4.5},
    "exact": {"color": BLUE, "linewidth": 2.4},
}


def plain(panel: Any, **settings: Any) -> None:
    """Sets what is given; a grid, and no frame on the right and above."""
    panel.set(**settings)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def ticks(axis: Any, at: list[Any], labels: list[str]) -> None:
    """Marks these places alone on a logarithmic x axis."""
    axis.set_xticks(at, labels)
    axis.minorticks_off()


def save(figure: Any, path: Path, dpi: int = 120) -> None:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)

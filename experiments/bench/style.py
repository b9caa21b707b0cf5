"""The look of each way of differentiating in every plot."""

from typing import Any

# Colours that the colour-blind tell apart too (Okabe and Ito's). Where two lines lie on each other
# the one below is the broader.
STYLE: dict[str, dict[str, Any]] = {
    "checkpointed": {"color": "#bbbbbb", "linewidth": 7, "solid_capstyle": "round"},
    "float": {"color": "#d55e00", "linewidth": 5},
    "float64 state": {"color": "#e69f00", "linewidth": 1.8},
    "implicit": {"color": "#cc79a7", "linewidth": 1.4, "linestyle": "--"},
    "phantom": {"color": "#555555", "linewidth": 1.4, "linestyle": "--"},
    "segmented": {"color": "#009e73", "linewidth": 1.8},
    "exact": {"color": "#0072b2", "linewidth": 2.4},
}

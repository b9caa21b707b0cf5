"""The picture of a run, and the one of the whole table."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from bench.plotting import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, plain, plt, save

COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY)
SHOWN = (1, 4, 16, 64)  # evaluations after which a Sudoku is drawn


def quality(result: dict[str, Any]) -> float:
    """From 0 to 1: the best share solved at any number of evaluations, or 1 - error / variance."""
    if result["task"] == "growth":
        return max(0.0, 1 - result["loss"][str(result["evaluations"])])
    return max(result["solved"].values())


def draw_law(results: list[dict[str, Any]], memory: dict[str, list[float]], runs: Path, to: Path):
    """Result against the depth of the gradient; memory against evaluations; strips of examples."""
    figure: Any = plt.figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(4, 3.2, 5))
    _draw_depths(left.subplots(), results)
    _draw_memory(middle.subplots(), memory)
    _draw_strips(right, results, runs)
    save(figure, to, dpi=150)


def _draw_depths(panel: Any, results: list[dict[str, Any]]) -> None:
    cases = dict.fromkeys(r["case"] for r in results)
    for color, case in zip(itertools.cycle(COLORS), cases, strict=False):
        by_depth: dict[int, list[float]] = {}
        for r in results:
            if r["case"] == case and r["equal"] == "steps":
                by_depth.setdefault(r["last"] or r["evaluations"], []).append(quality(r))
        depths = sorted(by_depth)
        values = [by_depth[depth] for depth in depths]
        mean = np.array([np.mean(v) for v in values])
        ends = np.array([[min(v), max(v)] for v in values]).T
        panel.plot(depths, mean, ".-", color=color, label=case)
        panel.fill_between(depths, *ends, color=color, alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(xlabel="last K evaluations that the gradient goes through", ylim=(-0.03, 1.03))
    panel.set_ylabel("most solved at any depth; of growth, 1 - error / variance")
    plain(panel)
    panel.legend(fontsize="small")


def _draw_memory(panel: Any, memory: dict[str, list[float]]) -> None:
    styles = (("stored", RED), ("checkpointed", GREY), ("exact", BLUE))
    for name, color in (*styles, ("exact, no guard", SKY)):
        panel.loglog(memory["evaluations"], memory[name], ".-", color=color, label=name)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set(xlabel="evaluations, gradient through all", ylabel="temporary memory, MiB")
    plain(panel)
    panel.legend(fontsize="small")


def _draw_strips(figure: Any, results: list[dict[str, Any]], runs: Path) -> None:
    by_steps = [r for r in results if r["equal"] == "steps" and r["seed"] == 0]
    growth = [r for r in by_steps if r["task"] == "growth"]
    largest = max((r["size"] for r in growth), default=0)
    growth = [r for r in growth if r["size"] == largest]
    full, short = ([r for r in growth if r["last"] == depth] for depth in (0, 4))
    sudoku = [r for r in by_steps if r["task"].startswith("sudoku") and r["last"] == 0][:1]
    rows = [(r, draw_growth) for r in full + short] + [(r, draw_sudoku) for r in sudoku]
    if not rows:
        return
    for part, (result, draw) in zip(figure.subfigures(len(rows), 1), rows, strict=True):
        with np.load(runs / result["folder"] / "frames.npz") as frames:
            draw(part, frames, result)


def draw_growth(figure: Any, frames: Any, result: dict[str, Any], digit: int = 3) -> None:
    n, at = result["evaluations"], list(frames["evaluations"])
    shown = [k for k in (0, 4, 8, 16, 24, 32, 48) if k in at and k <= n]
    panels = figure.subplots(1, len(shown) + 1)
    for panel, k in zip(panels, shown, strict=False):
        _image(panel, frames["frames"][at.index(k), digit], str(k))
    _image(panels[-1], frames["wanted"][digit], "wanted")
    figure.supylabel(result["gradient"], fontsize=8)


def draw_sudoku(figure: Any, frames: Any, result: dict[str, Any], example: int = 0) -> None:
    at = list(frames["evaluations"])
    shown = [k for k in SHOWN if k in at]
    panels = figure.subplots(1, len(shown) + 1)
    given, wanted = frames["given"][example], frames["wanted"][example]
    side = round(len(given) ** 0.5)
    for panel, k in zip(panels[1:], shown, strict=True):
        label, sure = frames["frames"][at.index(k), example].T
        right = label == wanted
        _board(panel, side, given, label, sure, right, str(k))
    _board(panels[0], side, given, 0 * given, 0 * given, given > 0, "given")
    figure.supylabel(result["gradient"], fontsize=8)


def _board(panel: Any, side: int, given, digits, sure, right, title: str) -> None:
    """Given digits in black; found ones blue, wrong ones red, the paler the less sure."""
    panel.set(xlim=(0, side), ylim=(side, 0), xticks=[], yticks=[], aspect="equal")
    panel.set_title(title, fontsize=7, pad=2)
    rows = {4: 2, 6: 2, 9: 3}[side]
    for i in range(side + 1):
        panel.axhline(i, color="black", linewidth=0.8 if i % rows == 0 else 0.2)
        panel.axvline(i, color="black", linewidth=0.8 if i % (side // rows) == 0 else 0.2)
    for i, digit in enumerate(given):
        number = int(digit or digits[i])
        if number:
            color = "black" if digit else BLUE if right[i] else RED
            alpha = 1.0 if digit else 0.25 + 0.75 * float(sure[i])
            r, c = divmod(i, side)
            panel.text(c + 0.5, r + 0.55, str(number), color=color, alpha=alpha, fontsize=6,
                       ha="center", va="center")  # fmt: skip


def _image(panel: Any, image: np.ndarray, title: str) -> None:
    panel.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    panel.set_title(title, fontsize=7, pad=2)


def draw_runs(results: list[dict[str, Any]], runs: Path, to: Path) -> None:
    """Draws solved against evaluations for several gradients, and one example each."""
    figure: Any = plt.figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    panel = left.subplots()
    growth = results[0]["task"] == "growth"
    for color, r in zip(itertools.cycle(COLORS), results, strict=False):
        values = r["loss"] if growth else r["solved"]
        at = [int(k) for k in values if int(k)]
        panel.plot(at, [values[str(k)] for k in at], ".-", color=color, label=r["gradient"])
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(xlabel="evaluations", ylabel="error / variance" if growth else "solved")
    plain(panel)
    panel.legend(title="gradient through", fontsize="small")
    drawn = growth or results[0]["task"].startswith("sudoku")
    draw = draw_growth if growth else draw_sudoku
    parts = right.subfigures(len(results), 1) if len(results) > 1 else [right]
    for part, r in zip(parts if drawn else (), results, strict=False):
        with np.load(runs / r["folder"] / "frames.npz") as frames:
            draw(part, frames, r)
    save(figure, to, dpi=150)

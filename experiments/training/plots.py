"""The plots of a run's folder, drawn from its metrics."""

from typing import Any

import matplotlib
import numpy as np

from training.run import RunFolder

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def plot_curves(
    folder: RunFolder, title: str, test_name: str, loss: str = "cross-entropy, nats"
) -> None:
    """Loss, and accuracy where there is one, of every step and evaluation, against the step."""
    lines = folder.metrics()
    train = [line for line in lines if "loss" in line]
    test = [line for line in lines if "eval_loss" in line]
    if not train:  # of a run whose metrics were lost
        return
    names = ("loss", "accuracy") if any("accuracy" in line for line in train) else ("loss",)
    size = (4.5 * len(names), 3.6)
    figure, panels = plt.subplots(1, len(names), figsize=size, layout="constrained", squeeze=False)
    panels = panels[0]
    for panel, name in zip(panels, names, strict=True):
        values = np.array([line[name] for line in train])
        steps = np.array([line["step"] for line in train])
        width = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(width) / width, "valid")
        panel.plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        panel.plot(steps[width - 1 :], smooth, color="C0", label=f"training, mean of {width}")
        x = [line["step"] for line in test]
        panel.plot(x, [line[f"eval_{name}"] for line in test], "C1.-", label=test_name)
        panel.set(xlabel="step", ylabel=name)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.legend()
    panels[0].set_yscale("log")
    panels[0].set_ylabel(f"loss ({loss})")
    figure.suptitle(title)
    _save(folder, figure, "curves.png")


def plot_residual(
    folder: RunFolder, title: str, residuals: list[np.ndarray], depths: list[float]
) -> None:
    """`residuals[i]`: (steps, examples) of solve i; `depths[i]`: the mean steps it takes."""
    figure, panel = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, (residual, depth) in enumerate(zip(residuals, depths, strict=True)):
        steps = np.arange(len(residual))
        # A residual of exactly 0, which a logarithm cannot show, is drawn at the rounding unit.
        residual = np.maximum(residual, np.finfo(np.float32).eps / 2)
        color = f"C{i}"
        panel.fill_between(
            steps, residual.min(1), residual.max(1), color=color, alpha=0.2, linewidth=0
        )
        name = "residual" if len(residuals) == 1 else f"solve {i + 1}"
        label = f"{name}: median, and range over {residual.shape[1]} examples"
        panel.plot(steps, np.median(residual, 1), color=color, marker=".", label=label)
        panel.axvline(
            depth, color=color, linestyle=":", label=f"{depth:.1f} steps taken by the model"
        )
    panel.set_yscale("log")
    panel.set(xlabel="solver step $k$", ylabel=r"$\|f(z_k) - z_k\|\;/\;\|f(z_k)\|$")
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.set_title(title)
    panel.legend(fontsize="small")
    _save(folder, figure, "residual.png")


def plot_certificates(folder: RunFolder, title: str, tolerance: float) -> None:
    """Bracket of rho, certified error and evaluations of each solve, against the epoch."""
    lines = [line for line in folder.metrics() if "certified_error" in line]
    if not lines:  # stopped before the end of the first epoch
        return
    epochs = [line["epoch"] for line in lines]
    # (lines, solves, 2), (lines, solves, 2) and (lines, solves); null, infinity, is not drawn.
    read = lambda name: np.array([line[name] for line in lines], float)
    radius, error, count = map(read, ("spectral_radius", "certified_error", "solve_evaluations"))
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    solves = range(count.shape[1])
    for i in solves:
        color = f"C{i}"
        panels[0].fill_between(epochs, *radius[:, i].T, color=color, alpha=0.1, linewidth=0)
        for panel, (dashed, solid) in ((panels[0], radius[:, i].T), (panels[1], error[:, i].T)):
            panel.plot(epochs, dashed, color=color, linestyle="--")
            panel.plot(epochs, solid, color=color, marker=".")
        label = "solve" if len(solves) == 1 else f"solve {i + 1}"
        panels[2].plot(epochs, count[:, i], color=color, marker=".", label=label)
    # Colours are told in the last panel, line styles in the others.
    for panel, names in ((panels[0], ("lower", "upper")), (panels[1], ("median", "largest"))):
        panel.plot([], [], color="black", linestyle="--", label=names[0])
        panel.plot([], [], color="black", marker=".", label=names[1])
    panels[1].axhline(tolerance, color="gray", linestyle=":", label="tolerance of the solves")
    # Whole decades: with less there is at most one number at the axis.
    logs = np.log10([tolerance, *error[np.isfinite(error) & (error > 0)]])
    low, high = 10.0 ** np.floor(logs.min()), 10.0 ** np.ceil(logs.max())
    panels[1].set(yscale="log", ylim=(low / 1.5, high * 1.5))
    panels[0].set(ylabel=r"bounds of the largest $\rho(J)$")
    panels[1].set(ylabel=r"bound of $\max_i |z_i - z^*_i| / z^*_i$")
    panels[2].set(ylabel="evaluations of f, mean")
    panels[2].set_ylim(0, 1.3 * count.max())  # room for the legend
    for panel in panels:
        panel.set_xlabel("epoch")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.legend(fontsize="small")
    figure.suptitle(f"{title}: one batch of examples that are not trained on")
    _save(folder, figure, "certificates.png")


def _save(folder: RunFolder, figure: Any, name: str) -> None:
    with folder.writing(name):
        figure.savefig(folder.path / name, dpi=120)
    plt.close(figure)

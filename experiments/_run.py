"""The folder a run leaves: configuration, versions, metrics, checkpoints, plots."""

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

matplotlib.use("Agg")  # files only: a machine without a screen has no other backend
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


class RunFolder:
    """`runs/<name>/`: config.json, metrics.jsonl, checkpoints/ and the plots.

    A run never writes into an older one's folder: a name that is taken becomes `<name>-2`, and so
    on. With `resume` it goes on in the folder of exactly that name, where the configuration has
    to be the recorded one.
    """

    def __init__(self, root: Path, name: str, config: Mapping[str, Any], *, resume: bool):
        self.path = root / name
        self.config = json.loads(json.dumps(dict(config)))  # tuples become lists, as on disk
        again = 2
        while self.path.exists() and not resume:
            self.path = root / f"{name}-{again}"
            again += 1
        self.path.mkdir(parents=True, exist_ok=True)
        record = self.path / "config.json"
        if record.exists():
            self._check(json.loads(record.read_text())["config"])
        else:
            content = {"config": self.config, "seed": config["seed"], "versions": _versions()}
            _replace(record, json.dumps(content, indent=2) + "\n")
        # Synchronous: the bytes are down before the step function donates the buffers they came
        # from. Orbax writes beside and renames, so a killed run leaves whole checkpoints only.
        self._checkpoints = ocp.CheckpointManager(
            (self.path / "checkpoints").resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
        )
        self._metrics = self._open()

    def _check(self, recorded: Mapping[str, Any]) -> None:
        for key in sorted(recorded.keys() | self.config.keys()):
            before, now = recorded.get(key), self.config.get(key)
            if before != now:
                raise SystemExit(
                    f"--resume expected the configuration recorded in {self.path / 'config.json'}"
                    f": {key} was {before!r} and is now {now!r}. Pass the recorded value, or start "
                    "a new run without --resume."
                )

    def log(self, line: Mapping[str, Any]) -> None:
        # JSON has neither NaN nor infinity.
        null = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
        self._metrics.write(json.dumps(jax.tree.map(null, dict(line))) + "\n")

    def _open(self):
        # A line is on disk as soon as it is logged, whatever ends the run.
        return open(self.path / "metrics.jsonl", "a", buffering=1, encoding="utf-8")

    def save(self, step: int, state: PyTree) -> None:
        """Keep the state after `step` steps."""
        if step not in self._checkpoints.all_steps():
            self._checkpoints.save(step, args=ocp.args.StandardSave(_named(state)))

    def restore(self, like: PyTree) -> PyTree:
        """Return the last checkpoint in the structure and sharding of `like`, or `like` itself."""
        step = self._checkpoints.latest_step() or 0
        # Lines of steps that the checkpoint does not know will be written again.
        lines = [line for line in self.metrics() if line["step"] <= step]
        self._metrics.close()
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self._metrics = self._open()
        if step == 0:
            return like
        leaves = self._checkpoints.restore(step, args=ocp.args.StandardRestore(_named(like)))
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _named(like)])

    def metrics(self) -> list[dict[str, Any]]:
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        # A killed run may leave half a line, the last one: only whole lines count.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def close(self) -> None:
        self._metrics.close()
        self._checkpoints.close()

    def plot_curves(self, title: str, test_name: str) -> None:
        """Loss and accuracy of every step and of every evaluation, against the step."""
        lines = self.metrics()
        train = [line for line in lines if "accuracy" in line]
        test = [line for line in lines if "eval_accuracy" in line]
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for panel, name in zip(panels, ("loss", "accuracy"), strict=True):
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
        if train:
            panels[0].set_yscale("log")
        panels[0].set_ylabel("loss (cross-entropy, nats)")
        figure.suptitle(title)
        self._save(figure, "curves.png")

    def plot_residual(self, title: str, residuals: list[np.ndarray], depths: list[float]) -> None:
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
        self._save(figure, "residual.png")

    def plot_certificates(self, title: str, tolerance: float) -> None:
        """Bracket of rho, certified error and evaluations of each solve, against the epoch."""
        lines = [line for line in self.metrics() if "certified_error" in line]
        if not lines:  # stopped before the end of the first epoch
            return
        epochs = [line["epoch"] for line in lines]
        # (lines, solves, 2), (lines, solves, 2) and (lines, solves); null, infinity, is not drawn.
        read = lambda name: np.array([line[name] for line in lines], float)
        radius, error, count = map(
            read, ("spectral_radius", "certified_error", "solve_evaluations")
        )
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
        self._save(figure, "certificates.png")

    def _save(self, figure: Any, name: str) -> None:
        figure.savefig(self.path / name, dpi=120)
        plt.close(figure)


def _named(state: PyTree) -> dict[str, Any]:
    """The leaves under the paths they have in the state: a checkpoint that can be read by eye."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)  # atomic: a reader sees the old file or the new one


def _versions() -> dict[str, str]:
    packages = ("jax", "deqjax", "equinox", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }

"""The folder a run leaves: configuration, versions, metrics, checkpoints, TensorBoard's events."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from _devices import agree, everywhere, is_main
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.summary import scalar

# Orbax logs the traceback of each of its threads; the error itself comes to `writing`.
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


class RunFolder:
    """`runs/<name>/`: config.json, metrics.jsonl, checkpoints/, tensorboard/ and the plots.

    A run never writes into an older one's folder: a name that is taken becomes `<name>-2`, and so
    on. With `resume` it goes on in the folder of exactly that name, where the configuration has
    to be the recorded one.

    Of several processes, which share the folder, the main one writes all but the checkpoints. The
    last `keep` of these are kept, and beside them the one of the lowest eval_loss.
    """

    def __init__(
        self, root: Path, name: str, config: Mapping[str, Any], *, resume: bool, keep: int = 2
    ):
        self.path = root / name
        self.config = json.loads(json.dumps(dict(config)))  # tuples become lists, as on disk
        self._events, self._restored, self._saving = None, 0, 0
        again, failure = 1, None
        if is_main():
            try:
                while not (self._claim() or resume):
                    again += 1
                    self.path = root / f"{name}-{again}"
                self._create(config["seed"])
            except SystemExit as error:  # which the other processes have to know of
                again, failure = 0, error
        again = agree(again)
        if again == 0:
            raise failure or SystemExit("Stopped: the main process could not write its folder.")
        self.path = root / (name if again == 1 else f"{name}-{again}")
        if not everywhere(self.path.exists()):
            raise SystemExit(
                f"Expected one {self.path} for all {jax.process_count()} processes, got several. "
                "Start them in a directory that their hosts share."
            )
        # What a step donates is copied before `save` returns; the bytes go to disk beside the
        # training. Orbax writes beside and renames, so a killed run leaves whole checkpoints only.
        eval_loss = lambda metrics: metrics.get("eval_loss", math.inf)
        kept = [LatestN(keep), BestN(n=1, get_metric_fn=eval_loss, reverse=True)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=eval_loss,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._checkpoints = ocp.CheckpointManager(
            (self.path / "checkpoints").resolve(), options=options
        )
        self._lowest = min(map(self._eval_loss, self._checkpoints.all_steps()), default=math.inf)

    def _claim(self) -> bool:
        """Whether the folder is new: of two runs that are started at once, for one of them."""
        with self.writing("the run's folder"):
            try:
                self.path.mkdir(parents=True)
            except FileExistsError:
                return False
        return True

    def _create(self, seed: int) -> None:
        with self.writing("the run's folder"):
            record = self.path / "config.json"
            if record.exists():
                self._check(json.loads(record.read_text())["config"])
            else:
                content = {"config": self.config, "seed": seed, "versions": _versions()}
                _replace(record, json.dumps(content, indent=2) + "\n")
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

    @contextmanager
    def writing(self, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """Say in a sentence what could not be written, and what is left: disk full, no access."""
        try:
            yield
        except errors as error:
            folder = self.path / "checkpoints"
            steps = [int(x.name) for x in folder.glob("*") if x.name.isdigit()]
            left = f"The checkpoint of step {max(steps)} is whole" if steps else "No checkpoint yet"
            raise SystemExit(
                f"Stopped: expected to write {what} in {self.path}, got {type(error).__name__}: "
                f"{error}. {left}. Make room or give access there, then go on with --resume."
            ) from error

    def log(self, *lines: Mapping[str, Any]) -> None:
        """Write lines of metrics; TensorBoard, which draws fewer, gets the last of them."""
        if not self._checkpoints.is_saving_in_progress():
            self.wait()  # for nothing: what went wrong with the last checkpoint is said here
        if not is_main():
            return
        # JSON has neither NaN nor infinity.
        null = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
        text = "".join(json.dumps(jax.tree.map(null, dict(line))) + "\n" for line in lines)
        with self.writing(f"the metrics of step {lines[-1]['step']}"):
            rest = text.encode()
            while rest:  # a disk that fills up takes a part of them and no error
                rest = rest[self._metrics.write(rest) :]
            self._event(lines[-1])

    def _event(self, line: Mapping[str, Any]) -> None:
        """A writer without a thread, in which an error would be lost."""
        if self._events is None:
            (self.path / "tensorboard").mkdir(exist_ok=True)
            self._events = EventsWriter(str(self.path / "tensorboard" / "events"))
            # What an earlier session wrote of steps that are taken again is not to be drawn.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=self._restored + 1, session_log=start))
        for path, value in jax.tree_util.tree_leaves_with_path(dict(line)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if isinstance(value, int | float) and name != "step":
                point = Event(wall_time=time.time(), step=line["step"], summary=scalar(name, value))
                self._events.write_event(point)
        self._events.flush()

    def _open(self):
        # Unbuffered: a line is on disk as soon as it is logged, whatever ends the run.
        return open(self.path / "metrics.jsonl", "ab", buffering=0)

    def _eval_loss(self, step: int) -> float:
        metrics: Any = self._checkpoints.metrics(step)
        return (metrics or {}).get("eval_loss", math.inf)

    def improves(self, eval_loss: float) -> bool:
        """Whether no checkpoint has an eval_loss as low."""
        return eval_loss < self._lowest

    def save(self, step: int, state: PyTree, eval_loss: float | None = None) -> None:
        """Keep the state after `step` steps; returns when the next step may donate its buffers."""
        if step in self._checkpoints.all_steps():
            return
        metrics: dict[str, float] = {}
        if eval_loss is not None and math.isfinite(eval_loss):
            metrics["eval_loss"] = eval_loss
        self.wait()  # so that what goes wrong with the one before is said of that one
        self._saving = step
        state = ocp.args.StandardSave(_named(state))
        with self.writing(f"the checkpoint of step {step}", Exception):
            self._checkpoints.save(step, args=state, metrics=metrics)
        self._lowest = min([self._lowest, *metrics.values()])

    def wait(self) -> None:
        """Return when the last checkpoint is on disk."""
        # Orbax has many kinds of errors for what the system calls one thing.
        with self.writing(f"the checkpoint of step {self._saving}", Exception):
            self._checkpoints.wait_until_finished()

    def restore(self, like: PyTree) -> PyTree:
        """Return the last checkpoint in the structure and sharding of `like`, or `like` itself."""
        step = self._checkpoints.latest_step() or 0
        if is_main():
            # Lines of steps that the checkpoint does not know will be written again.
            lines = [line for line in self.metrics() if line["step"] <= step]
            self._metrics.close()
            text = "".join(json.dumps(line) + "\n" for line in lines)
            with self.writing("metrics.jsonl"):
                _replace(self.path / "metrics.jsonl", text)
                self._metrics = self._open()
        self._restored = step
        return self._load(step, like) if step else like

    def best(self, like: PyTree) -> PyTree:
        """The checkpoint of the lowest eval_loss, as `restore` does; `like` if there is none."""
        self.wait()
        step = self._checkpoints.best_step()
        # Orbax takes one without an eval_loss for the best where there are no others.
        return self._load(step, like) if step and math.isfinite(self._lowest) else like

    def _load(self, step: int, like: PyTree) -> PyTree:
        leaves = self._checkpoints.restore(step, args=ocp.args.StandardRestore(_named(like)))
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _named(like)])

    def metrics(self) -> list[dict[str, Any]]:
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        # A killed run may leave half a line, the last one: only whole lines count.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def close(self) -> None:
        self.wait()
        self._checkpoints.close()
        if is_main():
            self._metrics.close()
            if self._events is not None:
                self._events.close()


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

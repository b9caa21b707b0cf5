"""The folder a run leaves: configuration, versions, metrics, checkpoints, TensorBoard's events."""

import json
import math
import platform
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.summary import scalar

from training.checkpoints import Checkpoints, examine
from training.devices import agree, everywhere, is_main
from training.files import held, parsed, replace, steps_in, writing


class RunFolder:
    """`runs/<name>/`: config.json, metrics.jsonl, checkpoints/, tensorboard/ and the plots.

    A run never writes into an older one's folder: a name that is taken becomes `<name>-2`, and so
    on. With `resume` it goes on in the folder of exactly that name, where the configuration has
    to be the recorded one. One run at a time writes there. A checkpoint that is not as it was
    written goes into damaged/, and the run goes on from the one before.

    Of several processes, which share the folder, the main one writes all but the checkpoints.
    """

    def __init__(
        self, root: Path, name: str, config: Mapping[str, Any], *, resume: bool, keep: int = 2
    ):
        self.path = root / name
        self.config = json.loads(json.dumps(dict(config)))  # tuples become lists, as on disk
        self._restored, aside = 0, 0
        self._events = self._lock = None  # of the main process, as the file of metrics
        self._metrics: Any = None
        again, failure = 1, None
        if is_main():
            try:
                while not (self._claim() or resume):
                    again += 1
                    self.path = root / f"{name}-{again}"
                aside = self._create(config["seed"])
            except SystemExit as error:  # which the other processes have to know of
                again, failure = 0, error
        again = agree(again)
        if again == 0:
            self._release()
            raise failure or SystemExit("Stopped: the main process could not write its folder.")
        self.path = root / (name if again == 1 else f"{name}-{again}")
        if not everywhere(self.path.exists()):
            raise SystemExit(
                f"Expected one {self.path} for all {jax.process_count()} processes, got several. "
                "Start them in a directory that their hosts share."
            )
        self._checkpoints = Checkpoints(self.path, keep, aside)
        self.improves, self.save = self._checkpoints.improves, self._checkpoints.save
        self.wait, self.best = self._checkpoints.wait, self._checkpoints.best

    def _claim(self) -> bool:
        """Tells whether the folder is new: to one of two runs that are started at once."""
        with self.writing("the run's folder"):
            try:
                self.path.mkdir(parents=True)
            except FileExistsError:
                return False
        return True

    def _create(self, seed: int) -> int:
        """Locks and checks what is there, writes the rest, counts the damaged checkpoints."""
        with self.writing("the run's folder"):
            self._lock = held(self.path / "lock")
            if self._lock is None:
                holder = (self.path / "lock").read_text(encoding="utf-8")
                raise SystemExit(
                    f"Expected {self.path} for this run alone, and another one is at work there "
                    f"({holder}). Wait for its end, or start a new run without --resume."
                )
            record = self.path / "config.json"
            if record.exists() or steps_in(self.path):
                self._check(record)
            else:
                content = {"config": self.config, "seed": seed, "versions": _versions()}
                replace(record, json.dumps(content, indent=2) + "\n")
            self._metrics = self._open()
            return examine(self.path)

    def _check(self, record: Path) -> None:
        recorded = (parsed(record.read_bytes()) or {}).get("config") if record.exists() else None
        if not isinstance(recorded, dict):
            raise SystemExit(
                f"--resume expected the configuration of the run in {record}, got a file that is "
                f"{'damaged' if record.exists() else 'missing'}: whether this is the same run "
                "cannot be told. Put it back, or start a new run without --resume."
            )
        for key in sorted(recorded.keys() | self.config.keys()):
            before, now = recorded.get(key), self.config.get(key)
            if before != now:
                raise SystemExit(
                    f"--resume expected the configuration recorded in {record}: {key} was "
                    f"{before!r} and is now {now!r}. Pass the recorded value, or start a new run "
                    "without --resume."
                )

    def writing(self, what: str) -> AbstractContextManager[None]:
        return writing(self.path, what)

    def log(self, *lines: Mapping[str, Any]) -> None:
        """Writes lines of metrics; TensorBoard, which draws fewer, gets the last of them."""
        self._checkpoints.watch()
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
            folder = self.path / "tensorboard"
            folder.mkdir(exist_ok=True)
            # Event files are named by the second, and two sessions may begin in one.
            session = len([*folder.iterdir()])
            self._events = EventsWriter(str(folder / f"events.session{session:04}"))
            # TensorBoard then drops the points of an earlier session's steps that are taken again.
            start = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(step=self._restored + 1, session_log=start))
        for path, value in jax.tree_util.tree_leaves_with_path(dict(line)):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if isinstance(value, int | float) and name != "step":
                point = Event(wall_time=time.time(), step=line["step"], summary=scalar(name, value))
                self._events.write_event(point)
        self._events.flush()

    def _open(self) -> Any:
        # Unbuffered: a line is on disk as soon as it is logged, whatever ends the run.
        return open(self.path / "metrics.jsonl", "ab", buffering=0)

    def restore(self, like: PyTree) -> PyTree:
        """Returns the last checkpoint in the structure and sharding of `like`, or `like` itself."""
        self._restored, state = self._checkpoints.newest(like)
        if is_main():
            self._mend_metrics(self._restored)
            if self._checkpoints.aside:
                print(f"{self.path} goes on from step {self._restored}.")
        return state

    def _mend_metrics(self, step: int) -> None:
        """Keeps the lines that can be read, but not of steps that will be taken again."""
        raw = self._raw_metrics()
        lines = [(line, parsed(line)) for line in raw]
        known = lambda x: isinstance(x.get("step"), int) and x["step"] <= step
        kept = [(line, x) for line, x in lines if x is not None and known(x)]
        absent = {*range(1, step + 1)} - {x["step"] for _, x in kept if "loss" in x}
        # Half a line at the end is no fault: a run that is killed may leave it.
        broken = sum(x is None for line, x in lines if line.endswith(b"\n"))
        if absent or broken:
            print(
                f"Expected the metrics of steps 1 to {step} in {self.path / 'metrics.jsonl'}, got "
                f"{broken} lines that cannot be read and none of {len(absent)} steps. The run goes "
                "on without them."
            )
        content = b"".join(line for line, _ in kept)
        if content != b"".join(raw):
            self._metrics.close()
            with self.writing("metrics.jsonl"):
                replace(self.path / "metrics.jsonl", content)
                self._metrics = self._open()

    def _raw_metrics(self) -> list[bytes]:
        return (self.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)

    def metrics(self) -> list[dict[str, Any]]:
        return [line for line in map(parsed, self._raw_metrics()) if line is not None]

    def close(self) -> None:
        self._checkpoints.close()
        self._release()

    def _release(self) -> None:
        for file in (self._metrics, self._events, self._lock):
            if file is not None:
                file.close()


def _versions() -> dict[str, str]:
    packages = ("jax", "deqjax", "equinox", "optax", "orbax-checkpoint", "numpy")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }

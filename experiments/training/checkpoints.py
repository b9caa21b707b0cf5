"""The checkpoints of a run, each with the digests of its files: a damaged one is never read."""

import logging
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from training.devices import agree, everywhere, is_main
from training.files import changed, digests, parsed, replace, steps_in, writing

# Orbax logs the traceback of each of its threads; the error itself comes to `writing`.
logging.getLogger("absl").addFilter(lambda record: not record.exc_info)


def examine(run: Path) -> int:
    """Sets aside what is no checkpoint as it was written, before Orbax meets it; returns how many.

    By the digests of its files, since Orbax reads a flipped bit of an array as another number.
    """
    aside = 0
    for step in steps_in(run):
        folder, record = run / "checkpoints" / step, run / "digests" / step
        if record.exists():
            fault = changed(folder, record)
        else:
            # A killed run or an older version left no record: reading the arrays will show whether
            # they are whole.
            needed = (folder / "_CHECKPOINT_METADATA", folder / "metrics" / "metrics")
            broken = [x for x in needed if not x.is_file() or parsed(x.read_bytes()) is None]
            fault = f"{str(broken[0].relative_to(folder))!r} damaged or missing" if broken else None
        if fault is not None:
            _set_aside(run, step, fault)
            aside += 1
    return aside


def _set_aside(run: Path, step: str, fault: str) -> None:
    to = run / "damaged" / step
    while to.exists():
        to = to.with_name(f"{to.name}-again")
    to.parent.mkdir(exist_ok=True)
    (run / "checkpoints" / step).rename(to)
    (run / "digests" / step).unlink(missing_ok=True)
    print(f"Expected checkpoint {step} of {run} as it was written, got {fault}. It is now {to}.")


class Checkpoints:
    """`checkpoints/` of a run: the last `keep`, and beside them the one of the lowest eval_loss.

    `aside` counts those that were set aside.
    """

    def __init__(self, run: Path, keep: int, aside: int):
        self._run, self._saving, self.aside = run, 0, aside
        # `save` copies donated arrays before it returns, and writes to disk beside the
        # training. Orbax writes beside and renames, so a killed run leaves whole checkpoints only.
        eval_loss = lambda metrics: metrics.get("eval_loss", math.inf)
        kept = [LatestN(keep), BestN(n=1, get_metric_fn=eval_loss, reverse=True)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=eval_loss,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager((run / "checkpoints").resolve(), options=options)
        self._lowest = min(map(self._eval_loss, self._manager.all_steps()), default=math.inf)

    def _eval_loss(self, step: int) -> float:
        metrics: Any = self._manager.metrics(step)
        return (metrics or {}).get("eval_loss", math.inf)

    def improves(self, eval_loss: float) -> bool:
        """Tells whether no checkpoint has an eval_loss as low."""
        return eval_loss < self._lowest

    def save(self, step: int, state: PyTree, eval_loss: float | None = None) -> None:
        """Keeps the state after `step` steps; returns when the next step may donate its buffers."""
        if step in self._manager.all_steps():
            return
        metrics: dict[str, float] = {}
        if eval_loss is not None and math.isfinite(eval_loss):
            metrics["eval_loss"] = eval_loss
        self.wait()  # so that what goes wrong with the one before is said of that one
        self._saving = step
        state = ocp.args.StandardSave(_named(state))
        with writing(self._run, f"the checkpoint of step {step}", Exception):
            self._manager.save(step, args=state, metrics=metrics)
        self._lowest = min([self._lowest, *metrics.values()])

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk, with the digests of its files."""
        # Orbax has many kinds of errors for what the system calls one thing.
        with writing(self._run, f"the checkpoint of step {self._saving}", Exception):
            self._manager.wait_until_finished()
            folder = self._run / "checkpoints" / str(self._saving)
            if is_main() and folder.is_dir():
                records = self._run / "digests"
                records.mkdir(exist_ok=True)
                for old in {x.name for x in records.iterdir()} - {*steps_in(self._run)}:
                    (records / old).unlink()
                replace(records / folder.name, digests(folder))
        self._saving = 0

    def watch(self) -> None:
        """Says what went wrong with a checkpoint that is done by now."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def newest(self, like: PyTree) -> tuple[int, PyTree]:
        """The last one that can be read and its step; `(0, like)` where there never was one."""
        state = like
        while step := self._manager.latest_step() or 0:
            fault = None
            try:
                state = self._load(step, like)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"[:300]
            if everywhere(fault is None):
                break
            if (self._run / "digests" / str(step)).exists():
                raise SystemExit(
                    f"Expected checkpoint {step} of {self._run}, which is as it was written, to "
                    f"fit the network, got {fault}. Go on with the versions that wrote it, which "
                    "are in config.json."
                )
            if is_main():
                _set_aside(self._run, str(step), fault or "a fault in another process")
            self.aside = agree(self.aside + 1)  # once it is out of the way for all of them
            self._manager.reload()
        if agree(int(self.aside > 0 and not step)):
            raise SystemExit(
                f"Stopped: no checkpoint of {self._run} can be read. Copy one back from damaged/, "
                "or pass --resume again, which then begins anew."
            )
        return step, state

    def best(self, like: PyTree) -> PyTree:
        """The one of the lowest eval_loss; `like` if there is none."""
        self.wait()
        step = self._manager.best_step()
        # Orbax takes one without an eval_loss for the best where there are no others.
        return self._load(step, like) if step and math.isfinite(self._lowest) else like

    def _load(self, step: int, like: PyTree) -> PyTree:
        """A checkpoint in the structure and sharding of `like`."""
        leaves = self._manager.restore(step, args=ocp.args.StandardRestore(_named(like)))
        held = int(leaves.get(".step", step))
        if held != step:
            raise ValueError(f"the state of step {held} under the name of step {step}")
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _named(like)])

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _named(state: PyTree) -> dict[str, Any]:
    """The leaves under the paths they have in the state: a checkpoint that can be read by eye."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }

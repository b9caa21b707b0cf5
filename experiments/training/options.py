"""The options of every training script: how long, on which devices, what is kept."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from training.flags import Count, Nonnegative, Positive, Seed, Whole


@dataclasses.dataclass(frozen=True)
class Session:
    """Options that leave what is computed as it is: they may differ when a run is resumed."""

    log_every: Count = 20
    """Steps between readings of the metrics, which make the host wait for the device."""
    checkpoint_every: Count = 500
    """Steps between checkpoints, which a run that is killed loses at most."""
    keep: Count = 2
    """Checkpoints kept, the newest ones; the best one is kept beside them."""
    assess_every: Count | None = None
    """Steps between evaluations; None: an epoch; of text, a quarter of the run if less."""
    stop_after: Count | None = None
    """Steps after which to stop with a checkpoint, for machines lent by the hour."""
    resume: bool = False
    """Goes on from the last checkpoint of the run of this name."""
    name: str | None = None
    """Name of the folder in runs/; None: preset or data set and model, and seed."""
    data_dir: str | None = None
    """Folder of the data; of TensorFlow Datasets, None: TFDS_DATA_DIR, else TFDS's own place."""
    download: bool = False
    """Lets TensorFlow Datasets download and prepare (needs tensorflow)."""
    distributed: bool = False
    """Joins the other processes of the run, on this host or others, with the same command."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX does not find the cluster by itself."""
    processes: Count | None = None
    """Number of processes, with --coordinator."""
    process_id: Whole | None = None
    """Number of this process, from 0, with --coordinator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Options of the optimiser that all scripts have; with other values a run is another run."""

    seed: Seed = 0
    """Seed of parameters, order of the data and augmentation."""
    accumulate: Count = 1
    """Parts of a batch, taken one after another; batch normalisations see one at a time."""
    learning_rate: Positive | None = None
    """Peak of AdamW's."""
    weight_decay: Nonnegative | None = None
    """AdamW's: a step shrinks parameters (of text, matrices) by learning rate x this."""
    clip: Positive = 1.0
    """Ceiling on the gradient's norm; of images, met in the first steps only."""
    smoke: bool = False
    """A tiny network, data set and number of steps: everything is run through, nothing learned."""


RUNS = Path("runs")
C = TypeVar("C", bound=Session)


def filled(config: C, values: dict[str, Any]) -> C:
    """Fills in what was left at None, from `values`."""
    missing = {k: v for k, v in values.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)


def recorded(config: Session) -> dict[str, Any]:
    """The options that have to be the same when a run is resumed: those beside its session."""
    kind = next(c for c in type(config).__mro__[1:] if issubclass(c, Session))
    session = {field.name for field in dataclasses.fields(kind)}
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in session}


def check_names(configs: list[C]) -> None:
    """Refuses to resume what was never begun, and a name that no folder in runs/ can have."""
    names = [str(c.name) for c in configs]
    for name in names:
        inside = name not in ("", ".", "..") and Path(name).name == name
        # File systems allow 255 bytes; some are left for the -2 of a name that is taken.
        if not (inside and name.isprintable() and len(name.encode()) <= 240):
            raise SystemExit(
                f"Expected a --name that is that of a folder, at most 240 bytes on one line, got "
                f"{name!r}. Choose another, or leave it out."
            )
    if configs[0].resume and not any((RUNS / name).exists() for name in names):
        raise SystemExit(
            f"--resume expected a run in one of {[f'{RUNS}/{name}' for name in names]}, and there "
            "is none. Check --name, or start without --resume."
        )

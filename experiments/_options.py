"""The options of every training script: how long, on which devices, what is kept."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Session:
    """Options that don't change what is computed: they may differ when a run is resumed."""

    log_every: int = 20
    """Steps between readings of the metrics, which make the host wait for the device."""
    checkpoint_every: int = 500
    """Steps: at most a few minutes of work to lose."""
    keep: int = 2
    """Checkpoints kept, the newest ones; the best one is kept beside them."""
    assess_every: int | None = None
    """Steps between evaluations; None: an epoch."""
    stop_after: int | None = None
    """Steps after which to stop with a checkpoint, for machines lent by the hour."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name."""
    name: str | None = None
    """Of the folder in runs/; None: preset or data set and model, and seed."""
    data_dir: str | None = None
    """Where the data lies; of TensorFlow Datasets, None: TFDS_DATA_DIR, else TFDS's own place."""
    download: bool = False
    """Let TensorFlow Datasets download and prepare (needs tensorflow)."""
    distributed: bool = False
    """Join the other processes of the run, on this host or others, with the same command."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX does not find the cluster by itself."""
    processes: int | None = None
    """How many there are, likewise."""
    process_id: int | None = None
    """Which one this is, from 0, likewise."""


SESSION = tuple(field.name for field in dataclasses.fields(Session))

# Options of which there is at least one.
COUNTS = ("accumulate", "log_every", "checkpoint_every", "keep", "assess_every")

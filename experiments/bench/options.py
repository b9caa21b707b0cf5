"""The options that every measuring script has; nothing here is slow to import."""

import dataclasses
from pathlib import Path

from training.flags import Seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The place of the results, and the size of the run."""

    seed: Seed = 0
    """Seed of all that is random."""
    out: Path | None = None
    """Folder of the results; None: runs/ and the script's name, smoke runs beside it."""
    smoke: bool = False
    """Takes few and tiny problems: everything is run through, nothing is shown by it."""

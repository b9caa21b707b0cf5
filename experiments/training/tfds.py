"""The records of prepared TensorFlow Datasets, for images and for text; needs no TensorFlow."""

import os
from typing import Any

from training.missing import not_installed

try:
    import tensorflow_datasets as tfds
except ImportError as missing:
    raise not_installed(missing) from None


def records(
    name: str,
    split: str,
    *,
    data_dir: str | None,
    download: bool,
    limit: int | None = None,
    instead: str,
) -> list[dict[str, Any]]:
    """The first `limit` records of a split; `instead` is the option that needs no such data."""
    try:
        source: Any = tfds.data_source(name, split=split, data_dir=data_dir, download=download)
        return source.__getitems__(range(len(source))[:limit])
    except ImportError as missing:
        raise SystemExit(
            f"Reading {name} expected the package {missing.name!r}, and it is not installed. Run "
            "`pip install -e '.[experiments]'`; downloading and preparing also needs "
            "`pip install tensorflow`."
        ) from None
    except Exception as error:  # TFDS raises six kinds for data that is absent or of other format
        where = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        # TFDS calls a missing folder prepared, or lists what it knows; we say that it is missing.
        there = (tfds.core.Path(where).expanduser() / name).exists()
        got = f"{type(error).__name__}: {error}" if there else f"no folder {name} there."
        raise SystemExit(
            f"Expected {name} prepared by TensorFlow Datasets as array_record under {where}; got "
            f"{got}\nPoint TFDS_DATA_DIR or --data-dir at a directory "
            "that holds it, or prepare it once: `pip install tensorflow`, then pass --download. "
            f"`{instead}` needs neither."
        ) from None

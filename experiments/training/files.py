"""Files of a run: replaced whole, locked by one process, known to be as they were written."""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def replace(path: Path, content: str | bytes) -> None:
    beside = path.with_name(f"{path.name}.new")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)  # atomic: a reader sees the old file or the new one


def held(path: Path) -> IO[str] | None:
    """The file, locked for as long as it is open; None where another process has it.

    The lock is the system's, which takes it back from a process that ends, however it ends; the
    file may stay. Where a file system has no locks, nothing is held.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        print(f"Not locked, so that two processes may write at once: {path}, {error}.")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def digest(path: Path) -> str:
    """SHA-256 of a file as it is, compressed or not: a second for half a gigabyte."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> str:
    """One line for each file in it, as `sha256sum` has them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return "".join(f"{digest(path)}  {path.relative_to(folder)}\n" for path in files)


def changed(folder: Path, record: Path) -> str | None:
    """The files that are not as `record` has their digests, in words; None if all of them are."""
    before = record.read_bytes().decode(errors="replace").splitlines()
    odd = {line.partition("  ")[2] for line in {*before} ^ {*digests(folder).splitlines()}}
    if not odd:
        return None
    what = "changed" if (folder / min(odd)).is_file() else "missing"
    return f"{len(odd)} of its files changed or missing, {min(odd)!r} {what}"


def parsed(line: bytes) -> dict[str, Any] | None:
    """A JSON object, and None for anything else."""
    try:
        found = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return found if isinstance(found, dict) else None


def steps_in(run: Path) -> list[str]:
    """The numbers in its checkpoints/, as they stand there, the lowest first."""
    names = [path.name for path in (run / "checkpoints").glob("*")]
    return sorted((name for name in names if name.isdecimal()), key=int)


@contextmanager
def writing(run: Path, what: str, errors: type[Exception] = OSError) -> Iterator[None]:
    """Says in a sentence what could not be written, and what is left: disk full, no access."""
    try:
        yield
    except errors as error:
        steps = steps_in(run)
        left = f"The checkpoint of step {steps[-1]} is whole" if steps else "No checkpoint yet"
        raise SystemExit(
            f"Stopped: expected to write {what} in {run}, got {type(error).__name__}: {error}. "
            f"{left}. Make room or give access there, then go on with --resume."
        ) from error

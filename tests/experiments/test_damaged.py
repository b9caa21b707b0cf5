"""A run's folder with damaged files: what can be read is gone on from, and the rest is said."""

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.run import RunFolder

LINES = [{"step": i, "loss": 1.0 / i, "gradient_norm": None} for i in range(1, 5)]


class State(NamedTuple):
    noise: jax.Array
    step: jax.Array


def state(step):
    noise = jax.random.normal(jax.random.key(step), (40, 40))
    return State(noise, jnp.asarray(step, jnp.int32))


def resumed(root):
    return RunFolder(root, "a", {"seed": 0}, resume=True, keep=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run with checkpoints of steps 1, 2 and 4, the last with the lowest eval_loss."""
    root = tmp_path_factory.mktemp("written")
    folder = RunFolder(root, "a", {"seed": 0}, resume=False, keep=3)
    for line in LINES:
        folder.log(line)
        if line["step"] != 3:
            folder.save(line["step"], state(line["step"]), eval_loss=line["loss"])
    folder.close()
    return root


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def restored(root):
    """The step gone on from, whose state is as it was saved, and the metrics left."""
    folder = resumed(root)
    found = folder.restore(jax.tree.map(jnp.zeros_like, state(0)))
    step = int(found.step)
    np.testing.assert_array_equal(found.noise, state(step).noise)
    lines = folder.metrics()
    folder.close()
    return step, lines


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def largest(folder):
    return max((x for x in folder.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)


def cut(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[:100])


DAMAGE = {
    "a bit": lambda x: flip(largest(x)),
    "cut": cut,
    "an empty file": lambda x: largest(x).write_bytes(b""),
    "one file less": lambda x: largest(x).unlink(),
    "one file more": lambda x: (x / "default" / "d" / "other").write_bytes(b"x"),
    "its metrics": lambda x: (x / "metrics" / "metrics").write_text('{"eval'),
    "no metadata": lambda x: (x / "_CHECKPOINT_METADATA").unlink(),
    "an empty folder": empty,
    "a file": lambda x: (shutil.rmtree(x), x.write_text("")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(damage, root, capsys):
    path = root / "a"
    damage(path / "checkpoints" / "4")
    assert restored(root) == (2, LINES[:2])
    said = capsys.readouterr().out
    assert f"Expected checkpoint 4 of {path} as it was written, got " in said
    assert f"{path} goes on from step 2." in said
    assert (path / "damaged" / "4").exists() and not (path / "checkpoints" / "4").exists()
    # It is said once; and what was lost is written again.
    assert restored(root) == (2, LINES[:2]) and capsys.readouterr().out == ""
    folder = resumed(root)
    folder.restore(state(0))
    folder.save(4, state(4))
    folder.close()
    assert restored(root)[0] == 4


def test_a_stray_number_is_no_checkpoint(root, capsys):
    checkpoints = root / "a" / "checkpoints"
    (checkpoints / "9").mkdir()
    shutil.copytree(checkpoints / "2", checkpoints / "7")  # whole, under another's number
    (checkpoints / "notes").mkdir()
    assert restored(root) == (4, LINES)
    said = capsys.readouterr().out
    assert "checkpoint 9 of" in said and "state of step 2 under the name of step 7" in said
    assert "goes on from step 4" in said and (root / "a" / "damaged" / "7").exists()


def test_without_digests_what_orbax_reads_is_gone_on_from(root, capsys):
    """As of a process that was killed just then, or of an older version."""
    shutil.rmtree(root / "a" / "digests")
    assert restored(root) == (4, LINES) and capsys.readouterr().out == ""
    (root / "a" / "checkpoints" / "4" / "default" / "manifest.ocdbt").unlink()
    shutil.rmtree(root / "a" / "checkpoints" / "4" / "default" / "d")
    assert restored(root)[0] == 2 and "checkpoint 4 of" in capsys.readouterr().out


def test_where_no_checkpoint_can_be_read_the_run_stops(root):
    path = root / "a" / "checkpoints"
    for step in path.iterdir():
        empty(step)
    folder = resumed(root)
    with pytest.raises(SystemExit, match="no checkpoint of .*/a can be read"):
        folder.restore(state(0))
    folder.close()
    assert len((root / "a" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_whole_checkpoint_of_another_network_is_left_alone(root):
    folder = resumed(root)
    with pytest.raises(SystemExit, match="checkpoint 4 of .* to fit the network, got "):
        folder.restore({"other": jnp.zeros(3), "step": jnp.zeros((), jnp.int32)})
    folder.close()
    assert restored(root) == (4, LINES)


def spoil(path, at, line):
    lines = path.read_bytes().splitlines(keepends=True)
    lines[at] = line
    path.write_bytes(b"".join(lines))


METRICS = {
    "missing": (lambda x: x.unlink(), 0, 4, []),
    "cut": (lambda x: x.write_bytes(x.read_bytes()[:-70]), 0, 2, LINES[:2]),
    "a bit": (lambda x: flip(x, 0.0), 1, 1, LINES[1:]),
    "no text": (lambda x: spoil(x, 1, b"\xff\xfe\n"), 1, 1, [LINES[0], *LINES[2:]]),
    "no object": (lambda x: spoil(x, 2, b"[3]\n"), 1, 1, [*LINES[:2], LINES[3]]),
    "no step": (lambda x: spoil(x, 3, b'{"loss": 1}\n'), 0, 1, LINES[:3]),
}


@pytest.mark.parametrize(("damage", "broken", "absent", "left"), METRICS.values(), ids=METRICS)
def test_damaged_metrics_are_said_and_gone_on_from(damage, broken, absent, left, root, capsys):
    damage(root / "a" / "metrics.jsonl")
    assert restored(root) == (4, left)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{broken} lines that cannot be read and none of {absent} steps" in said
    lines = (root / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == left


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda x: x.write_bytes(x.read_bytes()[:-9]), "damaged"),
        (lambda x: x.write_bytes(b""), "damaged"),
        (lambda x: x.write_text('{"seed": 0}'), "damaged"),
        (lambda x: x.write_bytes(b"\xff" + x.read_bytes()), "damaged"),
        (lambda x: x.unlink(), "missing"),
    ],
)
def test_a_damaged_configuration_stops_the_run(damage, word, root):
    damage(root / "a" / "config.json")
    before = sorted(x.name for x in (root / "a").iterdir())
    with pytest.raises(SystemExit, match=f"config.json, got a file that is {word}"):
        resumed(root)
    assert sorted(x.name for x in (root / "a").iterdir()) == before


def test_an_untouched_run_is_left_byte_for_byte(root):
    path = root / "a"
    content = lambda: {x: x.read_bytes() for x in path.rglob("*") if x.is_file()}
    before = content()
    assert restored(root) == (4, LINES)
    lock = path / "lock"
    assert {**content(), lock: b""} == {**before, lock: b""}

"""The loop of the experiments: accumulation, checkpoints, and runs that end before their end."""

import resource
import signal
import struct
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import TRAINING, finish, metrics, reach, start
from tensorboardX.proto import event_pb2
from tiny_run import batch_of, initial, loss_fn, train

from training.devices import mesh, place
from training.fit import make_step, stop_if_not_finite
from training.plots import plot_curves
from training.run import RunFolder


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing stopped: its folder and its last state."""
    root = tmp_path_factory.mktemp("straight")
    return root / "tiny", train(root)


def checkpoints(folder, kind="checkpoints"):
    return sorted(int(x.name) for x in (folder / kind).iterdir() if x.name.isdigit())


def flip_a_bit(checkpoint):
    """Changes one bit of an array, which Orbax would read as another number."""
    files = [x for x in (checkpoint / "default").rglob("d/*") if x.is_file()]
    file = max(files, key=lambda x: x.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def same(state, expected):
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        np.testing.assert_array_equal(raw(a), raw(b))


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_bit_for_bit(
    straight, tmp_path, capsys
):
    folder, expected = straight
    process = start(TRAINING, "--root", tmp_path, "--pause", 14)
    reach(process, tmp_path / "tiny", 14)
    # The folder is that of one process, and of its lock no more is left than of itself.
    with pytest.raises(SystemExit, match=rf"another one is at work there \(process {process.pid} "):
        train(tmp_path, resume=True)
    process.kill()
    process.communicate()
    # Saving runs beside the training: the checkpoint of step 12 may not be whole yet.
    assert max(checkpoints(tmp_path / "tiny")) in (8, 10, 12)
    damaged = max(checkpoints(tmp_path / "tiny", "digests"))
    flip_a_bit(tmp_path / "tiny" / "checkpoints" / f"{damaged}")
    same(train(tmp_path, resume=True), expected)
    said = capsys.readouterr().out
    assert f"Expected checkpoint {damaged} of" in said and "tiny goes on from step" in said
    assert metrics(tmp_path / "tiny") == metrics(folder)
    # TensorBoard draws the second of two points of one step.
    assert events(tmp_path / "tiny") == events(folder)
    assert [step for step, _ in events(folder)] == [*range(1, 21)]


def test_resuming_a_complete_run_changes_nothing(straight):
    folder, expected = straight
    before = (folder / "metrics.jsonl").read_bytes(), checkpoints(folder)
    same(train(folder.parent, resume=True), expected)
    assert ((folder / "metrics.jsonl").read_bytes(), checkpoints(folder)) == before


def test_sigterm_saves_the_very_step(straight, tmp_path):
    folder, expected = straight
    process = start(TRAINING, "--root", tmp_path, "--pause", 5)
    reach(process, tmp_path / "tiny", 5)
    process.send_signal(signal.SIGTERM)
    (tmp_path / "go").touch()
    (said,) = finish([process])
    stopped = metrics(tmp_path / "tiny")[-1]["step"]
    assert stopped < 20
    assert f"Stopped at step {stopped} of" in said and "--resume goes on" in said
    assert max(checkpoints(tmp_path / "tiny")) == stopped
    same(train(tmp_path, resume=True), expected)
    assert metrics(tmp_path / "tiny") == metrics(folder)


def events(folder):
    """Steps and losses that TensorBoard shows, by its rule for a session that starts anew."""
    shown = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, event, its checksum
            size = struct.unpack("<Q", data[:8])[0]
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                shown = {step: loss for step, loss in shown.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    assert event.step not in shown
                    shown[event.step] = value.simple_value
    return sorted(shown.items())


def test_accumulation_has_the_gradient_of_the_whole_batch():
    batch, replicated = mesh()
    optimizer = optax.sgd(1.0)
    quiet = lambda params, norms, key, *xs: loss_fn(params, norms, jax.random.key(0), *xs)
    steps = [make_step(quiet, optimizer, batch, replicated, accumulate=k) for k in (1, 4)]
    state, examples = initial(optimizer, replicated), place(batch_of(0, 32), batch)
    text = steps[1].lower(state, *examples).compile().as_text()
    # No example leaves its device.
    assert "all-reduce" in text
    assert not any(x in text for x in ("all-gather", "all-to-all", "collective-permute"))
    (one, one_line), (four, four_line) = (
        step(initial(optimizer, replicated), *examples) for step in steps
    )
    np.testing.assert_allclose(four.params, one.params, rtol=1e-5, atol=1e-7)
    assert jax.tree.structure(one_line) == jax.tree.structure(four_line)
    assert int(four_line["results"]["successful"]) == int(one_line["results"]["successful"]) == 32
    for name in ("loss", "evaluations", "gradient_norm"):
        np.testing.assert_allclose(four_line[name], one_line[name], rtol=1e-5)


def test_the_best_stays_while_the_newest_rotate(tmp_path):
    """And each has the bytes of its step, though the next one donates them."""
    folder = RunFolder(tmp_path, "a", {"seed": 0}, resume=False, keep=2)
    more = jax.jit(lambda x: jax.tree.map(lambda y: y + 1, x), donate_argnums=0)
    state = {"wide": jnp.zeros(300_000), "step": jnp.zeros((), jnp.int32)}
    for i in range(1, 9):
        state = more(state)
        folder.save(i, state, eval_loss=None if i % 2 else abs(i - 4) + 1.0)
    same(folder.best(state), jax.tree.map(lambda x: jnp.full_like(x, 4), state))
    folder.close()
    assert checkpoints(tmp_path / "a") == [4, 7, 8]
    folder = RunFolder(tmp_path, "a", {"seed": 0}, resume=True)
    same(folder.restore(jax.tree.map(jnp.zeros_like, state)), state)
    assert folder.improves(0.9) and not folder.improves(1.0)
    folder.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file" / "runs", tmp_path / "file", Path("/proc/none")):
        with pytest.raises(SystemExit, match=rf"expected to write .* in {root}/a, got .*Error"):
            RunFolder(root, "a", {"seed": 0}, resume=False)


def test_a_full_disk_stops_the_metrics(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").symlink_to("/dev/full")
    folder = RunFolder(tmp_path, "a", {"seed": 0}, resume=True)
    with pytest.raises(SystemExit, match=r"metrics of step 3 .*No space left .* No checkpoint yet"):
        folder.log({"step": 3, "loss": 1.0})
    folder.close()


def test_a_full_disk_stops_at_a_checkpoint_and_leaves_the_one_before(tmp_path):
    folder = RunFolder(tmp_path, "a", {"seed": 0}, resume=False)
    state = {"noise": jax.random.normal(jax.random.key(0), (100_000,))}  # what compresses is small
    folder.save(1, state)
    folder.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))  # as a full disk, for one process
    try:
        with pytest.raises(SystemExit, match=r"checkpoint of step 2 in .* got .* step 1 is whole"):
            folder.save(2, state)
            for _ in range(600):  # said at the next reading of the metrics after it has failed
                folder.log({"step": 3, "loss": 1.0})
                time.sleep(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.close()
    folder = RunFolder(tmp_path, "a", {"seed": 0}, resume=True)
    assert checkpoints(tmp_path / "a") == [1]
    same(folder.restore(jax.tree.map(jnp.zeros_like, state)), state)
    folder.close()


def test_curves_without_accuracy(straight):
    folder = RunFolder(straight[0].parent, "tiny", {"seed": 0}, resume=True)
    plot_curves(folder, "a language model", "held-out")
    folder.close()
    assert (straight[0] / "curves.png").stat().st_size > 5_000


def test_what_is_not_finite_is_named(straight):
    folder = RunFolder(straight[0].parent, "tiny", {"seed": 0}, resume=True)
    lines = [{"step": 7, "loss": 1.0, "gradient_norm": float("inf"), "results": {"max_steps": 2}}]
    with pytest.raises(SystemExit, match=r"finite gradient norm, got inf at step 7 .* 2 max_steps"):
        stop_if_not_finite(lines, folder)
    folder.close()

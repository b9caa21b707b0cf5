"""`experiments/image_classification.py`, run as a user runs it, with --smoke."""

import importlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from processes import runner
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from images.data import load

SCRIPT = Path(__file__).parents[2] / "experiments" / "image_classification.py"
DEFAULT = ("implicit-resnet", "pc-linear-kind1", "pc-linear-kind2", "resnet")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the script in a folder, on so many simulated devices."""
    return runner(SCRIPT, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def default(run, tmp_path_factory):
    """The folder and the output of a run without options."""
    folder = tmp_path_factory.mktemp("default")
    return folder, succeed(run(folder))


def succeed(process):
    assert process.returncode == 0, process.stderr
    return process.stdout


def fail(process):
    assert process.returncode != 0
    return " ".join(process.stderr.split())


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def arrays(folder):
    """The last checkpoint, as NumPy arrays under their names."""
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as checkpoints:
        step = checkpoints.latest_step()
        leaves = checkpoints.restore(step, args=ocp.args.StandardRestore())
    raw = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return step, {name: np.asarray(raw(leaf)) for name, leaf in leaves.items()}


@pytest.mark.slow
def test_without_options_compares_four_models(default):
    folder, output = default
    assert "test accuracy" in output and "f backward" in output
    for name in DEFAULT:
        path = folder / "runs" / f"digits-{name}-0-smoke"
        assert f"runs/{path.name}/" in output
        config = json.loads((path / "config.json").read_text())
        assert config["seed"] == 0 and config["config"]["batch_size"] % 8 == 0
        assert {"python", "jax", "deqjax", "equinox", "optax", "device"} <= config[
            "versions"
        ].keys()
        assert [line["step"] for line in metrics(path) if "loss" in line] == [*range(1, 13)]
        assert [line["step"] for line in metrics(path) if "eval_accuracy" in line] == [6, 12]
        assert (path / "curves.png").stat().st_size > 5_000
        assert (path / "residual.png").exists() == (name != "resnet")
        assert (path / "certificates.png").exists() == name.startswith("pc-")
        assert arrays(path)[0] == 12


@pytest.mark.slow
def test_certificates_of_positive_concave_networks(default):
    folder, output = default
    for row in (re.split(r" {2,}", line) for line in output.splitlines() if "runs/" in line):
        *epochs, last = metrics(folder / row[-1])[-8:]
        if not row[0].startswith("pcDEQ"):
            assert row[3] == "-" and "certified" not in last
            continue
        assert last["step"] == 12 and row[3] == f"{last['certified']:.2%}"
        line = epochs[-1]
        assert line["epoch"] == 2.0
        (((lower, upper),), ((median, largest),)) = line["spectral_radius"], line["certified_error"]
        assert 0 < lower <= upper < 1 and largest >= median > 0
        assert line["solve_evaluations"][0] >= 1


@pytest.mark.slow
def test_the_baseline_has_the_parameters_of_the_implicit_network(default):
    rows = [re.split(r" {2,}", line) for line in default[1].splitlines() if "runs/" in line]
    counts = {row[0]: row[1] for row in rows}
    assert counts["RevDEQ (implicit-resnet)"] == counts["explicit resnet"]


@pytest.mark.slow
def test_multi_scale(run, tmp_path):
    """With the one cycle and the smoothed labels that are its defaults, and in bfloat16."""
    model = "implicit-resnet-multiscale"
    output = succeed(run(tmp_path, "--model", model, "--dtype", "bfloat16", "--stop-after", "6"))
    path = tmp_path / "runs" / f"digits-{model}-0-smoke"
    config = json.loads((path / "config.json").read_text())["config"]
    assert (config["schedule"], config["label_smoothing"]) == ("one-cycle", 0.1)
    row = next(re.split(r" {2,}", x) for x in output.splitlines() if x.startswith("RevDEQ"))
    assert row[0] == f"RevDEQ ({model})" and row[4:6] == ["18.0", "16.0"]  # two solves of 8 steps
    assert all(line["results"]["successful"] == 32 for line in metrics(path) if "loss" in line)


@pytest.mark.slow
def test_resuming_is_bit_for_bit(default, run, tmp_path):
    options = ("--model", "pc-linear", "--checkpoint-every", "2")
    succeed(run(tmp_path, *options, "--stop-after", "5"))  # in the middle of an epoch
    path = tmp_path / "runs" / "digits-pc-linear-kind1-0-smoke"
    with open(path / "metrics.jsonl", "a") as file:  # as if killed later, while writing
        file.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    succeed(run(tmp_path, *options, "--resume"))
    straight = default[0] / "runs" / path.name
    assert metrics(path) == metrics(straight)
    (step, resumed), (last, expected) = arrays(path), arrays(straight)
    assert step == last == 12 and resumed.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(resumed[name], expected[name], err_msg=name)
    assert sorted(int(x.name) for x in (path / "checkpoints").iterdir()) == [10, 12]

    # A complete run has nothing left to do.
    before = (path / "metrics.jsonl").read_bytes()
    assert "certified" in succeed(run(tmp_path, *options, "--resume"))
    assert (path / "metrics.jsonl").read_bytes() == before
    assert sum("certified" in line for line in metrics(path)) == 1

    said = fail(run(tmp_path, *options, "--resume", "--learning-rate", "0.5"))
    assert "learning_rate was 0.003 and is now 0.5" in said


@pytest.mark.slow
def test_a_taken_name_is_not_overwritten(run, tmp_path):
    (tmp_path / "runs" / "digits-pc-linear-kind2-0-smoke").mkdir(parents=True)
    output = succeed(run(tmp_path, "--model", "pc-linear", "--kind", "2", "--stop-after", "1"))
    assert "runs/digits-pc-linear-kind2-0-smoke-2/" in output


@pytest.mark.slow
def test_resuming_nothing_is_refused(run, tmp_path):
    said = fail(run(tmp_path, "--model", "resnet", "--resume"))
    assert "--resume expected a run" in said and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(run, tmp_path):
    said = fail(run(tmp_path, "--model", "implicit-resnet", "--learning-rate", "1e38"))
    lines = metrics(tmp_path / "runs" / "digits-implicit-resnet-0-smoke")
    bad = next(x["step"] for x in lines if x["loss"] is None or x["gradient_norm"] is None)
    assert 1 < bad < 12 and f"at step {bad} of runs/" in said
    assert "expected a finite" in said and re.search(r"ended so: 16 \w+", said)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(run, tmp_path):
    # Smoke runs have a batch of 16.
    said = fail(run(tmp_path, "--model", "pc-linear", devices=3))
    assert "divides by the 3 devices" in said and "--batch-size" in said


@pytest.mark.slow
def test_an_activation_of_the_other_kind_is_refused(run, tmp_path):
    said = fail(run(tmp_path, "--model", "pc-linear", "--kind", "2", "--activation", "tanh"))
    assert "Expected an activation of kind 2 for pc-linear, got tanh" in said


@pytest.mark.slow
def test_missing_data_is_explained(run, tmp_path):
    said = fail(run(tmp_path, "--dataset", "svhn_cropped", TFDS_DATA_DIR=str(tmp_path)))
    assert "Expected svhn_cropped prepared by TensorFlow Datasets" in said
    assert "got no folder svhn_cropped there" in said
    assert "TFDS_DATA_DIR" in said and "pip install tensorflow" in said


def test_a_folder_of_data_that_is_not_there_is_not_called_prepared():
    with pytest.raises(SystemExit) as refused:
        load("mnist", data_dir="/nowhere", download=False, limit=None)
    said = str(refused.value)
    assert "under /nowhere; got no folder mnist there." in said and "already" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        ("mnist", ("--model", "pc-multi"), "test: the official split, 40 images"),
        ("cifar10", ("--model", "pc-single"), "held-out: last 10 training images"),
        ("svhn_cropped", ("--model", "pc-linear"), "test: the official split, 40 images"),
    ],
)
def test_tfds_data(run, tmp_path, dataset, options, expected):
    """Data of the real builder's format, written here, so that no download is needed."""
    write_tfds(dataset, tmp_path / "tfds")
    output = succeed(
        run(tmp_path, "--dataset", dataset, *options, TFDS_DATA_DIR=str(tmp_path / "tfds"))
    )
    assert expected in output
    assert ("test accuracy" in output) == (dataset != "cifar10")


@pytest.mark.slow
def test_real_data_is_read_or_explained(run, tmp_path):
    """With TFDS_DATA_DIR set, CIFAR-10 is there; without, the script says what to do."""
    options = ("--dataset", "cifar10", "--model", "pc-linear", "--stop-after", "1")
    if "TFDS_DATA_DIR" in os.environ:
        assert "held-out" in succeed(run(tmp_path, *options))
    else:
        assert "prepare it once" in fail(run(tmp_path, *options, TFDS_DATA_DIR=str(tmp_path)))


def test_a_step_donates_its_buffers(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    names = ("training.devices", "training.fit", "images.models", "images.train")
    devices, fit, models, train = (importlib.import_module(name) for name in names)
    make = models.constructor(
        "pc-linear",
        features=(8,),
        max_steps=20,
        tolerance=1e-4,
        gradient_tolerance=1e-2,
        beta=0.8,
        activation="tanh",
    )
    model, norms = eqx.nn.make_with_state(make)((4, 4, 1), 10, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    unit = np.ones((1, 1, 1, 1), np.float32)
    prepare = train.Preparation(unit, unit, shift=1, mirror=True)
    batch, replicated = devices.mesh()
    loss_fn = train.make_loss(static, prepare, batch, 0.1)
    step = fit.make_step(loss_fn, optax.adam(1e-3), batch, replicated)
    zero, optimizer = jnp.zeros((), jnp.int32), optax.adam(1e-3).init(params)
    state = fit.TrainState(params, norms, optimizer, jax.random.key(1), zero)
    state = jax.device_put(state, replicated)
    examples = np.ones((8, 4, 4, 1), np.uint8), np.zeros(8, np.int32)
    with jax.numpy_dtype_promotion("standard"):  # Optax itself is not strict
        new, _ = step(state, *jax.device_put(examples, batch))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def write_tfds(name, data_dir, n=40):
    """Write `n` small random examples a split as TFDS would, without TensorFlow."""
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    features: Any = builder.info.features
    path = Path(builder.data_path)
    path.mkdir(parents=True)
    features.save_config(str(path))
    rng = np.random.default_rng(0)
    splits = []
    for split in ("train", "test"):
        file = path / f"{name}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
        for i in range(n):
            png = io.BytesIO()
            image = rng.integers(0, 256, features["image"].shape, np.uint8)
            Image.fromarray(image.squeeze()).save(png, "png")
            values = {
                "id": tf_feature_pb2.Feature(
                    bytes_list=tf_feature_pb2.BytesList(value=[f"{i}".encode()])
                ),
                "image": tf_feature_pb2.Feature(
                    bytes_list=tf_feature_pb2.BytesList(value=[png.getvalue()])
                ),
                "label": tf_feature_pb2.Feature(
                    int64_list=tf_feature_pb2.Int64List(value=[i % 10])
                ),
            }
            values = {key: values[key] for key in features}
            example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=values))
            writer.write(example.SerializeToString())
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=path, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[n], num_bytes=0, filename_template=template
            )
        )
    builder.info.set_splits(tfds.core.SplitDict(splits))
    builder.info.write_to_directory(str(path))

"""Implicit image classifiers: a reversible and two positive concave equilibrium models.

Shown: a RevDEQ (exact gradient of the steps taken, by reversing them) and pcDEQs of both kinds
(a unique fixed point, gradient by the implicit function theorem) learn to read digits about as
well as an explicit residual network with the parameters of the RevDEQ.

    python experiments/image_classification.py                # digits, four models, one table
    python experiments/image_classification.py --seed 1
    python experiments/image_classification.py --dataset mnist --model pc-linear
    python experiments/image_classification.py --dataset mnist --model implicit-resnet
    python experiments/image_classification.py --smoke        # the same in seconds, not learning

Digits come with scikit-learn. The others are read by TensorFlow Datasets from TFDS_DATA_DIR.
`--resume` with the same options goes on where a run was stopped, bit for bit. Every run has a
folder runs/<name>/ with its configuration, metrics, checkpoints and plots; a name that is taken
becomes <name>-2. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2. As printed:

    digits, test split of 360 images               seed 0   seed 1   f forward  backward  seconds
    RevDEQ (implicit-resnet), 24,106 parameters    99.17%   99.17%         5.0       4.0       76
    pcDEQ-1 (pc-linear, tanh), 12,730              98.06%   97.50%        15.6      16.5       12
    pcDEQ-2 (pc-linear, sigmoid), 12,730           98.06%   97.50%         7.2       8.1       10
    explicit resnet, 24,106                        99.44%   99.17%         1.0       1.0       13

    mnist, the official test split                 seed 0            f forward  backward  seconds
    pcDEQ-1 (pc-linear, tanh), 70,330              98.66%                 17.6      19.2       55
    RevDEQ (implicit-resnet), 7,450                99.08%                  5.0       4.0    1,008

The RevDEQ on MNIST ran in the floating-point mode, deqjax.Reversible(exact=False).
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from _data import Dataset, load
from _models import ACTIVATIONS, constructor
from _run import RunFolder
from _train import (
    Preparation,
    TrainState,
    backward_evaluations,
    evaluate,
    make_forward,
    make_step,
    mesh,
    residual_curves,
)
from tqdm import tqdm

from deqjax.positive import qualify

Model = Literal["implicit-resnet", "pc-linear", "pc-single", "pc-multi", "resnet"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Train implicit models on images. An option left at None comes from PRESETS."""

    dataset: Literal["digits", "mnist", "cifar10", "svhn_cropped"] = "digits"
    model: Model | None = None
    """None: a RevDEQ, a pcDEQ of each kind, and the explicit network."""
    kind: Literal[1, 2] = 1
    """Of a pcDEQ: 1 has strictly positive input and tanh, 2 nonnegative input and sigmoid."""
    activation: Literal["tanh", "softsign", "relu6", "sigmoid"] | None = None
    """Of a pcDEQ; None: that of its kind. softsign and relu6 are of kind 1."""
    features: tuple[int, ...] | None = None
    """Features of each solve: channels of a convolution, units of pc-linear."""

    max_steps: int | None = None
    """Ceiling on solver steps, one evaluation of f each; implicit-resnet takes just so many."""
    tolerance: float = 1e-4
    """Of pcDEQ solves, relative: a tenth of it changes no accuracy and costs more steps."""
    beta: float = 0.8
    """Relaxation of the reversible solver, the paper's; 1 - beta is 1/d or -1/d, d an integer."""

    seed: int = 0
    """Of parameters, order of the data and augmentation; the digits' split is always the same."""
    epochs: int | None = None
    """Passes over the training split."""
    batch_size: int = 64
    """Images a step, over all devices: the papers'."""
    learning_rate: float | None = None
    """Peak of AdamW's."""
    schedule: Literal["cosine", "milestone"] = "cosine"
    """cosine: to 0 at the last step; milestone: x0.1 after three quarters, the pcDEQ paper's."""
    weight_decay: float = 1e-2
    """AdamW's: a step shrinks parameters by learning rate x this; the pcDEQ paper's order."""
    epsilon: float = 1e-6
    """AdamW's. At 1e-8 gradients of pure rounding (of a bias that batch normalisation takes out
    again) become full steps, and the loss depends on the number of devices from the second on."""
    clip: float = 1.0
    """Ceiling on the gradient's norm: met in the first steps only."""
    shift: int = 1
    """Pixels that training images move at most, at random, in each direction."""

    log_every: int = 20
    """Steps between readings of the metrics, which make the host wait for the device."""
    checkpoint_every: int = 500
    """Steps: at most a few minutes of work to lose."""
    stop_after: int | None = None
    """Steps after which to stop with a checkpoint, for machines lent by the hour."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name."""
    name: str | None = None
    """Of the folder in runs/; None: dataset, model and seed."""
    data_dir: str | None = None
    """Of TensorFlow Datasets; None: TFDS_DATA_DIR, else TFDS's own place."""
    download: bool = False
    """Let TensorFlow Datasets download and prepare (needs tensorflow)."""
    smoke: bool = False
    """A tiny network, data set and number of steps: everything is run through in seconds."""


# Options that don't change what is computed: they may differ when a run is resumed.
SESSION = ("log_every", "checkpoint_every", "stop_after", "resume", "name", "data_dir", "download")

# What a data set asks for stands in lines of its own, and comes before the model's.
PRESETS: dict[str, dict[str, Any]] = {
    "implicit-resnet": {"features": (32,), "max_steps": 4, "epochs": 15, "learning_rate": 3e-3},
    "pc-linear": {"features": (80,), "max_steps": 200, "epochs": 60, "learning_rate": 3e-3},
    "pc-single": {"features": (82,), "max_steps": 200, "epochs": 30, "learning_rate": 3e-3},
    "pc-multi": {"features": (12, 24, 48), "max_steps": 200, "epochs": 30, "learning_rate": 3e-3},
    "resnet": {"features": (32,), "max_steps": 1, "epochs": 15, "learning_rate": 3e-3},
    "mnist implicit-resnet": {"features": (16,), "epochs": 2},
    "mnist resnet": {"features": (16,), "epochs": 2},
    "mnist pc-linear": {"epochs": 15},
    "mnist pc-multi": {"epochs": 5},
}
SMOKE = {"epochs": 2, "batch_size": 16, "log_every": 2}
SMOKE_FEATURES = {"implicit-resnet": (8,), "resnet": (8,), "pc-multi": (4, 4, 4)}


def resolve(config: Config) -> Config:
    """Fill in what was left at None, the data set's own presets before the model's."""
    model = config.model
    assert model is not None
    preset = PRESETS[model] | PRESETS.get(f"{config.dataset} {model}", {})
    activation = "tanh" if config.kind == 1 else "sigmoid"
    preset = {"activation": activation, "name": default_name(config), **preset}
    if config.smoke:
        # These are forced: a smoke run is quick whatever else is asked for.
        config = dataclasses.replace(config, **SMOKE, features=SMOKE_FEATURES.get(model, (8,)))
    if qualify(ACTIVATIONS[config.activation or activation]).kind != config.kind:
        raise SystemExit(
            f"Expected an activation of kind {config.kind} for {model}, got {config.activation}. "
            f"Choose a --model with --kind {3 - config.kind}, or leave --activation out."
        )
    for option in ("epochs", "learning_rate", "batch_size"):
        value = getattr(config, option)
        if value is not None and not value > 0:
            raise SystemExit(
                f"Expected --{option.replace('_', '-')} above 0, got {value}. Leave it out for the "
                "preset."
            )
    missing = {k: v for k, v in preset.items() if getattr(config, k) is None}
    return dataclasses.replace(config, **missing)


def default_name(config: Config) -> str:
    kind = f"-kind{config.kind}" if config.model in ("pc-linear", "pc-single", "pc-multi") else ""
    smoke = "-smoke" if config.smoke else ""
    return f"{config.dataset}-{config.model}{kind}-{config.seed}{smoke}"


def train(config: Config, data: Dataset) -> dict[str, Any]:
    """One run, from its folder to its row of the table."""
    batch_size, n = config.batch_size, len(data.train.labels)
    if batch_size % jax.device_count() or batch_size > n:
        raise SystemExit(
            f"Expected a batch size that divides by the {jax.device_count()} devices JAX shows and "
            f"is at most the {n} training images; got {batch_size}. Pass another --batch-size, or "
            "show JAX fewer devices."
        )
    assert config.epochs and config.learning_rate and config.name  # by resolve
    start_time = time.perf_counter()
    recorded = {k: v for k, v in dataclasses.asdict(config).items() if k not in SESSION}
    folder = RunFolder(Path("runs"), config.name, recorded, resume=config.resume)

    # --- network, optimiser, compiled functions
    per_epoch = n // batch_size
    total = per_epoch * config.epochs
    model_key, augment_key, measure_key = jax.random.split(jax.random.key(config.seed), 3)
    names = ("model", "features", "max_steps", "tolerance", "beta", "activation")
    make = constructor(**{name: recorded[name] for name in names})
    make = eqx.filter_jit(eqx.nn.make_with_state(make))  # one compilation, not one a parameter
    model, norms = make(data.image_shape, data.num_classes, key=model_key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, total)
    else:
        rate = optax.piecewise_constant_schedule(config.learning_rate, {total * 3 // 4: 0.1})
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, eps=config.epsilon, weight_decay=config.weight_decay),
    )
    prepare = Preparation(*data.moments(), shift=config.shift, mirror=data.mirror)
    batch, replicated = mesh()
    train_step = make_step(static, optimizer, prepare, batch, replicated)
    forward = make_forward(static, prepare, batch, replicated)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, norms, optimizer.init(params), augment_key, zero)
    state = folder.restore(jax.device_put(state, replicated))
    step = int(state.step)

    # --- training
    last, pending, clock = None, [], time.perf_counter()
    stop = total if config.stop_after is None else min(total, config.stop_after)
    with tqdm(total=stop, initial=step, desc=folder.path.name, unit="step") as bar:
        while step < stop:
            examples = data.train.batch(step, batch_size, config.seed)
            state, metrics = train_step(state, *jax.device_put(examples, batch))
            step += 1
            pending.append(metrics)
            checkpoint = step % config.checkpoint_every == 0 or step == stop
            end_of_epoch = step % per_epoch == 0
            if not (step % config.log_every == 0 or checkpoint or end_of_epoch):
                continue
            # Reading is what waits for the device, so all these steps are read at once.
            lines = [jax.tree.map(lambda x: x.item(), line) for line in jax.device_get(pending)]
            speed = len(lines) * batch_size / (time.perf_counter() - clock)
            for i, line in enumerate(lines, step - len(lines) + 1):
                folder.log({"step": i, **line, "examples_per_second": round(speed, 1)})
                stop_if_not_finite(i, line, folder)
            shown = {k: f"{lines[-1][k]:.3g}" for k in ("loss", "accuracy", "evaluations")}
            bar.set_postfix(shown | {"examples/s": f"{speed:.0f}"}, refresh=False)
            bar.update(len(lines))
            if end_of_epoch:
                last = {"step": step, **evaluate(forward, state, data.test, batch_size)}
                folder.log(last)
            if checkpoint:
                folder.save(step, state)
            pending, clock = [], time.perf_counter()

    # --- what is measured once
    if last is None or last["step"] != step:
        last = {"step": step, **evaluate(forward, state, data.test, batch_size)}
    model = eqx.combine(state.params, static)
    images = np.resize(data.test.images, (batch_size, *data.image_shape))
    _, solves = forward(state.params, state.norms, images)
    row = {
        "model": title(config),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        f"{data.test_name} accuracy": f"{last['eval_accuracy']:.2%}",
        "f forward": f"{last['eval_evaluations']:.1f}",
        "f backward": f"{backward_evaluations(model, solves, measure_key):.1f}",
        "seconds": f"{time.perf_counter() - start_time:.0f}",
        "folder": f"{folder.path}/",
    }
    about = f"{row['model']} on {config.dataset}, seed {config.seed}"
    folder.plot_curves(about, data.test_name)
    if solves:
        depths = [float(jnp.mean(sol.stats["num_steps"])) for _, sol in solves]
        residuals = residual_curves(model, solves, max_steps=max(12, 2 * math.ceil(max(depths))))
        folder.plot_residual(about, residuals, depths)
    folder.close()
    return row


def stop_if_not_finite(step: int, line: dict[str, Any], folder: RunFolder) -> None:
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(line[name]):
            results = ", ".join(f"{n} {code}" for code, n in line["results"].items() if n)
            raise SystemExit(
                f"Stopped: expected a finite {name.replace('_', ' ')}, got {line[name]} at step "
                f"{step} of {folder.path}, where the solves of the batch ended so: "
                f"{results or 'no solves'}. Start a new run with a lower --learning-rate."
            )


def title(config: Config) -> str:
    match config.model:
        case "implicit-resnet":
            return "RevDEQ (implicit-resnet)"
        case "resnet":
            return "explicit resnet"
        case model:
            return f"pcDEQ-{config.kind} ({model}, {config.activation})"


def table(rows: list[dict[str, Any]]) -> str:
    cells = [list(rows[0])] + [[str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in cells]
    return "\n".join(lines)


def main(config: Config) -> None:
    if config.model is not None:
        configs = [config]
    else:
        four = [("implicit-resnet", 1), ("pc-linear", 1), ("pc-linear", 2), ("resnet", 1)]
        configs = [dataclasses.replace(config, model=model, kind=kind) for model, kind in four]
        if config.name is not None:  # one prefix for four folders
            named = lambda c: f"{config.name}-{default_name(c)}"
            configs = [dataclasses.replace(c, name=named(c)) for c in configs]
    configs = [resolve(c) for c in configs]
    names = [c.name for c in configs if c.name is not None]
    if config.resume and not any((Path("runs") / name).exists() for name in names):
        raise SystemExit(
            f"--resume expected a run in one of {['runs/' + name for name in names]}, and there is "
            "none. Check --name, or start without --resume."
        )
    limit = 96 if config.smoke else None
    data = load(config.dataset, data_dir=config.data_dir, download=config.download, limit=limit)
    rows = [train(c, data) for c in configs]
    where = f"{data.test_name}: {data.about}, {len(data.test.labels):,} images"
    print(f"\n{config.dataset}, seed {config.seed}; {where}")
    print("f forward, f backward: evaluations of f per example\n")
    print(table(rows))
    print("\nEach folder: config.json, metrics.jsonl, curves.png, residual.png, checkpoints/")


if __name__ == "__main__":
    main(tyro.cli(Config))

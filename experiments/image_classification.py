"""Implicit image classifiers: a reversible and two positive concave equilibrium models.

Shown: a RevDEQ (exact gradient of the steps taken, by reversing them) and pcDEQs of both kinds
(a unique fixed point, gradient by the implicit function theorem) learn to read digits about as
well as an explicit residual network with the parameters of the RevDEQ; and of a pcDEQ it is
certified how far each solve is from its fixed point, and which predictions that cannot change.

    python experiments/image_classification.py                # digits, four models, one table
    python experiments/image_classification.py --seed 1
    python experiments/image_classification.py --dataset mnist --model implicit-resnet
    python experiments/image_classification.py --dataset mnist --model pc-linear
    python experiments/image_classification.py --preset cifar10-revdeq   # 10.3 M parameters
    python experiments/image_classification.py --preset cifar10-revdeq-short
    python experiments/image_classification.py --preset mnist-softsign-short
    python experiments/image_classification.py --preset cifar10-multi-relu6  # the paper's
    python experiments/image_classification.py --smoke        # the same, tiny, not learning

The presets of the pcDEQ paper run for 40 to 120 epochs; those of our own, -short, for minutes.
Digits come with scikit-learn. The others are read by TensorFlow Datasets from TFDS_DATA_DIR.
`--resume` with the same options goes on where a run was stopped, bit for bit. Every run has a
folder runs/<name>/ with its configuration, metrics, checkpoints and plots; a name that is taken
becomes <name>-2. Several GPUs, hosts or a TPU pod: see the README. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2. As printed:

    digits, test split of 360 images                     f forward  backward  certified  seconds
    RevDEQ (implicit-resnet), 24,106 parameters  99.17%        5.0       4.0          -       13
    pcDEQ-1 (pc-linear, tanh), 12,730            98.06%       15.7       5.2    100.00%        5
    pcDEQ-2 (pc-linear, sigmoid), 12,730         97.50%        7.6       3.1    100.00%        5
    explicit resnet, 24,106                      99.44%        1.0       1.0          -        5
      with --seed 1: 98.89%, 97.50%, 97.78%, 99.17%; 99.44% of the pcDEQ-2's are certified

    mnist, the official test split
    pcDEQ-1 (mnist-softsign-short), 479,610      99.07%       14.8       4.2     99.94%      129
    pcDEQ-2 (mnist-sigmoid-short), 70,330        98.68%        7.0       3.1     99.99%       30
    pcDEQ-1 (pc-linear, tanh), 70,330            98.64%       17.6       5.6     99.98%       18
    RevDEQ (implicit-resnet), 7,450              99.08%        5.0       4.0          -    1,008

    cifar10, the last 5,000 training images
    pcDEQ-1 (cifar10-softsign-short), 130,800    67.46%       57.9      17.6     45.98%    2,580
      after each epoch: 54.70%, 63.00%, 66.42%, 67.46%; in two stretches, with --resume

All with seed 0. certified: predictions that no point of the enclosures changes (_certified.py).
What is lost on MNIST is lost to the rounding allowed for the sums. On CIFAR-10 the boxes widen in
the signed convolutions between three solves, and more so the longer it trains. In a run of two
epochs (61.10%, 74.26% certified) the enclosure of the last solve alone would certify 99 %, of the
last two 92 %, of all 74 %, where a margin of logits, 0.82 in the median, can move by 0.02, 0.20,
0.54 (256 images). Solves to 1e-4 instead of 1e-6: 72 %.
The RevDEQ on MNIST ran in the floating-point mode, deqjax.Reversible(exact=False).
"""

from images.config import choose
from images.options import Config
from training.flags import read

if __name__ == "__main__":  # before the rest, which takes seconds to import
    choose(read(Config))

import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deqjax.models import PositiveConcaveNet

from images.certified import certified_share, measure
from images.config import title
from images.data import Dataset, load
from images.models import constructor
from images.train import Preparation, check_shift, evaluate, make_forward, make_loss
from training.devices import begin, check_batch, is_main, local, mesh, replicate
from training.fit import TrainState, fit, make_step
from training.options import RUNS, recorded
from training.plots import plot_certificates, plot_curves, plot_residual
from training.run import RunFolder
from training.solves import backward_evaluations, residual_curves
from training.table import ending


def train(config: Config, data: Dataset) -> dict[str, Any]:
    """One run, from its folder to its row of the table."""
    batch_size, n = config.batch_size, len(data.train.labels)
    assert config.epochs and config.learning_rate and config.milestone is not None  # by choose
    assert config.weight_decay is not None and config.shift is not None and config.name
    assert config.label_smoothing is not None
    check_batch(batch_size, config.accumulate, n, "images")
    check_shift(config.shift, data.image_shape)
    start_time = time.perf_counter()

    # --- network, optimiser, compiled functions
    per_epoch = n // batch_size
    total = per_epoch * config.epochs
    model_key, augment_key, measure_key = jax.random.split(jax.random.key(config.seed), 3)
    names = ("model", "features", "max_steps", "tolerance", "gradient_tolerance", "beta")
    names += ("activation", "widths", "dtype")
    try:
        make = constructor(**{name: getattr(config, name) for name in names})
        make = eqx.filter_jit(
            eqx.nn.make_with_state(make)
        )  # one compilation, not one per parameter
        model, norms = make(data.image_shape, data.num_classes, key=model_key)
    except ValueError as error:  # of the sizes, of beta
        raise SystemExit(str(error)) from None
    folder = RunFolder(RUNS, config.name, recorded(config), resume=config.resume, keep=config.keep)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(config.learning_rate, total)
    elif config.schedule == "one-cycle":
        rate = optax.cosine_onecycle_schedule(total, config.learning_rate)
    else:
        fall = round(total * config.milestone)
        rate = optax.piecewise_constant_schedule(config.learning_rate, {fall: 0.1})
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, eps=config.epsilon, weight_decay=config.weight_decay),
    )
    mirror = data.mirror if config.mirror is None else config.mirror
    prepare = Preparation(*data.moments(), shift=config.shift, mirror=mirror)
    batch, replicated = mesh()
    loss_fn = make_loss(static, prepare, batch, config.label_smoothing)
    train_step = make_step(loss_fn, optimizer, batch, replicated, accumulate=config.accumulate)
    forward = make_forward(static, prepare, batch, replicated)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, norms, optimizer.init(params), augment_key, zero)
    state = folder.restore(replicate(state, replicated))
    concave = isinstance(model, PositiveConcaveNet)
    shown_images = np.resize(data.test.images, (batch_size, *data.image_shape))

    def assess(state: TrainState) -> dict[str, Any]:
        """The line of an epoch: means over the test split, and certificates of one batch of it."""
        line = {"epoch": round(int(state.step) / per_epoch, 3)}
        line |= evaluate(forward, state, data.test, batch_size)
        if concave:
            _, solves = forward(state.params, state.norms, shown_images)
            deqs = eqx.combine(local(state.params), static).deqs
            line |= jax.tree.map(float, measure(deqs, solves))
        return line

    state, last = fit(
        folder,
        train_step,
        state,
        lambda step: data.train.batch(step, batch_size, config.seed),
        batch,
        session=config,
        total=total,
        assess=assess,
        assess_every=per_epoch,
        per_step=batch_size,
        unit="images",
    )

    # --- what is measured once
    _, solves = forward(state.params, state.norms, shown_images)
    model = eqx.combine(local(state.params), static)
    share = "-"
    if concave:
        options = (prepare, data.test, batch_size, config.certify_tolerance)
        share = certified_share(model, local(state.norms), *options)
        step = last["step"]
        # A run that goes on leaves the lines of one that never stopped, and each of them once.
        if step == total and not any("certified" in line for line in folder.metrics()):
            folder.log({"step": step, "certified": share})
    row = {
        "model": title(config),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        f"{data.test_name} accuracy": f"{last['eval_accuracy']:.2%}",
        "certified": share if isinstance(share, str) else f"{share:.2%}",
        "f forward": f"{last['eval_evaluations']:.1f}",
        "f backward": f"{backward_evaluations(model, solves, measure_key):.1f}",
        "seconds": f"{time.perf_counter() - start_time:.0f}",
        "folder": f"{folder.path}/",
    }
    if is_main():
        about = f"{row['model']} on {config.dataset}, seed {config.seed}"
        plot_curves(folder, about, data.test_name)
        if concave:
            plot_certificates(folder, about, config.tolerance)
        if solves:
            depths = [float(jnp.mean(sol.stats["num_steps"])) for _, sol in solves]
            longest = max(12, 2 * math.ceil(max(depths)))
            residuals = residual_curves(model, solves, max_steps=longest)
            plot_residual(folder, about, residuals, depths)
    folder.close()
    return row


def main(configs: list[Config]) -> None:
    config = configs[0]
    begin(config)
    dataset, limit = config.dataset, 96 if config.smoke else None
    assert dataset is not None
    data = load(dataset, data_dir=config.data_dir, download=config.download, limit=limit)
    rows = [train(c, data) for c in configs]
    if not is_main():
        return
    where = f"{data.test_name}: {data.about}, {len(data.test.labels):,} images"
    about = [f"{dataset}, seed {config.seed}; {where}"]
    about += ["f forward, f backward: evaluations of f per example"]
    about += ["certified: share of predictions that no error of the solves can change"]
    print(ending(rows, config.smoke, *about))
    print("\nEach folder: config.json, metrics.jsonl, plots, checkpoints/, tensorboard/")


if __name__ == "__main__":
    main(choose(read(Config)))

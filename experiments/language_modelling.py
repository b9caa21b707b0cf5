"""Language models: a reversible transformer and explicit ones, on any text.

Shown: one transformer block, solved for by six reversible steps, predicts text better than the
same block evaluated once, with as many parameters, on the same tokens; trained with the exact
gradient of the steps taken, in the memory of one.

    python experiments/language_modelling.py                       # Python's own reference, bytes
    python experiments/language_modelling.py --tokenizer bpe --vocabulary 2048
    python experiments/language_modelling.py --corpus tiny_shakespeare --model reversible
    python experiments/language_modelling.py --corpus wikitext-2 --data-dir FOLDER  # its words
    python experiments/language_modelling.py --corpus text --data-dir FOLDER        # any text, bpe
    python experiments/language_modelling.py --model reversible --retention learned --random-depth
    python experiments/language_modelling.py --preset paper --corpus text --data-dir FOLDER \\
        --dtype bfloat16                                          # the paper's 94 M parameters
    python experiments/language_modelling.py --smoke               # the same, tiny, not learning

tiny_shakespeare is read by TensorFlow Datasets from TFDS_DATA_DIR; a folder of WikiText holds
wiki.train.tokens and wiki.valid.tokens; a folder of text any .txt files; all of these may be
compressed. Tokenised text is cached. Perplexities are of the whole validation split, per token and,
whatever the tokens, per word; a reversible model is also evaluated after fewer and more steps than
in training, which takes as long as seven validations more (depths.json). `--resume` with the same
options goes on where a run was stopped, bit for bit. Several GPUs, hosts or a TPU pod: see the
README. Every run has a folder runs/<name>/ with its configuration, metrics, checkpoints, a sample
of text and a plot. All options: --help.

Hardware: two cores of a shared x86 CPU with other work on them, JAX 0.10.2. As printed:

    pydoc (Python 3.11), bytes, 4 epochs; 263,552 parameters each; seeds 0, 1, 2
                          validation nats           perplexity             seconds
    RevDEQ, 6 steps       1.2977  1.3018  1.3020    3.661  3.676  3.676    449  394  267
    explicit, 1 block     1.4171  1.4063  1.4102    4.125  4.081  4.097    108   69   64

    tiny_shakespeare, bytes, 3 epochs; 542,784 parameters; seed 0
    RevDEQ, 6 steps       1.5356                    4.644 (4,504 per word) 1,290

    wikitext-2, its 33,278 words, 25 minutes, the three at once (--steps 730, 1110, 710); seed 0
                          parameters  tokens seen   perplexity
    RevDEQ, 6 steps       6,833,856   1.50 M        257.7
    explicit, 1 block     6,833,856   2.27 M        216.3
    explicit, 6 blocks    9,054,336   1.45 M        217.9

On the same tokens the RevDEQ is ahead of its block; in the same time, on so few tokens, it is not.
The state came to +-12 (pydoc) and +-23 (tiny_shakespeare) of the +-2,048 that its integers hold;
the paper's network starts with +-12.
"""

from text.config import choose
from text.options import Config
from training.flags import read

if __name__ == "__main__":  # before the rest, which takes seconds to import
    choose(read(Config))

import json
import time
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from text.config import title
from text.corpus import Corpus, load
from text.language import make_evaluate, make_loss, make_model, sample
from training.devices import begin, check_batch, is_main, local, main_first, mesh, replicate
from training.fit import TrainState, fit, make_step
from training.options import RUNS, recorded
from training.plots import plot_curves
from training.run import RunFolder
from training.table import ending


def train(config: Config, corpus: Corpus) -> dict[str, Any]:
    """One run, from its folder to its row of the table."""
    size, length, peak = config.batch_size, config.length, config.learning_rate
    assert size and length and peak and config.name and config.weight_decay is not None
    check_batch(size, config.accumulate, len(corpus.train) // length, "windows")
    start_time = time.perf_counter()

    # --- network, optimiser, compiled functions
    per_epoch = corpus.steps_per_epoch(size, length)
    total = config.steps or max(1, round(per_epoch * (config.epochs or 0)))
    model_key, train_key, sample_key = jax.random.split(jax.random.key(config.seed), 3)
    try:
        model = eqx.filter_jit(make_model)(config, corpus.tokenizer.size, model_key)
    except ValueError as error:  # of the sizes, of beta
        raise SystemExit(str(error)) from None
    params, static = eqx.partition(model, eqx.is_inexact_array)
    same = recorded(config) | {"vocabulary": corpus.tokenizer.size, "text": corpus.digest}
    folder = RunFolder(RUNS, config.name, same, resume=config.resume, keep=config.keep)
    warmup = min(config.warmup, total // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total, end_value=peak / 10)
    matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            rate, b2=0.98, eps=config.epsilon, weight_decay=config.weight_decay, mask=matrices
        ),
    )
    batch, replicated = mesh()
    loss_fn = make_loss(static, config, batch)
    step = make_step(loss_fn, optimizer, batch, replicated, accumulate=config.accumulate)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, None, optimizer.init(params), train_key, zero)
    state = folder.restore(replicate(state, replicated))
    evaluate = make_evaluate(static, corpus, config, batch, replicated)

    state, last = fit(
        folder,
        step,
        state,
        lambda step: (corpus.batch(step, size, length, config.seed),),
        batch,
        session=config,
        total=total,
        assess=evaluate,
        assess_every=max(1, min(per_epoch, total // 4)),
        per_step=size * length,
        unit="tokens",
    )
    if last["step"] == total:
        # The summary is that of the checkpoint with the lowest validation loss.
        state = folder.best(state)
        if is_main():
            lines = [x for x in folder.metrics() if x.get("eval_loss") is not None]
            last = min([*lines, last], key=lambda line: line["eval_loss"])
    model = eqx.combine(local(state.params), static)
    text = sample(model, corpus, config, sample_key)
    if is_main():
        with folder.writing("sample.txt"):
            (folder.path / "sample.txt").write_text(text, encoding="utf-8")
        plot_curves(folder, f"{title(config)} on {corpus.name}, seed {config.seed}", "validation")
        print(f"\n{text}\n")
    per_word = last["eval_word_perplexity"]
    row = {
        "model": title(config),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "validation nats": f"{last['eval_loss']:.4f}",
        "per token": f"{last['eval_perplexity']:.3f}",
        "per word": f"{per_word:.1f}" if per_word < 1e6 else f"{per_word:.0e}",
        "f forward": f"{last['eval_evaluations']:.1f}",
        "seconds": f"{time.perf_counter() - start_time:.0f}",
        "folder": f"{folder.path}/",
    }
    if config.model == "reversible":
        n = config.max_steps or 1
        depths = sorted({1, max(1, n // 2), n, 2 * n, 4 * n})
        line = lambda k: last if k == n else evaluate(state, k)
        found = {k: line(k)["eval_perplexity"] for k in depths}
        if is_main():
            with folder.writing("depths.json"):
                (folder.path / "depths.json").write_text(json.dumps(found) + "\n")
            shown = ", ".join(f"{x:.3f} after {k}" for k, x in found.items())
            print(f"{title(config)}: perplexity {shown} steps\n")
    folder.close()
    return row


def main(configs: list[Config]) -> None:
    first = configs[0]
    begin(first)
    names = ("tokenizer", "vocabulary", "data_dir", "cache_dir", "download")
    options = {name: getattr(first, name) for name in names}
    options["limit"] = 4_000 if first.smoke else None
    corpus = main_first(partial(load, first.corpus, **options))
    rows = [train(c, corpus) for c in configs]
    if not is_main():
        return
    about = [f"{corpus.name}: {corpus.about}"]
    tokens = f"{len(corpus.train):,} and {len(corpus.valid):,} tokens"
    about += [f"{tokens} ({corpus.tokenizer.name}),"]
    about += [f"{corpus.valid_words:,} words of validation text; seed {first.seed}"]
    about += [
        "perplexity: of the whole validation text but its first token, per token and per word"
    ]
    print(ending(rows, first.smoke, *about))
    print("\nEach folder: config.json, metrics.jsonl, sample.txt, curves.png, checkpoints/, ...")


if __name__ == "__main__":
    main(choose(read(Config)))

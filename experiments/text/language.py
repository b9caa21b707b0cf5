"""The parts of a language model's training: the network, its loss, an evaluation."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

import deqjax
from deqjax.models import ReversibleTransformer, Transformer
from deqjax.nn import shard_solves

from text.corpus import Corpus, windows
from text.options import Config
from training.devices import local, place
from training.fit import TrainState
from training.solves import forward_evaluations, solve_metrics

Model = ReversibleTransformer | Transformer


def make_model(config: Config, size: int, key: PRNGKeyArray) -> Model:
    """The network that is asked for, of a vocabulary of `size`."""
    length, steps = config.length, config.max_steps
    assert length and steps
    names = ("width", "heads", "hidden", "rotary", "tied")
    options: dict[str, Any] = {name: getattr(config, name) for name in names} | {"key": key}
    options["compute_dtype"] = None if config.dtype == "float32" else jnp.bfloat16
    if config.model != "reversible":
        blocks = 1 if config.model == "explicit" else steps
        return Transformer(size, length, blocks=blocks, **options)
    # Zero tolerances: all windows take the same steps, and the gradient is that of these.
    exact: dict[str, Any] = {"exact": config.exact, "fraction_bits": config.fraction_bits}
    solver = deqjax.Reversible(beta=config.beta, rtol=0.0, atol=0.0, **exact)
    return ReversibleTransformer(size, length, solver=solver, max_steps=steps, **options)


def _losses(model: Model, tokens: Int[Array, "b l"]) -> tuple[Array, Any]:
    logits, solves = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), solves


def make_loss(static: PyTree, batch) -> Callable:
    """Mean cross-entropy of the next token, in nats: for `training.fit.make_step`."""

    def loss_fn(params, norms, key, tokens: Int[Array, "b l"]):
        del key
        losses, solves = _losses(shard_solves(eqx.combine(params, static), batch), tokens)
        metrics = solve_metrics(solves, len(tokens))
        for _, sol in solves:
            metrics["state_peak"] = jnp.max(jnp.abs(jax.lax.stop_gradient(sol.value)))
        return jnp.mean(losses), (norms, metrics)

    return loss_fn


def make_evaluate(static: PyTree, corpus: Corpus, config: Config, batch, replicated) -> Callable:
    """`evaluate(state)`: the validation split, every token but the first predicted once."""
    size, length = config.batch_size, config.length
    assert size and length
    tokens, counted = windows(corpus.valid, length)
    n = len(tokens)
    fill = ((0, -n % size), (0, 0))  # one compilation: the last batch is filled up
    tokens, counted = np.pad(tokens, fill), np.pad(counted, fill)

    def total(params, tokens, counted):
        losses, solves = _losses(shard_solves(eqx.combine(params, static), batch), tokens)
        evaluations = jnp.where(counted[:, 0], forward_evaluations(solves, size), 0)
        return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(evaluations)

    compiled = jax.jit(total, out_shardings=replicated)

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = [
            compiled(state.params, *place([tokens[i : i + size], counted[i : i + size]], batch))
            for i in range(0, len(tokens), size)
        ]
        nats, evaluations = np.sum(np.asarray(local(sums), np.float64), 0)
        loss = nats / counted.sum()
        per_word = nats / corpus.valid_words
        return {
            "eval_loss": float(loss),
            "eval_perplexity": math.exp(min(loss, 700)),
            "eval_word_perplexity": math.exp(min(per_word, 700)),
            "eval_evaluations": float(evaluations / n),
        }

    return evaluate


def sample(model: Model, corpus: Corpus, config: Config, key: PRNGKeyArray) -> str:
    """Text by the model after the first tokens of the validation split, and a | between them."""
    length = config.length
    assert length
    prompt = jnp.asarray(corpus.valid[: max(1, length // 4)], jnp.int32)
    # Rotary positions go on for ever, but what was never trained is not worth reading.
    count = min(config.sample, length - len(prompt))
    if count < 1:
        return corpus.tokenizer.decode(np.asarray(prompt))
    new = np.asarray(model.generate(prompt, count, temperature=config.temperature, key=key))
    return f"{corpus.tokenizer.decode(np.asarray(prompt))}|{corpus.tokenizer.decode(new[new >= 0])}"

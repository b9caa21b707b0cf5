"""The parts of a language model's training: the network, its loss, an evaluation."""

import dataclasses
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
from training.depth import drawn_steps, learned_beta, most_drawn
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
    beta = config.beta
    if config.retention == "learned":
        beta = learned_beta(beta, options["width"])
    solver = deqjax.Reversible(beta=beta, rtol=0.0, atol=0.0, **exact)
    options["adjoint"] = deqjax.ReversibleAdjoint(last=config.last)
    return ReversibleTransformer(size, length, solver=solver, max_steps=steps, **options)


def deeper(model: ReversibleTransformer, steps: int) -> ReversibleTransformer:
    """The model with another ceiling on its steps."""
    deq = dataclasses.replace(model.deq, max_steps=steps)
    return eqx.tree_at(lambda model: model.deq, model, deq)


def _losses(model: Model, tokens: Int[Array, "b l"], **steps: Any) -> tuple[Array, Any]:
    logits, solves = model(tokens[:, :-1], **steps)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), solves


def make_loss(static: PyTree, config: Config, batch) -> Callable:
    """Mean cross-entropy of the next token, in nats: for `training.fit.make_step`."""
    n = config.max_steps
    assert n

    def loss_fn(params, norms, key, tokens: Int[Array, "b l"]):
        model, steps = eqx.combine(params, static), {}
        if config.random_depth:
            model = deeper(model, most_drawn(n))
            steps["steps"] = drawn_steps(key, n)
        losses, solves = _losses(shard_solves(model, batch), tokens, **steps)
        metrics = solve_metrics(solves, len(tokens))
        for _, sol in solves:
            metrics["state_peak"] = jnp.max(jnp.abs(jax.lax.stop_gradient(sol.value)))
        return jnp.mean(losses), (norms, metrics)

    return loss_fn


def make_evaluate(static: PyTree, corpus: Corpus, config: Config, batch, replicated) -> Callable:
    """`evaluate(state, steps=None)`: the validation split, every token but the first predicted
    once; with as many steps as in training, or so many.
    """
    size, length = config.batch_size, config.length
    assert size and length
    tokens, counted = windows(corpus.valid, length)
    n = len(tokens)
    fill = ((0, -n % size), (0, 0))  # one compilation: the last batch is filled up
    tokens, counted = np.pad(tokens, fill), np.pad(counted, fill)

    def total(params, tokens, counted, steps):
        model = eqx.combine(params, static)
        if steps is not None:
            model = deeper(model, steps)
        losses, solves = _losses(shard_solves(model, batch), tokens)
        evaluations = jnp.where(counted[:, 0], forward_evaluations(solves, size), 0)
        return jnp.sum(jnp.where(counted, losses, 0)), jnp.sum(evaluations)

    compiled = jax.jit(total, out_shardings=replicated, static_argnums=3)

    def evaluate(state: TrainState, steps: int | None = None) -> dict[str, float]:
        part = lambda i: place([tokens[i : i + size], counted[i : i + size]], batch)
        sums = [compiled(state.params, *part(i), steps) for i in range(0, len(tokens), size)]
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

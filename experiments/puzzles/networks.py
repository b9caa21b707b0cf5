"""One weight-tied cell a family, and the equilibrium layer that repeats it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

import deqjax

from puzzles.options import Config
from puzzles.tasks import Task
from training.depth import learned_beta, most_drawn

# The examples of a batch: what is given, and a key each for what an evaluation draws, or None.
Given = tuple[Int[Array, "..."], UInt32[Array, " 2"] | None]


def rms(z: Float[Array, "... d"]) -> Float[Array, "... d"]:
    return z * jax.lax.rsqrt(jnp.mean(z**2, -1, keepdims=True) + 1e-6)


def _random(key: PRNGKeyArray, *shape: int) -> Float[Array, "..."]:
    return jax.random.normal(key, shape) / shape[0] ** 0.5


def _drawn(key: Any, step: Any) -> PRNGKeyArray:
    """The key of an evaluation: a function of the step number, so that it is the same reversed."""
    return jax.random.fold_in(jax.random.wrap_key_data(key), step)


class MLP(eqx.Module):
    """`silu(x A) B` on the last axis."""

    up: Float[Array, "d h"]
    down: Float[Array, "h d"]

    def __init__(self, width: int, hidden: int, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.up, self.down = _random(keys[0], width, hidden), _random(keys[1], hidden, width)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return jax.nn.silu(x @ self.up) @ self.down


class OverCells(eqx.Module):
    """Mixes cells by an MLP over the axis of cells."""

    mlp: MLP

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return self.mlp(x.T).T


class Attention(eqx.Module):
    """Mixes cells by attention of all to all, four heads."""

    project: Float[Array, "d e"]
    out: Float[Array, "d d"]

    def __init__(self, width: int, key: PRNGKeyArray):
        keys = jax.random.split(key)
        self.project, self.out = _random(keys[0], width, 3 * width), _random(keys[1], width, width)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        heads = (rms(x) @ self.project).reshape(len(x), 3, 4, -1)
        mixed = jax.nn.dot_product_attention(heads[:, 0], heads[:, 1], heads[:, 2])
        return mixed.reshape(x.shape) @ self.out


class Mixer(eqx.Module):
    """`z' = rms(z + mix(z + x))`, then `rms(z' + MLP(z' + x))`: x, what is given, at every step."""

    embedding: Float[Array, "kinds d"]
    position: Float[Array, "n d"]
    mix: OverCells | Attention
    mlp: MLP
    head: Float[Array, "d labels"]
    noise: float

    def __init__(self, config: Config, task: Task, key: PRNGKeyArray):
        n, width, hidden = task.train[0][0].size, config.width, config.hidden
        assert width and hidden
        keys = jax.random.split(key, 5)
        self.embedding = jax.random.normal(keys[0], (task.tokens, width))
        self.position = jax.random.normal(keys[1], (n, width))
        mlp = config.mixing == "mlp"
        self.mix = OverCells(MLP(n, 2 * n, keys[2])) if mlp else Attention(width, keys[2])
        self.mlp = MLP(width, hidden, keys[3])
        self.head = _random(keys[4], width, task.labels)
        self.noise = config.noise

    def inject(self, given: Given) -> tuple[Array, Any]:
        tokens, key = given
        return self.embedding[tokens.reshape(-1)] + self.position, key

    def initial(self, given: tuple[Array, Any]) -> Float[Array, "n d"]:
        return jnp.zeros_like(given[0])

    def __call__(self, z: Float[Array, "n d"], given: tuple[Array, Any], step: Any = None):
        x, key = given
        if self.noise:
            z = z + self.noise * jax.random.normal(_drawn(key, step), z.shape, z.dtype)
        z = rms(z + self.mix(z + x))
        return rms(z + self.mlp(z + x))

    def readout(self, z: Float[Array, "n d"]) -> Float[Array, "n labels"]:
        return z @ self.head


class Automaton(eqx.Module):
    """`z + MLP(z, its gradient, its Laplacian, x)` of each cell of a grid, clipped to +-4.

    A cell sees its neighbours alone. If a picture is wanted, nothing is injected: the one cell that
    is not zero at the start says which.
    """

    embedding: Float[Array, "kinds d"] | None
    up: Float[Array, "p h"]
    bias: Float[Array, " h"]
    down: Float[Array, "h d"]
    head: Float[Array, "d labels"] | None
    side: int = eqx.field(static=True)
    noise: float
    fire: float

    def __init__(self, config: Config, task: Task, key: PRNGKeyArray):
        width, hidden = config.width, config.hidden
        assert width and hidden
        keys = jax.random.split(key, 4)
        self.embedding = _random(keys[0], task.tokens, width) if task.tokens else None
        self.up = _random(keys[1], (5 if task.tokens else 4) * width, hidden)
        self.bias = jnp.zeros(hidden)
        self.down = 0.1 * _random(keys[2], hidden, width)
        self.head = _random(keys[3], width, task.labels) if task.tokens else None
        self.side = task.test[1].shape[-1]
        self.noise, self.fire = config.noise, config.fire

    def inject(self, given: Given) -> tuple[Array, Any]:
        tokens, key = given
        return tokens if self.embedding is None else self.embedding[tokens], key

    def initial(self, given: tuple[Array, Any]) -> Float[Array, "s s d"]:
        z = jnp.zeros((self.side, self.side, self.down.shape[1]))
        if self.embedding is not None:
            return z
        first = jnp.zeros(z.shape[-1]).at[0].set(1).at[1 + given[0]].set(1)
        return z.at[self.side // 2, self.side // 2].set(first)

    def __call__(self, z: Float[Array, "s s d"], given: tuple[Array, Any], step: Any = None):
        x, key = given
        if self.noise:
            z = z + self.noise * jax.random.normal(_drawn(key, 2 * step), z.shape, z.dtype)
        seen = perceived(z) if self.embedding is None else jnp.concatenate([perceived(z), x], -1)
        update = jax.nn.relu(seen @ self.up + self.bias[None, None]) @ self.down
        if self.fire < 1:
            cells = jax.random.bernoulli(_drawn(key, 2 * step + 1), self.fire, (*z.shape[:2], 1))
            update = jnp.where(cells, update, 0)
        return jnp.clip(z + update, -4, 4)

    def readout(self, z: Float[Array, "s s d"]) -> Float[Array, "s s ..."]:
        return z[..., 0] if self.head is None else z @ self.head


def perceived(z: Float[Array, "s s d"]) -> Float[Array, "s s p"]:
    """Each cell, its central differences and its Laplacian; beyond the border is zero."""
    padded = jnp.pad(z, ((1, 1), (1, 1), (0, 0)))
    up, down = padded[:-2, 1:-1], padded[2:, 1:-1]
    left, right = padded[1:-1, :-2], padded[1:-1, 2:]
    laplacian = up + down + left + right - 4 * z
    return jnp.concatenate([z, (down - up) / 2, (right - left) / 2, laplacian], -1)


def make_model(config: Config, task: Task, key: PRNGKeyArray) -> deqjax.nn.DEQ:
    """The layer that is asked for; its gradient goes through the last `last[0]` evaluations."""
    kind = Automaton if config.mixing == "automaton" else Mixer
    width, evaluations, last = config.width, config.evaluations, config.depth or None
    assert width and evaluations
    beta = learned_beta(0.5, width) if config.retention == "learned" else 0.5
    adjoint = {
        "exact": deqjax.ReversibleAdjoint(last=last),
        "checkpointed": deqjax.RecursiveCheckpointAdjoint(last=last),
        "one-step": deqjax.JacobianFreeAdjoint(),
        "implicit": deqjax.ImplicitAdjoint(on_failure="keep"),
    }[config.adjoint]
    # Zero tolerances: a recursion of so many evaluations, not a solve.
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, guard_bits=config.guard_bits)
    most = most_drawn(evaluations) if config.random_depth else evaluations
    cell = kind(config, task, key)
    return deqjax.nn.DEQ(cell, solver, adjoint, max_steps=most, indexed=config.draws)

"""A tiny training run: imported by tests, and run as processes to kill."""

import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import deqjax

from training.devices import initialize, local, mesh, replicate
from training.fit import TrainState, fit, make_step
from training.options import Session
from training.run import RunFolder
from training.solves import solve_metrics

SIZE, BATCH = 6, 16
SOLVER = deqjax.FixedPointIteration(rtol=1e-5, atol=1e-5)  # stops by example
ADJOINT = deqjax.ImplicitAdjoint(deqjax.FixedPointIteration(rtol=1e-5))


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


def weight():
    return jnp.asarray(np.random.default_rng(0).normal(0, 0.25, (SIZE, SIZE)), jnp.float32)


def batch_of(step, size=BATCH):
    x = np.random.default_rng([1, step]).normal(size=(size, SIZE)).astype(np.float32)
    return x, np.sin(x)


def loss_fn(weight, norms, key, x, y, solver=SOLVER, adjoint=ADJOINT, max_steps=60, over=None):
    # Noise, so that a key which is not the checkpoint's is noticed.
    x = x + 0.1 * jax.random.normal(key, (1, SIZE))
    deq = deqjax.nn.DEQ(Cell(weight), solver, adjoint, max_steps=max_steps)
    z, sol = deqjax.nn.shard_solves(deq, over).batch(x)
    metrics = solve_metrics([(x, sol)], len(x))
    return jnp.mean((z - y) ** 2), (norms, metrics)


def initial(optimizer, replicated):
    params, zero = weight(), jnp.zeros((), jnp.int32)
    state = TrainState(params, None, optimizer.init(params), jax.random.key(0), zero)
    return replicate(state, replicated)


def train(
    root: Path,
    *,
    total: int = 20,
    resume: bool = False,
    seconds: float = 0.0,
    pause: int | None = None,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> TrainState:
    """Take `total` steps of at least so many seconds, with a checkpoint every four.

    After the step `pause` it waits until there is a file `go`.
    """
    initialize(distributed, coordinator, processes, process_id)
    batch, replicated = mesh()
    optimizer = optax.sgd(0.1, momentum=0.9)
    folder = RunFolder(root, "tiny", {"seed": 0}, resume=resume)
    state = folder.restore(initial(optimizer, replicated))

    def slowly(step):
        time.sleep(seconds)
        while step == pause and not (root / "go").exists():
            time.sleep(0.02)
        return batch_of(step)

    def assess(state):
        params, key = local(state.params), jax.random.key(1)
        return {"eval_loss": float(loss_fn(params, None, key, *batch_of(1000))[0])}

    state, _ = fit(
        folder,
        make_step(partial(loss_fn, over=batch), optimizer, batch, replicated),
        state,
        slowly,
        batch,
        session=Session(log_every=1, checkpoint_every=4),
        total=total,
        assess=assess,
        assess_every=10,
        per_step=BATCH,
        unit="images",
    )
    folder.close()
    return state


if __name__ == "__main__":
    tyro.cli(train)

"""Measurements of the solves of a model: evaluations, result codes, residuals.

`solves` holds (input, solution) of each equilibrium layer, in the order of `model.deqs`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paramax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

import deqjax

CODES = {
    "successful": deqjax.RESULTS.successful,
    "max_steps": deqjax.RESULTS.nonlinear_max_steps_reached,
    "divergence": deqjax.RESULTS.nonlinear_divergence,
    "nonfinite": deqjax.RESULTS.nonfinite,
}


def solve_metrics(solves, n: int) -> dict[str, Any]:
    """The mean evaluations of f per example of a training step, and how many solves ended how."""
    return {
        "evaluations": jnp.mean(forward_evaluations(solves, n)),
        "results": _count(solves),
    }


def forward_evaluations(solves, n: int) -> Float[Array, " n"]:
    """Evaluations of f each example costs in a forward pass, summed over the solves.

    A network without solves applies its cells once each, which counts as 1.
    """
    if not solves:
        return jnp.ones(n)
    counts = jnp.stack([sol.stats["num_fn_evals"] for _, sol in solves])
    return jnp.sum(counts, 0, dtype=jnp.float32)


def backward_evaluations(model: PyTree, solves, key: PRNGKeyArray) -> float:
    """Evaluations of f with its VJP that an example costs in a backward pass, over the solves.

    `ReversibleAdjoint` takes one for each step of the forward solve, num_steps, and in the exact
    mode evaluates f alone once more. `ImplicitAdjoint` solves (I - J^T) y = g by the VJPs of an
    iteration: their mean number over the batch is measured with `deqjax.implicit_vjp`, at the
    solution the model found and with a cotangent g drawn from the unit normal distribution; one
    more VJP finds that the tolerance is met, and another carries y to the parameters. A network
    without solves applies the VJPs of its cells once each, which counts as 1.
    """
    if not model.deqs:
        return 1.0
    total = 0.0
    for deq, (x, sol) in zip(model.deqs, solves, strict=True):
        if isinstance(deq.adjoint, deqjax.ReversibleAdjoint):
            total += float(jnp.mean(sol.stats["num_steps"]))
            continue
        cell = paramax.unwrap(deq.cell)
        inject = getattr(cell, "inject", None)
        x = x if inject is None else jax.vmap(inject)(x)
        cotangent = jax.random.normal(key, sol.value.shape, sol.value.dtype)
        _, stats = deqjax.implicit_vjp(
            jax.vmap(cell),
            sol.value,
            x,
            cotangent,
            adjoint=deq.adjoint,
            max_steps=deq.max_steps,
            batched=True,
        )
        total += float(jnp.mean(stats["num_steps"])) + 2.0
    return total


def residual_curves(model: PyTree, solves, max_steps: int) -> list[np.ndarray]:
    """||f(z_k) - z_k|| / ||f(z_k)|| of k = 0 .. max_steps, (steps, examples), for each solve.

    Each k is a solve of its own from the start, its number of steps traced: one compilation.
    """
    curves = []
    for deq, (x, _) in zip(model.deqs, solves, strict=True):
        solver = dataclasses.replace(deq.solver, rtol=0.0, atol=0.0)  # never stops early
        deq = dataclasses.replace(deq, solver=solver, max_steps=max_steps)
        x = x[:16]  # each of them costs max_steps^2 / 2 evaluations
        residual = lambda k, deq=deq, x=x: deq.batch(x, steps=k)[1].stats["residual"]
        curves.append(np.asarray(jax.lax.map(residual, jnp.arange(max_steps + 1))))
    return curves


def _count(solves) -> dict[str, Array]:
    """The number of solves that ended with each result code."""
    codes = [sol.result for _, sol in solves]
    return {
        name: sum((jnp.sum(code == c) for c in codes), jnp.zeros((), int))
        for name, code in CODES.items()
    }

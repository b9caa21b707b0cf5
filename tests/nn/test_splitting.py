"""A splitting in a layer: what its state is, what training leaves, and what it refuses."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest

import deqjax
from deqjax.nn import DEQ, ForwardBackward, MonotoneLinear


def test_a_warm_start_is_the_state_and_not_the_output(getkey):
    """And so is what a predictor has to predict: relu(u) has lost the negative part of u."""
    deq = DEQ(
        MonotoneLinear(8, 0.5, key=getkey()).peaceman_rachford(0.3),
        deqjax.FixedPointIteration(),
        deqjax.ImplicitAdjoint(),
    )
    x = jax.random.normal(getkey(), (8,))
    z, sol = deq(x)
    assert jnp.any(sol.value < 0) and jnp.all(z >= 0)
    steps = lambda z0: int(deq(x, z0)[1].stats["num_steps"])
    assert steps(sol.value) <= 1 < steps(z)
    predicting = dataclasses.replace(deq, predictor=lambda x: sol.value)
    assert predicting(x)[1].stats["num_steps"] <= 1


def test_training_moves_the_weight_and_keeps_the_margin(getkey):
    x, target = jax.random.normal(getkey(), (2, 5, 6))
    solver = deqjax.FixedPointIteration(rtol=1e-5, atol=1e-6)
    cell = MonotoneLinear(6, 0.2, key=getkey())
    deq = DEQ(cell.peaceman_rachford(), solver, deqjax.ImplicitAdjoint())

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(deq):
        return jnp.mean((deq.batch(x)[0] - jnp.abs(target)) ** 2)

    values = []
    for _ in range(10):
        value, grads = loss(deq)
        values.append(float(value))
        deq = eqx.apply_updates(deq, jax.tree.map(lambda g: -0.3 * g, grads))
    assert values[-1] < 0.9 * values[0]
    splitting: Any = deq.cell
    w = np.asarray(paramax.unwrap(splitting.weight))
    assert np.linalg.eigvalsh(np.eye(6) - (w + w.T) / 2)[0] > 0.2 - 1e-6
    # The step has followed, and the trained cell is at hand.
    trained = eqx.tree_at(lambda c: c.weight, cell, splitting.weight)
    assert abs(trained.lipschitz() / cell.lipschitz() - 1) > 1e-3
    steps = (1 / trained.lipschitz(), trained.margin / trained.lipschitz() ** 2)
    for f, step in zip((splitting, trained.forward_backward()), steps, strict=True):
        assert f.step is None
        np.testing.assert_allclose(paramax.unwrap(f).step, step, rtol=1e-6)
    z, _ = deq(x[0])
    np.testing.assert_allclose(trained(z, x[0]), z, atol=1e-3)


def test_bad_numbers_raise(getkey):
    for margin in (0.0, -1.0, True, float("inf"), jnp.ones(())):
        with pytest.raises(ValueError, match="number above 0 as margin"):
            MonotoneLinear(3, margin, key=getkey())  # pyright: ignore
    cell = MonotoneLinear(3, key=getkey())
    for size in (0, 4.0, True):
        with pytest.raises(ValueError, match="size to be an int of at least 1"):
            MonotoneLinear(size, key=getkey())  # pyright: ignore
    with pytest.raises(ValueError, match="weight without a margin"):
        ForwardBackward(jnp.eye(3))
    for step in (0.0, -1.0, True, float("inf"), jnp.ones(())):
        for make in (cell.forward_backward, cell.peaceman_rachford):
            with pytest.raises(ValueError, match="number above 0 as step"):
                make(step)  # pyright: ignore

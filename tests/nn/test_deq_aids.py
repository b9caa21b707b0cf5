"""Aids to training a layer: a predictor, weights made once a solve, a random depth."""

import collections
import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from layers import BATCH, FIXED, KEY, PICARD, SIZE, UNROLLED, cell, inputs, layer

import deqjax


def test_the_predictor_starts_the_solve():
    """It sees the injected x, one example at a time; a solution costs no step; z0 goes first."""
    xs = inputs(BATCH, SIZE)
    w = cell().weight

    def solution(x):
        assert x.shape == (SIZE,)
        return jnp.linalg.solve(jnp.eye(SIZE) - w, x)

    deq = layer(cell(scale=2.0), predictor=solution)
    z, sol = deq.batch(xs)
    np.testing.assert_array_equal(sol.stats["num_steps"], 0)
    one, sol = deq(xs[0])
    assert sol.stats["num_steps"] == 0
    np.testing.assert_allclose(z[0], one, rtol=1e-5)
    zeros, sol = deq(xs[0], jnp.zeros(SIZE))
    assert sol.stats["num_steps"] > 5
    np.testing.assert_allclose(zeros, one, rtol=1e-4, atol=1e-5)
    again, sol = layer(cell(scale=2.0)).batch(xs, z)
    np.testing.assert_array_equal(sol.stats["num_steps"], 0)
    np.testing.assert_array_equal(again, z)


def test_a_cell_says_where_its_solve_starts(getkey):
    """Below the fixed point, of the injected x; z0 and a predictor go first."""
    xs = inputs(BATCH, SIZE)
    deq = layer(deqjax.nn.PositiveConcaveLinear(SIZE, key=getkey()), FIXED, max_steps=1)
    f = jax.vmap(paramax.unwrap(deq.cell))
    x = jax.vmap(deq.cell.inject)(xs)
    start = jax.vmap(deq.cell.initial)(x)
    np.testing.assert_allclose(deq.batch(xs)[0], f(start, x), rtol=1e-6)
    np.testing.assert_allclose(deq(xs[0])[0], f(start, x)[0], rtol=1e-6)
    np.testing.assert_allclose(start, f(0 * start, x), rtol=1e-6)
    assert jnp.all(start <= f(start, x))
    ones = jnp.ones_like(start)
    np.testing.assert_allclose(deq.batch(xs, ones)[0], f(ones, x), rtol=1e-6)
    predicted = dataclasses.replace(deq, predictor=jnp.ones_like)
    np.testing.assert_allclose(predicted.batch(xs)[0], f(ones, x), rtol=1e-6)


def test_the_gradient_of_a_predictor():
    """`dz_n/dp = W^n` of the steps taken; none of the fixed point, for which there is the loss."""
    x, g = inputs(2, SIZE)

    class Constant(eqx.Module):
        value: jax.Array

        def __call__(self, x):
            return self.value

    def gradient(solver, adjoint, auxiliary):
        @eqx.filter_jit
        @eqx.filter_grad
        def grad(deq):
            z, _ = deq(x)
            miss = jnp.mean((deq.predictor(x) - jax.lax.stop_gradient(z)) ** 2)
            return miss if auxiliary else g @ z

        deq = layer(cell(), solver, adjoint, 3, predictor=Constant(jnp.zeros(SIZE)))
        return grad(deq).predictor.value

    power = np.linalg.matrix_power(np.asarray(cell().weight), 3)
    np.testing.assert_allclose(gradient(FIXED, UNROLLED, False), power.T @ g, rtol=1e-4, atol=1e-6)
    assert jnp.all(gradient(PICARD, deqjax.ImplicitAdjoint(), False) == 0)
    z, _ = layer(cell(), PICARD, max_steps=3)(x)
    auxiliary = gradient(PICARD, deqjax.ImplicitAdjoint(), True)
    np.testing.assert_allclose(auxiliary, -2 * z / SIZE, rtol=1e-5)


class Counted(paramax.AbstractUnwrappable):
    weight: jax.Array
    count: collections.Counter = eqx.field(static=True)

    def unwrap(self):
        self.count["unwraps"] += 1
        return self.weight


@pytest.mark.parametrize("adjoint", [deqjax.ImplicitAdjoint(), UNROLLED])
def test_weights_are_materialised_once_a_solve(adjoint):
    """For the whole of a loss and its gradient, and in no loop."""
    count = collections.Counter()
    deq = layer(dataclasses.replace(cell(), weight=Counted(cell().weight, count)), adjoint=adjoint)
    xs = inputs(BATCH, SIZE)
    for run in (lambda deq: deq(xs[0])[0], lambda deq: deq.batch(xs, key=KEY)[0]):
        count.clear()
        value, grads = eqx.filter_value_and_grad(lambda deq, run=run: jnp.sum(run(deq)))(deq)
        assert count["unwraps"] == 1
        assert jnp.isfinite(value) and jnp.any(grads.cell.weight.weight != 0)


def test_weight_normalisation():
    """paramax's own: rows of length s. The cell sees them, and both of its parameters learn."""
    normed = paramax.WeightNormalization(cell().weight)
    scale = paramax.Parameterize(jnp.exp, jnp.full((SIZE, 1), -1.5))
    normed = eqx.tree_at(lambda n: n.scale, normed, scale)
    deq = layer(dataclasses.replace(cell(), weight=normed))
    x = inputs(SIZE)
    w = np.asarray(cell().weight, np.float64)
    w = np.exp(-1.5) * w / np.linalg.norm(w, axis=1, keepdims=True)
    z = np.linalg.solve(np.eye(SIZE) - w, x)
    np.testing.assert_allclose(deq(x)[0], z, rtol=1e-4, atol=1e-5)
    grads = eqx.filter_grad(lambda deq: jnp.sum(deq(x)[0]))(deq).cell.weight
    y = np.linalg.solve((np.eye(SIZE) - w).T, np.ones(SIZE))
    np.testing.assert_allclose(grads.scale.args[0][:, 0], y * (w @ z), rtol=1e-3, atol=1e-5)
    assert jnp.any(grads.weight != 0)


@pytest.mark.parametrize("adjoint", [deqjax.ReversibleAdjoint(), UNROLLED])
def test_a_random_depth_never_traces_again(adjoint):
    """A depth drawn inside each training step: the value of that many steps, and one program."""
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=0.5)
    deq = layer(cell(), solver, adjoint, 12)
    xs = inputs(BATCH, SIZE)
    count = collections.Counter()

    @eqx.filter_jit
    def train(deq, key):
        count["traces"] += 1
        depth_key, mask_key = jax.random.split(key)
        depth = jax.random.randint(depth_key, (), 4, 13)

        @eqx.filter_value_and_grad(has_aux=True)
        def loss(deq):
            z, sol = deq.batch(xs, steps=depth, key=mask_key)
            return jnp.sum(z**2), (z, sol.stats["num_steps"])

        (_, out), grads = loss(deq)
        return (depth, mask_key, *out), eqx.apply_updates(
            deq, jax.tree.map(lambda g: -0.01 * g, grads)
        )

    depths = set()
    for i in range(5):
        before = deq
        (depth, key, z, num_steps), deq = train(deq, jax.random.fold_in(KEY, i))
        depths.add(int(depth))
        np.testing.assert_array_equal(num_steps, depth)
        at = dataclasses.replace(before, max_steps=int(depth)).batch(xs, key=key)[0]
        np.testing.assert_allclose(z, at, rtol=1e-5, atol=1e-6)
    assert count["traces"] == 1 and len(depths) > 2


def test_the_zero_start_is_no_constant():
    """XLA folds tests of a constant z0 entry by entry, for half a minute at 2 million entries."""
    solver = deqjax.Reversible(rtol=0.0, atol=0.0)
    f = lambda z, x: jnp.tanh(z + x)
    deq = deqjax.nn.DEQ(f, solver, deqjax.ReversibleAdjoint(), max_steps=2)
    text = jax.jit(lambda x: deq(x)[0]).lower(jnp.ones(3)).as_text()
    assert "optimization_barrier" in text.split("while")[0]

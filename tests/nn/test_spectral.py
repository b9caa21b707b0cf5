"""Spectral normalisation, against singular values in float64."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from layers import BATCH, KEY, SIZE, cell, inputs, layer
from problems import matrix

from deqjax import nn


@pytest.mark.parametrize("shape", [(7, 5), (3, 3, 4, 5), (128, 128)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_spectral_norm(shape, dtype):
    """At the bound from the start; a small weight is left alone, a zero one is no NaN."""
    weight = jax.random.normal(KEY, shape).astype(dtype)
    norm = lambda w: np.linalg.norm(np.asarray(w, np.float64).reshape(-1, shape[-1]), 2)
    wrapped = nn.SpectralNorm(weight, 0.9, key=KEY)
    unwrapped = paramax.unwrap(wrapped)
    assert unwrapped.dtype == dtype
    rounding = float(jnp.finfo(dtype).eps)
    # A large random matrix has its singular values close together.
    slack = 1e-2 if len(weight) > 100 else 1e-5
    np.testing.assert_allclose(norm(unwrapped), 0.9, rtol=max(slack, rounding))
    small = weight * jnp.asarray(0.5 / norm(weight), dtype)
    zero = jnp.zeros(shape, dtype)
    with_weight = lambda w: eqx.tree_at(lambda s: s.weight, wrapped, w)
    for w in (small, zero):
        np.testing.assert_array_equal(paramax.unwrap(with_weight(w)), w)
    grad = jax.grad(lambda w: jnp.sum(paramax.unwrap(with_weight(w)).astype(jnp.float32)))(zero)
    np.testing.assert_array_equal(grad, jnp.ones_like(zero))
    stays = nn.power_step(with_weight(zero))
    jax.tree.map(np.testing.assert_array_equal, stays, with_weight(zero))
    started = nn.SpectralNorm(zero, key=KEY)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(started))


def test_spectral_norm_of_a_convolution():
    """At most sqrt(h w) times the bound, which a kernel of ones comes close to."""
    conv = nn.Conv2d(1, 1, use_bias=False, key=KEY)
    ones = nn.SpectralNorm(jnp.ones((3, 3, 1, 1)), 0.9, key=KEY)
    conv = paramax.unwrap(eqx.tree_at(lambda c: c.kernel, conv, ones))
    jacobian = jax.jacobian(conv)(jnp.zeros((16, 16, 1))).reshape(256, 256)
    exact = 0.3 * (1 + 2 * np.cos(np.pi / 17)) ** 2
    np.testing.assert_allclose(np.linalg.norm(jacobian, 2), exact, rtol=1e-5)
    assert 0.95 * 2.7 < exact < 2.7


@pytest.mark.x64
def test_the_gradient_of_spectral_norm():
    """Miyato et al.: `bound / sigma (G - <G, W / sigma> u v^T)`; none to u and v."""
    w, g = (jnp.asarray(matrix(SIZE, 3.0, seed)) for seed in (0, 1))
    wrapped = nn.SpectralNorm(w, 0.9, key=KEY)
    grads = eqx.filter_grad(lambda s: jnp.sum(g * paramax.unwrap(s)))(wrapped)
    u, sigma, v = np.linalg.svd(w)
    uv = np.outer(u[:, 0], v[0])
    truth = 0.9 / sigma[0] * (g - np.sum(g * w / sigma[0]) * uv)
    np.testing.assert_allclose(grads.weight, truth, rtol=1e-6, atol=1e-8)
    assert all(jnp.all(x == 0) for x in jax.tree.leaves((grads.u, grads.v)))
    is_frozen = lambda x: isinstance(x, paramax.NonTrainable)
    trained = eqx.filter(wrapped, eqx.is_inexact_array, is_leaf=is_frozen)
    assert len(jax.tree.leaves(trained)) == 1


def test_power_step_follows_a_trained_weight():
    """One step a training step bounds a weight that the loss pulls outwards, turning it.

    And Adam, which moves whatever has a gradient by its learning rate, leaves u and v alone.
    """
    normed = nn.SpectralNorm(cell().weight, 0.9, key=KEY)
    deq = layer(dataclasses.replace(cell(), weight=normed), max_steps=400)
    xs = inputs(BATCH, SIZE)
    adam = optax.adam(0.01)

    @eqx.filter_jit
    def train(deq, state):
        grads = eqx.filter_grad(lambda deq: -jnp.sum(deq.batch(xs)[0] ** 2))(deq)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, state = adam.update(grads, state)
        return eqx.apply_updates(deq, updates), state

    state = adam.init(eqx.filter(deq, eqx.is_inexact_array))
    vectors = lambda deq: (deq.cell.weight.u, deq.cell.weight.v)
    for _ in range(60):
        new, state = train(deq, state)
        jax.tree.map(np.testing.assert_array_equal, vectors(deq), vectors(new))
        deq = nn.power_step(new)
    trained = deq.cell.weight
    assert np.linalg.norm(trained.weight, 2) > 1.2
    np.testing.assert_allclose(np.linalg.norm(paramax.unwrap(trained), 2), 0.9, rtol=0.01)
    # Without those steps it would not have been bounded.
    stale = eqx.tree_at(lambda s: s.weight, normed, trained.weight)
    assert np.linalg.norm(paramax.unwrap(stale), 2) > 1


def test_bad_spectral_norm_raises():
    for weight, bound in ((jnp.ones(3), 0.9), (jnp.ones((2, 2, 2)), 0.9), (jnp.eye(2), 0.0)):
        with pytest.raises(ValueError, match=r"\(out, in\) or \(h, w, i, o\) and a bound above 0"):
            nn.SpectralNorm(weight, bound, key=KEY)

"""One mask a solve, and an example."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from layers import BATCH, KEY, PICARD, SIZE, UNROLLED, cell, inputs, layer

import deqjax
from deqjax import nn


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dropout(dtype):
    """Identities are exact; else one mask, shared along axes of length 1, in the input's dtype."""
    z = jax.random.normal(KEY, (300, SIZE)).astype(dtype)
    drop = nn.VariationalDropout((300, 1), 0.25)
    np.testing.assert_array_equal(drop(z), z)
    zero = nn.draw_masks(nn.VariationalDropout((300, 1), 0.0), key=KEY)
    np.testing.assert_array_equal(zero(z), z)
    drawn = nn.draw_masks({"a": drop, "b": (drop, 1.0)}, key=KEY)
    one, two = drawn["a"], drawn["b"][0]
    assert one(z).dtype == dtype
    kept = np.asarray(one(z) != 0)
    assert np.all(kept == kept[:, :1])  # along the axis of length 1
    np.testing.assert_array_equal(one(z), jnp.where(kept, z / 0.75, 0))
    assert abs(kept[:, 0].mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 300)
    assert jnp.any(one.mask != two.mask)


def test_a_mask_lasts_for_a_solve():
    """`z = m W z / (1 - p) + x`: value and gradient by a linear solve with the mask of the key."""
    xs, g = inputs(BATCH, SIZE), jnp.arange(1.0, SIZE + 1)
    deq = layer(cell())

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def run(deq, xs, key):
        z, _ = deq.batch(xs, key=key)
        return jnp.sum(z @ g), z

    (_, zs), grads = run(deq, xs, KEY)
    total = np.zeros((SIZE, SIZE))
    for i, z in enumerate(zs):
        key = jax.random.fold_in(KEY, i)
        m = np.asarray(nn.draw_masks(deq.cell, key=key).drop.mask, np.float64)[:, None] / 0.6
        inverse = np.linalg.inv(np.eye(SIZE) - m * np.asarray(deq.cell.weight, np.float64))
        np.testing.assert_allclose(z, inverse @ xs[i], rtol=1e-4, atol=1e-5)
        total += m * np.outer(inverse.T @ g, z)
        if i == 2:  # An example alone, with its key.
            np.testing.assert_allclose(deq(xs[i], key=key)[0], z, rtol=1e-5)
    np.testing.assert_allclose(grads.cell.weight, total, rtol=1e-3, atol=1e-4)
    # A batch of one is its first example; with no key there is no mask.
    np.testing.assert_allclose(deq.batch(xs[:1], key=KEY)[0][0], zs[0], rtol=1e-5)
    np.testing.assert_array_equal(deq.batch(xs)[0], layer(cell(p=0.0)).batch(xs, key=KEY)[0])


@pytest.mark.parametrize("exact", [True, False])
def test_masks_under_vmap_and_reversal(exact):
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=0.5, exact=exact)
    xs = inputs(BATCH, SIZE)
    deq = layer(cell(), solver, deqjax.ReversibleAdjoint(), 6)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(BATCH))

    def mapped(w, xs):
        deq_ = eqx.tree_at(lambda d: d.cell.weight, deq, w)
        return jnp.sum(jnp.sin(jax.vmap(lambda x, k: deq_(x, key=k)[0])(xs, keys)))

    def batched(w, xs):
        deq_ = eqx.tree_at(lambda d: d.cell.weight, deq, w)
        return jnp.sum(jnp.sin(deq_.batch(xs, key=KEY)[0]))

    grads = [jax.jit(jax.grad(f, (0, 1)))(deq.cell.weight, xs) for f in (mapped, batched)]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
        assert jnp.all(jnp.isfinite(a))


def test_shard_map():
    """Masks of a device's own, a predictor and a normalised weight; gradients outside."""
    xs = inputs(16, SIZE)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def many(w, xs, key):
        predictor = lambda x: jnp.sin(w @ x)
        deq = layer(
            dataclasses.replace(cell(), weight=nn.SpectralNorm(w, 0.4, key=KEY)),
            predictor=predictor,
        )
        return deq.batch(xs, key=key)[0]

    def body(w, xs):
        return many(w, xs, jax.random.fold_in(KEY, jax.lax.axis_index("data")))

    def device_by_device(w, xs):
        keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(8))
        return jax.vmap(many, (None, 0, 0))(w, xs.reshape(8, 2, SIZE), keys).reshape(16, SIZE)

    sharded = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    w = cell().weight
    both = [
        jax.jit(jax.value_and_grad(lambda w, f=f: jnp.sum(jnp.sin(f(w, xs)))))(w)
        for f in (sharded, device_by_device)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (PICARD, deqjax.ImplicitAdjoint()),
        (PICARD, UNROLLED),
        (deqjax.Reversible(), deqjax.ReversibleAdjoint()),
    ],
)
def test_masks_make_no_cotangent_per_example(solver, adjoint):
    """And they leave the state in its own precision."""
    deq = layer(cell(dtype=jnp.bfloat16), solver, adjoint)
    xs = inputs(BATCH, SIZE, dtype=jnp.bfloat16)

    def loss(w):
        deq_ = eqx.tree_at(lambda d: d.cell.weight, deq, w)
        return jnp.sum(deq_.batch(xs, key=KEY)[0].astype(jnp.float32))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(deq.cell.weight))
    assert f"bf16[{SIZE},{SIZE}]" in jaxpr and f"bool[{BATCH},{SIZE}]" in jaxpr
    assert f"[{BATCH},{SIZE},{SIZE}]" not in jaxpr
    assert deq.batch(xs, key=KEY)[0].dtype == jnp.bfloat16


def test_bad_dropout_raises():
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"p in \[0, 1\), got"):
            nn.VariationalDropout((2,), p)
    for shape in ((2,), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"mask of shape .* fits, got \(2, 3\)"):
            nn.VariationalDropout(shape)(jnp.ones((2, 3)))

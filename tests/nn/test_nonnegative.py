"""W >= 0 as a square, as a softplus and by projection: the same promises from all three."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest

import deqjax
from deqjax import positive
from deqjax.nn import (
    DEQ,
    PositiveConcaveConv2d,
    PositiveConcaveLinear,
    SubhomogeneousConv2d,
    SubhomogeneousLinear,
)

LINEAR, CONV = (
    (PositiveConcaveLinear, SubhomogeneousLinear),
    (
        PositiveConcaveConv2d,
        SubhomogeneousConv2d,
    ),
)
ways = pytest.mark.parametrize("nonnegative", [jnp.square, jax.nn.softplus, None])
cells = pytest.mark.parametrize("make", [*LINEAR, *CONV])


def layer(cell):
    return DEQ(cell, deqjax.FixedPointIteration(), deqjax.ImplicitAdjoint(), max_steps=100)


def inputs(make, key, size=3):
    return jax.random.normal(key, (2, size) if make in LINEAR else (2, 4, 4, size))


@ways
@cells
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_start(make, nonnegative, dtype, getkey):
    key = getkey()
    cell = make(40, nonnegative=nonnegative, dtype=dtype, key=key)
    w = paramax.unwrap(cell.weight)
    assert isinstance(cell.weight, jax.Array) == (nonnegative is None)
    assert w.dtype == dtype and jnp.all(w >= 0)
    plain = make(40, nonnegative=None, dtype=dtype, key=key).weight
    # softplus^-1 of 1e-7 is -16, so that in bfloat16 exp has a relative error of 16 half-ulps.
    eps = float(jnp.finfo(dtype).eps)
    close: Any = dict(rtol=16 * eps, atol=2e-3 * eps)
    np.testing.assert_allclose(w.astype(jnp.float32), plain.astype(jnp.float32), **close)


@ways
@cells
def test_a_row_of_zeros(make, nonnegative, getkey):
    cell = make(3, nonnegative=nonnegative, key=getkey())
    # softplus is exactly 0 there, in float32.
    zero = -200.0 if nonnegative is jax.nn.softplus else 0.0
    where = lambda c: c.weight if nonnegative is None else c.weight.args[0]
    v = where(cell)
    v = v.at[0].set(zero) if make in LINEAR else v.at[..., 0].set(zero)
    deq, x = layer(eqx.tree_at(where, cell, v)), inputs(make, getkey())
    assert not jnp.any(paramax.unwrap(deq.cell.weight)[(0,) if make in LINEAR else (..., 0)])

    @eqx.filter_value_and_grad
    def total(deq):
        return jnp.sum(deq.batch(x)[0])

    value, grads = total(deq)
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves((value, grads)))
    assert jnp.any(where(grads.cell) != 0)
    alone = cell.activation(jax.vmap(cell.inject)(x))[..., 0]
    np.testing.assert_array_equal(deq.batch(x)[0][..., 0], alone)


@ways
@pytest.mark.parametrize("make", [PositiveConcaveLinear, PositiveConcaveConv2d])
def test_training_keeps_it(make, nonnegative, getkey):
    """Adam pulls the output down, with steps that take W far below 0 unless something is done."""
    deq, x = layer(make(3, nonnegative=nonnegative, key=getkey())), inputs(make, getkey())
    adam = optax.adam(0.05)
    state = adam.init(eqx.filter(deq, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(deq, state):
        loss, grads = eqx.filter_value_and_grad(lambda d: jnp.sum(d.batch(x)[0] ** 2))(deq)
        updates, state = adam.update(grads, state)
        moved = eqx.apply_updates(deq, updates)
        return loss, moved, positive.project(moved), state

    losses, negative = [], False
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        for _ in range(8):
            loss, moved, deq, state = step(deq, state)
            losses.append(float(loss))
            negative |= bool(jnp.any(paramax.unwrap(moved.cell.weight) < 0))
            assert jnp.all(paramax.unwrap(deq.cell.weight) >= 0)
    assert losses[-1] < losses[0] and np.all(np.isfinite(losses))
    # The projection is what keeps a plain weight, and nothing else needs one.
    assert negative == (nonnegative is None)


def test_project_touches_nothing_else(getkey):
    plain: Any = PositiveConcaveLinear(3, nonnegative=None, key=getkey())
    plain = eqx.tree_at(lambda c: c.weight, plain, plain.weight - 0.002)
    squared = PositiveConcaveConv2d(3, key=getkey())
    squared = eqx.tree_at(lambda c: c.weight.args[0], squared, squared.weight.args[0] - 1)
    model = {"a": layer(plain), "b": [squared, -jnp.ones(2), eqx.nn.Linear(2, 2, key=getkey())]}
    out = positive.project(model)
    np.testing.assert_array_equal(out["a"].cell.weight, jnp.maximum(plain.weight, 0))
    assert jnp.any(plain.weight < 0)
    rest = lambda m: eqx.tree_at(lambda m: m["a"].cell.weight, m, None)
    assert all(x is y for x, y in zip(*map(jax.tree.leaves, (rest(out), rest(model))), strict=True))
    # The tree of parameters, and the other half, whose cells have no weight.
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert eqx.tree_equal(positive.project(params), eqx.partition(out, eqx.is_inexact_array)[0])
    assert eqx.tree_equal(positive.project(static), static)
    assert eqx.tree_equal(positive.project(plain), out["a"].cell)


def test_cells_of_ones_own_take_part(getkey):
    class Mine(positive.AbstractNonnegative):
        weight: Any
        inner: PositiveConcaveLinear
        bias: jax.Array

    inner: Any = PositiveConcaveLinear(2, nonnegative=None, key=getkey())
    inner = eqx.tree_at(lambda c: c.weight, inner, -inner.weight)
    out = positive.project(Mine(-jnp.ones(2), inner, -jnp.ones(2)))
    assert not jnp.any(out.weight) and not jnp.any(out.inner.weight) and jnp.all(out.bias == -1)


@cells
def test_other_functions_raise(make, getkey):
    for other in (jnp.exp, "square", jax.nn.relu, [1]):
        with pytest.raises(ValueError, match="nonnegative=jnp.square, jax.nn.softplus or None"):
            make(3, nonnegative=other, key=getkey())

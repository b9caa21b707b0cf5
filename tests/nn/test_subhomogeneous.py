"""Subhomogeneous cells contract in the Thompson metric by the factor that they promise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from registry import slow

import deqjax
from deqjax.nn import DEQ, SubhomogeneousConv2d, SubhomogeneousLinear
from deqjax.positive import Power, Shifted, properties

TANH = Shifted(jnp.tanh, 1.2)
CASES = [
    (TANH, False),
    (jax.nn.sigmoid, False),
    slow(jax.nn.hard_sigmoid, False),
    (jnp.sqrt, False),
    slow(Power(0.8, 0.1), False),
    (Shifted(jax.nn.relu6, 0.5), False),
    (Shifted(jnp.tanh, 1.603), True),
    (jax.nn.sigmoid, True),
    (Power(0.4), True),
]
cases = pytest.mark.parametrize(("activation", "normalise"), CASES)


def thompson(y, z):
    return jnp.max(jnp.abs(jnp.log(y / z)))


def with_weight(cell, w):
    return eqx.tree_at(lambda c: c.weight.args[0], cell, jnp.sqrt(w))


def cells(activation, normalise, getkey):
    """Weights of three sizes, far from any bound on their norms, and x with zeros in it."""
    for size in (0.1, 1.0, 30.0):
        dense = SubhomogeneousLinear(6, activation, normalise=normalise, key=getkey())
        dense = with_weight(dense, size * jax.random.uniform(getkey(), (6, 6)))
        image = SubhomogeneousConv2d(2, 3, activation, normalise=normalise, key=getkey())
        image = with_weight(image, size * jax.random.uniform(getkey(), (3, 3, 2, 2)))
        for cell, shape in ((dense, (6,)), (image, (4, 5, 2))):
            yield cell, cell.inject(jax.random.normal(getkey(), shape)), shape


@pytest.mark.x64
@cases
def test_the_contraction_factor(activation, normalise, getkey):
    mu = properties(activation).subhomogeneity
    largest = 0.0
    for cell, x, shape in cells(activation, normalise, getkey):
        assert cell.rate == (2 * mu if normalise else mu)

        @jax.jit
        @jax.vmap
        def ratio(key, cell=cell, x=x, shape=shape):
            scale, near, one, two = jax.random.split(key, 4)
            # Points of all sizes; some pairs are close, where the factor is that of J.
            y = 10 ** jax.random.uniform(scale, (), minval=-4.0, maxval=3.0)
            y = y * jnp.exp(jax.random.normal(one, shape))
            apart = 10 ** jax.random.uniform(near, (), minval=-4.0, maxval=0.5)
            z = y * jnp.exp(apart * jax.random.normal(two, shape))
            return thompson(cell(y, x), cell(z, x)) / thompson(y, z)

        ratios = ratio(jax.random.split(getkey(), 300))
        assert jnp.all(ratios <= cell.rate * (1 + 1e-9))
        largest = max(largest, float(jnp.max(ratios)))
    # The promise is not idle.
    assert largest > 0.3 * mu


@pytest.mark.x64
def test_the_factor_is_reached():
    """One unit, x = 0, where u sigma'(u) / sigma(u) is largest."""
    cell = SubhomogeneousLinear(1, TANH, key=jax.random.key(0))
    cell, z = with_weight(cell, jnp.ones((1, 1))), jnp.asarray([0.65487])
    got = thompson(cell(z, 0 * z), cell(1.0001 * z, 0 * z)) / jnp.log(1.0001)
    np.testing.assert_allclose(got, cell.rate, rtol=1e-4)


@pytest.mark.x64
@cases
def test_one_fixed_point_at_the_promised_rate(activation, normalise, getkey):
    for cell, x, shape in cells(activation, normalise, getkey):
        f = lambda z, cell=paramax.unwrap(cell), x=x: cell(z, x)
        z = jax.lax.fori_loop(0, 400, lambda _, z, f=f: f(z), jnp.ones(shape))
        np.testing.assert_allclose(f(z), z, rtol=1e-12)
        for start in (1e-8, 1e8):
            y = jnp.full(shape, start).at[0].mul(1e3)
            error = thompson(y, z)
            for _ in range(12):
                y, before = f(y), error
                error = thompson(y, z)
                assert error <= cell.rate * before * (1 + 1e-9) + 1e-12
        if normalise:
            np.testing.assert_allclose(jnp.max(z), 1, rtol=1e-15)


@pytest.mark.x64
def test_why_the_weight_has_to_be_nonnegative():
    """mu does not care about W, the theorem does."""
    w = jnp.asarray([[1.0, -1.0], [-1.0, 1.0]])
    for z in ([1.2, 1.2], [2.15753, 0.24247], [0.24247, 2.15753]):
        np.testing.assert_allclose(TANH(w @ jnp.asarray(z)), z, atol=1e-4)
    y, z = jnp.asarray([1.2, 1.2]), jnp.asarray([1.3, 1.1])
    assert thompson(TANH(w @ y), TANH(w @ z)) > thompson(y, z)
    # And no value of the parameter gives such a weight.
    cell = SubhomogeneousLinear(2, key=jax.random.key(0))
    moved = eqx.tree_at(lambda c: c.weight.args[0], cell, w)
    assert jnp.all(paramax.unwrap(moved.weight) >= 0)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_in_the_layer(normalise, image, getkey):
    make, shape = (SubhomogeneousConv2d, (4, 4, 3)) if image else (SubhomogeneousLinear, (3,))
    solver = deqjax.FixedPointIteration(rtol=1e-6, atol=1e-7)
    deq = DEQ(make(3, normalise=normalise, key=getkey()), solver, deqjax.ImplicitAdjoint())
    x, weights = jax.random.normal(getkey(), (2, 2, *shape))

    def unrolled(deq):
        cell = paramax.unwrap(deq.cell)
        z = y = jax.vmap(cell.inject)(x)
        for _ in range(30):
            z = jax.vmap(cell)(z, y)
        return jnp.sum(weights * z)

    got = eqx.filter_grad(lambda deq: jnp.sum(weights * deq.batch(x)[0]))(deq)
    expected = eqx.filter_grad(unrolled)(deq)
    v = lambda deq: deq.cell.weight.args[0]
    scale = float(jnp.max(jnp.abs(v(expected))))
    assert scale > 0
    np.testing.assert_allclose(v(got), v(expected), rtol=1e-3, atol=1e-4 * scale)
    assert jnp.all(deq.batch(x)[1].stats["num_steps"] < 15)


def test_half_precision(getkey):
    cell = SubhomogeneousLinear(4, normalise=True, dtype=jnp.bfloat16, key=getkey())
    z = cell(jnp.ones(4, jnp.bfloat16), jnp.zeros(4, jnp.bfloat16))
    assert z.dtype == jnp.bfloat16 and jnp.max(z) == 1


def test_too_large_a_mu_raises(getkey):
    for activation in (jnp.tanh, jax.nn.relu, jax.nn.softplus, jnp.log1p):
        with pytest.raises(ValueError, match=r"mu < 1, or mu < 1/2.*mu = 1.0"):
            SubhomogeneousLinear(3, activation, key=getkey())
    for activation in (jnp.sqrt, jax.nn.hard_sigmoid):
        with pytest.raises(ValueError, match=r"mu = 0.5 and normalise=True"):
            SubhomogeneousConv2d(3, 3, activation, normalise=True, key=getkey())
    with pytest.raises(ValueError, match="something is known"):
        SubhomogeneousLinear(3, lambda u: u, key=getkey())
    with pytest.raises(ValueError, match="expects floor > 0"):
        SubhomogeneousLinear(3, floor=0.0, key=getkey())
    with pytest.raises(ValueError, match="odd kernel_size"):
        SubhomogeneousConv2d(3, 2, key=getkey())

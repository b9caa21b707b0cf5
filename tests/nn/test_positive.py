"""The properties that make a cell positive and concave, and what goes wrong without them."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest

import deqjax
from deqjax.nn import (
    DEQ,
    PositiveConcaveConv2d,
    PositiveConcaveLinear,
    SubhomogeneousLinear,
)
from deqjax.positive import ACTIVATIONS, qualify

activations = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda f: f.__name__)
bounded = [f for f, record in ACTIVATIONS.items() if np.isfinite(record.supremum)]


def picard(f, z, steps=3000):
    return jax.lax.fori_loop(0, steps, lambda _, z: f(z), z)


def with_weight(cell, weight):
    """`cell` with W = `weight`, through the reparametrisation."""
    v = jnp.sqrt(jnp.broadcast_to(weight, cell.weight.args[0].shape))
    return eqx.tree_at(lambda c: c.weight.args[0], cell, v)


# The table


@pytest.mark.x64
@activations
def test_the_table_is_true(activation):
    kind, supremum = qualify(activation)
    zero = float(activation(jnp.zeros(())))
    assert zero == 0 if kind == 1 else zero == 0.5
    u = jnp.linspace(0.0, 20.0, 4001)
    s = activation(u)
    slopes, ulp = jnp.diff(s), 8 * jnp.finfo(s.dtype).eps * jnp.max(s)
    assert jnp.all(slopes >= -ulp) and jnp.all(jnp.diff(slopes) <= ulp) and s[1] > 0
    assert jnp.all(s <= supremum)
    far = float(activation(jnp.asarray(1e8)))
    assert far <= supremum and far < 1e5  # sublinear
    if np.isfinite(supremum):
        assert far > supremum - 1e-7  # the least upper bound


@pytest.mark.parametrize(
    "other", [jax.nn.relu, jax.nn.softplus, jax.nn.gelu, lambda u: jnp.tanh(u), "tanh", [1], None]
)
def test_what_does_not_qualify_raises(getkey, other):
    expected = r"concave.*tanh.*got .*spectral radius.*Pass one of these functions itself"
    with pytest.raises(ValueError, match=expected):
        qualify(other)
    with pytest.raises(ValueError, match=expected):
        PositiveConcaveLinear(3, other, key=getkey())
    with pytest.raises(ValueError, match=expected):
        PositiveConcaveConv2d(3, 3, other, key=getkey())


def test_bad_fields_raise(getkey):
    for field in ("floor", "sharpness"):
        with pytest.raises(ValueError, match=f"expects floor > 0.*{field}=0"):
            PositiveConcaveLinear(3, key=getkey(), **{field: 0.0})  # pyright: ignore
        with pytest.raises(ValueError, match=f"expects floor > 0.*{field}=inf"):
            PositiveConcaveConv2d(3, key=getkey(), **{field: np.inf})  # pyright: ignore
    for kernel_size in (2, 3.0, 0):
        with pytest.raises(ValueError, match="odd kernel_size"):
            PositiveConcaveConv2d(3, kernel_size, key=getkey())  # pyright: ignore
    for size in (0, -1, 4.0, True):
        for make in (PositiveConcaveLinear, PositiveConcaveConv2d, SubhomogeneousLinear):
            with pytest.raises(ValueError, match="size or channels to be an int of at least 1"):
                make(size, key=getkey())  # pyright: ignore


# One fixed point


def cells(activation, getkey):
    """Dense with spectral radius 4, and a convolution whose products sum to about that."""
    dense = PositiveConcaveLinear(12, activation, key=getkey())
    w = paramax.unwrap(dense.weight)
    dense = with_weight(dense, 4 * w / jnp.max(jnp.abs(jnp.linalg.eigvals(w))))
    image = PositiveConcaveConv2d(3, 3, activation, key=getkey())
    w = paramax.unwrap(image.weight)
    image = with_weight(image, 12 * w / jnp.sum(w))
    return [(dense, (12,)), (image, (4, 5, 3))]


@pytest.mark.x64
@activations
def test_picard_meets_from_below_and_above(getkey, activation):
    for cell, shape in cells(activation, getkey):
        x = cell.inject(3 * jax.random.normal(getkey(), shape))
        assert jnp.all(x >= 0) and (cell.activation is activation)
        supremum = qualify(activation).supremum
        top = jnp.full(shape, supremum if np.isfinite(supremum) else 1e3)
        f = lambda z, cell=cell, x=x: cell(z, x)
        assert jnp.all(f(top) <= top) and jnp.all(f(jnp.zeros(shape)) > 0)
        low, high = picard(f, jnp.zeros(shape)), picard(f, top)
        np.testing.assert_allclose(low, high, rtol=1e-9)
        np.testing.assert_allclose(f(low), low, rtol=1e-12)
        assert jnp.all(low > 0) and jnp.all(low <= top)


@pytest.mark.x64
def test_counterexamples():
    """Each breaks one hypothesis, and has several fixed points or none that Picard finds."""
    find = lambda f, z: float(picard(f, jnp.asarray(z)))
    # x below 0
    f = lambda z: jax.nn.sigmoid(10 * z - 5)
    np.testing.assert_allclose([find(f, 0.49), find(f, 0.51)], [0.0072, 0.9928], atol=5e-5)
    assert f(jnp.asarray(0.5)) == 0.5
    # x = 0 with sigma(0) = 0
    f = lambda z: jnp.tanh(2 * z)
    np.testing.assert_allclose([find(f, 0.0), find(f, 1e-6)], [0, 0.9575], atol=1e-4)
    f = lambda z: jnp.sqrt(5 * z)
    np.testing.assert_allclose([find(f, 0.0), find(f, 1e-6)], [0, 5], atol=1e-6)
    # a negative weight: a cycle
    f = lambda z: jnp.tanh(-3 * z + 1)
    even, odd = find(f, 0.0), float(f(picard(f, jnp.asarray(0.0))))
    np.testing.assert_allclose(sorted((even, odd)), [-0.9639, 0.9992], atol=1e-4)


@pytest.mark.x64
@pytest.mark.parametrize(
    ("activation", "weight", "x"), [(jax.nn.sigmoid, 10, -5), (jnp.tanh, 2, 0), (jnp.sqrt, 5, 0)]
)
def test_the_cells_repair_the_counterexamples(getkey, activation, weight, x):
    cell = with_weight(PositiveConcaveLinear(1, activation, key=getkey()), weight)
    for outside in (x, -100.0):
        inside = cell.inject(jnp.full(1, outside))
        ends = [picard(partial(cell, x=inside), jnp.full(1, z)) for z in (0.0, 10.0)]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_no_parameter_makes_a_weight_negative(getkey):
    for cell in (PositiveConcaveLinear(5, key=getkey()), PositiveConcaveConv2d(5, key=getkey())):
        moved = jax.tree.map(lambda v: v - 1 if eqx.is_inexact_array(v) else v, cell)
        assert jnp.all(moved.weight.args[0] < 0)
        assert jnp.all(paramax.unwrap(moved.weight) >= 0)


# The input


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_floor(getkey, dtype):
    cell = PositiveConcaveLinear(2, dtype=dtype, key=getkey())
    x = jnp.asarray([-21.0, -100.0], dtype)
    assert not jnp.any(jax.nn.softplus(5 * x) / 5)  # why there is one
    assert jnp.all(cell.inject(x) == jnp.asarray(1e-3, dtype))
    assert cell.inject(x).dtype == dtype
    big = jnp.asarray([50.0, 3.0], dtype)
    assert jnp.all(jnp.abs(cell.inject(big) - big) <= 0.002)
    two = PositiveConcaveLinear(2, jax.nn.sigmoid, dtype=dtype, key=getkey())
    assert jnp.all(two.inject(x) == 0) and jnp.all(two.inject(big) == big)


def test_initial_weight(getkey):
    dense = paramax.unwrap(PositiveConcaveLinear(80, key=getkey()).weight)
    image = paramax.unwrap(PositiveConcaveConv2d(40, key=getkey()).weight)
    assert image.shape == (3, 3, 40, 40)
    for w, fans in ((dense, 160), (image, 80)):
        top = 1e-2 / np.sqrt(fans)
        assert 0 <= jnp.min(w) and 0.99 * top < jnp.max(w) <= top * (1 + 1e-6)
        np.testing.assert_allclose(jnp.mean(w), top / 2, rtol=0.05)


def test_adam_can_raise_a_weight(getkey):
    """The reason for a square: from 4e-4 to 0.01 within 100 steps of 1e-3, not 3,000."""

    adam = optax.adam(1e-3)

    def reach(value, v):

        def step(carry, _):
            v, state = carry
            updates, state = adam.update(jax.grad(lambda v: -value(v))(v), state)
            v = optax.apply_updates(v, updates)
            return (v, state), value(v)

        values = jax.lax.scan(step, (v, adam.init(v)), None, length=4000)[1]
        return int(jnp.argmax(values >= 0.01))

    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
        assert reach(jnp.square, jnp.sqrt(jnp.asarray(4e-4))) < 100
        assert reach(jax.nn.softplus, jnp.log(jnp.expm1(jnp.asarray(4e-4)))) > 2000


# In the layer


def layer(cell):
    return DEQ(cell, deqjax.FixedPointIteration(), deqjax.ImplicitAdjoint(), max_steps=100)


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu6, jax.nn.sigmoid])
@pytest.mark.parametrize("image", [False, True])
def test_a_row_of_zeros(getkey, activation, image):
    if image:
        cell, shape = PositiveConcaveConv2d(3, 3, activation, key=getkey()), (4, 4, 3)
    else:
        cell, shape = PositiveConcaveLinear(3, activation, key=getkey()), (3,)
    v = cell.weight.args[0]  # pyright: ignore
    v = v.at[..., 0].set(0) if image else v.at[0].set(0)
    deq = layer(eqx.tree_at(lambda c: c.weight.args[0], cell, v))
    x = jax.random.normal(getkey(), (2, *shape))

    @eqx.filter_value_and_grad
    def total(deq):
        return jnp.sum(deq.batch(x)[0])

    value, grads = total(deq)
    assert all(jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves((value, grads)))
    alone = activation(jax.vmap(cell.inject)(x))[..., 0]
    np.testing.assert_array_equal(deq.batch(x)[0][..., 0], alone)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.optimised
def test_an_example_does_not_depend_on_its_batch_mates(getkey, image):
    if image:
        (_, _), (cell, shape) = cells(jnp.tanh, getkey)
    else:
        (cell, shape), _ = cells(jnp.tanh, getkey)
    deq = eqx.filter_jit(layer(cell).batch)
    easy, hard = jax.random.normal(getkey(), (4, *shape)), jnp.full((4, *shape), -100.0)
    mixed = easy.at[1:].set(hard[1:])
    (z1, sol1), (z2, sol2) = deq(easy), deq(mixed)
    assert jnp.max(sol2.stats["num_steps"]) > sol2.stats["num_steps"][0]
    np.testing.assert_array_equal(z1[0], z2[0])
    for name in ("num_steps", "residual"):
        assert sol1.stats[name][0] == sol2.stats[name][0]


def test_the_layer_injects(getkey):
    (cell, shape), _ = cells(jnp.tanh, getkey)
    x = jax.random.normal(getkey(), shape)
    z, _ = layer(cell)(x)
    np.testing.assert_allclose(cell(z, cell.inject(x)), z, rtol=2e-4)

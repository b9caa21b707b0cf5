"""A user's own positive concave cell in `nn.DEQ`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest

import deqjax
from deqjax.nn import DEQ, PositiveConcave, PositiveConcaveLinear
from deqjax.positive import StrictlyPositive


def layer(cell):
    solver = deqjax.FixedPointIteration(rtol=1e-7, atol=1e-9)
    return DEQ(cell, solver, deqjax.ImplicitAdjoint(), max_steps=500)


class Gated(eqx.Module):
    """tanh and log1p of two nonnegative products; concave as a sum of such."""

    weight: paramax.AbstractUnwrappable

    def __call__(self, z, x):
        w = self.weight
        return jnp.tanh(w @ z + x) + jnp.log1p(x + w.T @ z) / 2


def gated(key, size=5):
    v = jax.random.normal(key, (size, size)) / size
    return Gated(paramax.Parameterize(jnp.square, v))


@pytest.mark.x64
def test_one_fixed_point_and_its_gradient(getkey):
    deq = layer(PositiveConcave(gated(getkey())))
    xs = jax.random.normal(getkey(), (3, 5)).at[0].set(-100.0)
    low, sol = deq.batch(xs)
    high, _ = deq.batch(xs, jnp.full((3, 5), 100.0))
    assert jnp.all(sol.result == deqjax.RESULTS.successful)
    np.testing.assert_allclose(low, high, rtol=1e-5)

    def unrolled(deq):
        cell, x = paramax.unwrap(deq.cell), jax.vmap(deq.cell.inject)(xs)
        z = jax.lax.fori_loop(0, 200, lambda _, z: jax.vmap(cell)(z, x), jnp.zeros_like(x))
        return jnp.sum(z**2)

    got = eqx.filter_grad(lambda deq: jnp.sum(deq.batch(xs)[0] ** 2))(deq)
    expected = eqx.filter_grad(unrolled)(deq)
    v = lambda g: g.cell.cell.weight.args[0]
    np.testing.assert_allclose(v(got), v(expected), rtol=1e-4, atol=1e-8)


def test_it_is_the_built_in_cell(getkey):
    built_in = PositiveConcaveLinear(4, floor=0.01, sharpness=3.0, key=getkey())
    w = paramax.unwrap(built_in.weight)
    cell = PositiveConcave(lambda z, x: jnp.tanh(w @ z + x), StrictlyPositive(0.01, 3.0))
    x = jax.random.normal(getkey(), (4,))
    np.testing.assert_array_equal(layer(cell)(x)[0], layer(built_in)(x)[0])


def test_inject_can_be_anything(getkey):
    x = jnp.asarray([-1.0, 2.0])
    f = lambda z, x: jax.nn.sigmoid(z / 2 + x)
    np.testing.assert_array_equal(PositiveConcave(f, jax.nn.relu).inject(x), [0.0, 2.0])
    assert PositiveConcave(f).inject(jnp.asarray(-100.0)) == jnp.float32(1e-3)
    # A module, whose parameters are trained; and x a pair.
    lift = eqx.nn.Sequential([eqx.nn.Linear(2, 3, key=getkey()), eqx.nn.Lambda(jax.nn.softplus)])
    deq = layer(PositiveConcave(f, lift))
    grads = eqx.filter_grad(lambda deq: jnp.sum(deq(x)[0]))(deq)
    assert jnp.all(grads.cell.inject.layers[0].weight != 0)
    pair = PositiveConcave(lambda z, x: (f(z[1], x[0]), f(z[0], x[1])))
    z, _ = layer(pair)((x, -x))
    assert jax.tree.map(jnp.shape, z) == ((2,), (2,))


def test_weak_types_and_mesh_axes_do_not_count():
    """A constant has neither the axes of z nor, made of Python numbers, its strong type."""
    z = jnp.ones(4)
    weak = PositiveConcave(lambda z, x: jax.lax.full_like(z, 0.5) if z.ndim else jnp.sqrt(0.5))
    assert weak(jnp.ones(()), z) == jnp.sqrt(0.5) and weak(z, z)[0] == 0.5
    constant = PositiveConcave(lambda z, x: jnp.full(z.shape, 0.5, z.dtype))
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("device")
    apply = jax.shard_map(
        lambda z: jax.lax.pcast(constant(z, z), "device", to="varying"),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
    )
    np.testing.assert_array_equal(apply(z), 0.5)
    solved = jax.shard_map(
        lambda x: layer(constant).batch(x)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    np.testing.assert_array_equal(solved(jnp.ones((2, 4))), 0.5)


def test_what_can_be_seen_raises(getkey):
    f = lambda z, x: jnp.tanh(z + x)
    for bad in ((jnp.ones(2),), (f, 3.0)):
        with pytest.raises(ValueError, match="to be functions or modules"):
            PositiveConcave(*bad)
    for method in ("inject", "initial", "readout"):
        Cell = type("Cell", (), {method: lambda self, x: x, "__call__": lambda self, z, x: z})
        with pytest.raises(ValueError, match=rf"without a method {method}, got Cell"):
            PositiveConcave(Cell())
    z = jnp.ones(3)
    for wrong in (
        lambda z, x: z[:2],
        lambda z, x: z.astype(jnp.bfloat16),
        lambda z, x: (z, z),
    ):
        with pytest.raises(ValueError, match="structure, shapes and dtypes of z"):
            jax.eval_shape(PositiveConcave(wrong), z, z)
    with pytest.raises(ValueError, match="expects floor > 0"):
        PositiveConcave(f, StrictlyPositive(0.0))

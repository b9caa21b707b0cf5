"""Each device's share of a batch, solved by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import deqjax
from deqjax.nn import DEQ, VariationalDropout, shard_solves


def layer(w, solver, adjoint):
    drop = VariationalDropout((6,), 0.25)
    cell = jax.tree_util.Partial(lambda w, drop, z, x: jnp.tanh(drop(z) @ w + x), w, drop)
    return DEQ(cell, solver, adjoint, max_steps=40)


WAYS = {
    "implicit": (deqjax.Anderson(rtol=1e-6, atol=1e-7), deqjax.ImplicitAdjoint()),
    "reversible": (deqjax.Reversible(beta=0.5, rtol=0.0, atol=0.0), deqjax.ReversibleAdjoint()),
}
CALLS = {
    "plain": lambda key, x: {},
    "masks": lambda key, x: {"key": key},
    "start and budgets": lambda key, x: {"z0": 0.1 * x, "steps": jnp.arange(1, len(x) + 1)},
    "one budget": lambda key, x: {"steps": jnp.asarray(3)},
}


@pytest.mark.x64
@pytest.mark.parametrize(("way", "call"), [
    ("implicit", "plain"), ("implicit", "masks"), ("implicit", "start and budgets"),
    ("reversible", "masks"), ("reversible", "one budget"),
])  # fmt: skip
def test_nothing_changes_but_where_it_is_computed(getkey, way, call):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, P("data"))
    solver, adjoint = WAYS[way]
    mask_key = getkey()
    x = jax.random.normal(getkey(), (16, 6)) * jnp.logspace(-2, 1, 16)[:, None]
    w = 0.3 * jax.random.normal(getkey(), (6, 6))

    def run(w, x, sharding):
        def loss(w, x):
            deq = shard_solves(layer(w, solver, adjoint), sharding)
            z, sol = deq.batch(x, **CALLS[call](mask_key, x))
            return jnp.sum(z**3), (z, sol.result, sol.stats)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(w, x)

    run = jax.jit(run, static_argnums=2)
    one, many = run(w, x, None), run(w, jax.device_put(x, split), split)
    assert jax.tree.structure(one) == jax.tree.structure(many)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        if jnp.issubdtype(jnp.asarray(a).dtype, jnp.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_one_device_and_none_are_left_alone():
    deq = layer(jnp.eye(6), *WAYS["implicit"])
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    for sharding in (None, NamedSharding(mesh, P("data"))):
        assert shard_solves([deq], sharding)[0].sharding is None

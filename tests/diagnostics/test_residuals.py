"""The residual of each iterate: that of a solve with as many steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from problems import affine, tanh
from registry import SOLVERS, names

import deqjax

OURS = [name for name in SOLVERS if isinstance(SOLVERS[name](1e-3), deqjax.AbstractSolver)]
STEPS = 6


@pytest.mark.parametrize("name", names(OURS, "damped", "anderson-mixed", "broyden-search"))
def test_it_is_that_of_each_solve(name):
    p = tanh(4, 0.8)
    solver = SOLVERS[name](0.0)
    run = jax.jit(lambda n: deqjax.fixed_point(p.fn, solver, p.z0, p.args, max_steps=9, steps=n))
    each = [run(jnp.asarray(n)).stats["residual"] for n in range(STEPS + 1)]
    # Its own tolerances do not stop it.
    loose = dataclasses.replace(solver, rtol=1.0, atol=1.0)
    found = deqjax.residuals(p.fn, loose, p.z0, p.args, steps=STEPS)
    np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-7)
    assert found.shape == (STEPS + 1,) and found.dtype == jnp.float32


def test_a_linear_rate():
    """Picard steps of `z = a z + b` shrink the residual `a^k |b|` of z0 = 0 as the theory says."""
    found = deqjax.residuals(
        lambda z, _: 0.5 * z + 1, deqjax.FixedPointIteration(), jnp.zeros(3), steps=20
    )
    k = np.arange(21)
    np.testing.assert_allclose(found, 0.5**k / (2 - 0.5**k), rtol=1e-5, atol=3e-8)


def test_a_batch_a_pytree_and_half_precision():
    fn = lambda z, x: {"a": 0.5 * z["a"] + x, "b": (z["b"] / 4).astype(jnp.bfloat16)}
    z0 = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 5), jnp.bfloat16)}
    x = jnp.arange(6.0).reshape(3, 2)
    options = dict(steps=4, batched=True)
    found = jax.jit(lambda: deqjax.residuals(fn, deqjax.Anderson(), z0, x, **options))()
    assert found.shape == (5, 3) and found.dtype == jnp.float32
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], z0)
        alone = deqjax.residuals(fn, deqjax.Anderson(), one, x[i], steps=4)
        np.testing.assert_allclose(found[:, i], alone, rtol=1e-3, atol=1e-6)


def test_the_step_number_and_aux():
    sizes = jnp.asarray([1.0, 2.0, 3.0, 4.0])
    fn = lambda z, _, step: (z + sizes[step], "aux")
    options = dict(steps=3, indexed=True, has_aux=True)
    found = deqjax.residuals(fn, deqjax.FixedPointIteration(), jnp.zeros(()), **options)
    np.testing.assert_allclose(found, [1 / 1, 2 / 3, 3 / 6, 4 / 10], rtol=1e-6)


def test_in_vmap_and_in_shard_map():
    p = tanh(4, 0.8)
    starts = jnp.stack([p.z0 + k for k in range(8)])
    one = lambda z: deqjax.residuals(p.fn, deqjax.Anderson(), z, p.args, steps=4)
    many = lambda z: deqjax.residuals(
        lambda z, a: jax.vmap(p.fn, (0, None))(z, a), deqjax.Anderson(), z, p.args, steps=4,
        batched=True,
    )  # fmt: skip
    alone = jnp.stack([one(z) for z in starts])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("data")
    apart = jax.shard_map(lambda z: many(z).T, mesh=mesh, in_specs=split, out_specs=split)
    for found in jax.vmap(one)(starts), many(starts).T, jax.jit(apart)(starts):
        np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-6)


def test_divergence_is_seen():
    fn = lambda z, _: z**2
    found = deqjax.residuals(fn, deqjax.FixedPointIteration(), jnp.full(2, 100.0), steps=9)
    assert jnp.all(found[:3] > 0.9) and jnp.isnan(found[-1])


def test_what_it_refuses():
    p = affine(3, 0.5)
    with pytest.raises(ValueError, match="expects a deqjax solver"):
        deqjax.residuals(p.fn, optimistix.Newton(1e-3, 1e-3), p.z0, p.args)
    with pytest.raises(ValueError, match="steps"):
        deqjax.residuals(p.fn, deqjax.Anderson(), p.z0, p.args, steps=0)
    with pytest.raises(ValueError, match="residuals with indexed=True"):
        solver = deqjax.PositiveConcaveSolver()
        deqjax.residuals(lambda z, a, k: z, solver, p.z0, p.args, indexed=True)

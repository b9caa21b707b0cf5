"""The adjoint with a bound under transformations, in layers and through Optimistix's door."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from problems import relative_error
from registry import cases

import deqjax
from deqjax.nn import DEQ, PositiveConcaveConv2d, PositiveConcaveLinear

from bench import problems as _p

ADJOINT = deqjax.PositiveConcaveAdjoint()


@pytest.mark.parametrize("linear", [True, False])
def test_gradient_of_the_layer(getkey, linear):
    """Through `nn.DEQ`, batched, in float32: that of float64."""
    key, shape = getkey(), (4, 12) if linear else (4, 5, 5, 3)
    xs, g = jax.random.normal(getkey(), shape), jax.random.normal(getkey(), shape)

    def gradient(dtype, tol, adjoint):
        kind = PositiveConcaveLinear if linear else PositiveConcaveConv2d
        cell = kind(shape[-1], key=key, dtype=jnp.float32)
        to = lambda x: jnp.asarray(np.asarray(x), dtype) if eqx.is_inexact_array(x) else x
        # W is a square: 64 times what it was made as.
        cell = jax.tree.map(lambda x: 8 * to(x) if eqx.is_inexact_array(x) else x, cell)
        layer = DEQ(cell, deqjax.FixedPointIteration(tol, tol), adjoint, max_steps=500)
        loss = lambda both: jnp.sum(both[0].batch(both[1])[0] * to(g))
        return jax.tree.leaves(eqx.filter_jit(eqx.filter_grad(loss))((layer, to(xs))))

    grads = gradient(jnp.float32, 1e-6, ADJOINT)
    with jax.enable_x64(True):
        truth = gradient(jnp.float64, 1e-12, deqjax.ImplicitAdjoint(tol=1e-12))
    assert relative_error(grads, truth) < 3e-4


DOORS = {"ours": deqjax.fixed_point, "theirs": optimistix.fixed_point}


@pytest.mark.x64
@pytest.mark.parametrize("door", cases(DOORS, "theirs"))
def test_every_order_and_both_doors(door):
    """A pytree has the derivatives that `ImplicitAdjoint` gives, forwards and backwards."""
    p = _p.split(_p.positive(_p._tanh, 0.9, 0.1, n=8)).astype(np.float64)
    solver = deqjax.FixedPointIteration(1e-13, 1e-13)

    def loss(x, adjoint):
        options = dict(max_steps=1000, adjoint=adjoint, throw=False)
        z = door(p.fn, solver, p.z0, (p.args[0], x), **options).value
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(z))

    for order in (jax.grad, jax.jacfwd, lambda f: jax.jacrev(jax.grad(f))):
        run = lambda adjoint, order=order: jax.jit(order(lambda x: loss(x, adjoint)))(p.args[1])
        grad = run(deqjax.PositiveConcaveAdjoint(tol=1e-11))
        assert relative_error(grad, run(deqjax.ImplicitAdjoint(tol=1e-13))) < 1e-9


def test_vmap_and_shard_map():
    """With the bound in force: the gradients of a Python loop, and each its own stop."""
    problems = [_p.positive(_p._tanh, rho, 0.1, n=12) for rho in np.linspace(0.2, 1.0, 8)]
    stack = lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32)
    z, *args = jax.tree.map(stack, *((p.solution, *p.args) for p in problems))
    g = jnp.asarray(np.random.default_rng(1).standard_normal(z.shape), jnp.float32)
    one = lambda z, w, x: jnp.tanh(w @ z + x)
    fn = lambda z, args: jax.vmap(one)(z, *args)
    solver = deqjax.FixedPointIteration(1.0, 1.0)

    def single(w, x, z, g):
        f = lambda z, args: one(z, *args)
        return jnp.vdot(deqjax.fixed_point(f, solver, z, (w, x), adjoint=ADJOINT).value, g)

    def whole(w, x, z, g):
        options = dict(adjoint=ADJOINT, batched=True)
        return jnp.sum(deqjax.fixed_point(fn, solver, z, (w, x), **options).value * g, 1)

    grad = jax.jit(jax.grad(single, (0, 1)))
    alone = [grad(*args, z, g) for args, z, g in zip(zip(*args, strict=True), z, g, strict=True)]
    truth = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.shard_map(whole, mesh=mesh, in_specs=spec, out_specs=spec)
    total = lambda f: jax.grad(lambda *a: jnp.sum(f(*a)), (0, 1))
    for run in (jax.vmap(jax.grad(single, (0, 1))), total(jax.vmap(single)), total(sharded)):
        assert relative_error(jax.jit(run)(*args, z, g), truth) < 1e-5

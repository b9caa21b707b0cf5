"""The cotangents of a batch's shared weight and inputs, `(w, xs)`, under every transformation.

`solve(args, z0, batched=...)` is the value of a solve of `args = (w, x)`; the batch is of length 8.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


def plain(solve, args, z0, g):
    return jax.jit(lambda a: _pulled(solve, a, z0, g))(args)


def _pulled(solve, args, z0, g, batched=True):
    return jax.vjp(lambda a: solve(a, z0, batched=batched), args)[1](g)[0]


def jitted_pull(solve, args, z0, g):
    """The pullback compiled by itself."""
    _, pull = jax.jit(lambda a: jax.vjp(lambda a: solve(a, z0, batched=True), a))(args)
    return jax.jit(pull)(g)[0]


def of_vmap(solve, args, z0, g):
    value = lambda a, z0, g: solve(a, z0, batched=False) @ g
    each = lambda a: jnp.sum(jax.vmap(value, ((None, 0), 0, 0))(a, z0, g))
    return jax.jit(jax.grad(each))(args)


def vmap_of_grad(solve, args, z0, g):
    """A weight's cotangent per example: f then has another form in the sweep."""
    one = lambda x, z0, g: _pulled(solve, (args[0], x), z0, g, batched=False)
    w, x = jax.jit(jax.vmap(one))(args[1], z0, g)
    return jnp.sum(w, 0), x


def remat(solve, args, z0, g):
    inside = jax.checkpoint(lambda a: jnp.vdot(g, solve(a, z0, batched=True)))
    return jax.jit(jax.grad(inside))(args)


def in_scan(solve, args, z0, g):
    """Solves after each other; only the last has a cotangent, so that it is that of one solve."""

    def loss(a):
        body = lambda _, x: (solve(a, x, batched=True), None)
        return jax.lax.scan(body, z0, jnp.stack([z0, z0]))[0]

    return jax.jit(lambda a: jax.vjp(loss, a)[1](g)[0])(args)


def _mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def sharded(solve, args, z0, g):
    apart, shared = (NamedSharding(_mesh(), s) for s in (P("data"), P()))
    args = jax.device_put(args[0], shared), jax.device_put(args[1], apart)
    z0, g = (jax.device_put(x, apart) for x in (z0, g))
    return jax.jit(lambda a, z0, g: _pulled(solve, a, z0, g))(args, z0, g)


def shard_mapped(solve, args, z0, g):
    one = lambda w, x, z0, g: _pulled(solve, (w, x), z0, g)
    specs = (P(), *3 * (P("data"),))
    each = jax.shard_map(one, mesh=_mesh(), in_specs=specs, out_specs=(P(), P("data")))
    return jax.jit(each)(*args, z0, g)


def pmapped(solve, args, z0, g):
    one = lambda x, z0, g: _pulled(solve, (args[0], x), z0, g, batched=False)
    d_w, d_x = jax.pmap(one)(args[1], z0, g)
    return jnp.sum(d_w, 0), d_x


WAYS = {
    way.__name__.replace("_", "-"): way
    for way in (
        jitted_pull,
        of_vmap,
        vmap_of_grad,
        remat,
        in_scan,
        sharded,
        shard_mapped,
        pmapped,
    )
}

"""Values and gradients under every JAX transformation, on eight simulated devices."""

import collections

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from problems import matrix
from registry import cases

import deqjax

BATCH, SIZE = 16, 6
REVERSIBLE = deqjax.Reversible(rtol=0.0, atol=0.0, beta=0.5)
FLOAT = deqjax.Reversible(rtol=0.0, atol=0.0, beta=0.5, exact=False)
TOLERANT = deqjax.Reversible(rtol=1e-4, atol=1e-4, beta=0.5)
PICARD = deqjax.FixedPointIteration(rtol=1e-6, atol=1e-6)
PAIRS = {
    "reversible": (REVERSIBLE, deqjax.ReversibleAdjoint(), 8),
    "reversible-float": (FLOAT, deqjax.ReversibleAdjoint(segment=4), 8),
    "reversible-tolerant": (TOLERANT, deqjax.ReversibleAdjoint(), 24),
    "implicit": (PICARD, deqjax.ImplicitAdjoint(), 200),
    "positive-concave": (PICARD, deqjax.PositiveConcaveAdjoint(tol=1e-7), 200),
    "checkpointed": (REVERSIBLE, deqjax.RecursiveCheckpointAdjoint(), 8),
    "anderson": (
        deqjax.Anderson(rtol=1e-6, atol=1e-6),
        deqjax.ImplicitAdjoint(deqjax.Anderson(rtol=1e-6)),
        200,
    ),
    "broyden": (
        deqjax.Broyden(rtol=1e-6, atol=1e-6, depth=8),
        deqjax.BroydenAdjoint(tol=1e-6),
        200,
    ),
    "phantom": (
        deqjax.Broyden(rtol=1e-6, atol=1e-6, depth=8, line_search=True),
        deqjax.PhantomAdjoint(),
        200,
    ),
    "neumann-phantom": (
        deqjax.Anderson(rtol=1e-6, atol=1e-6, mixing=0.8),
        deqjax.NeumannPhantomAdjoint(),
        200,
    ),
    "jacobian-free": (PICARD, deqjax.JacobianFreeAdjoint(), 200),
}
# Further cases of an implicit solve, and of one step beyond it.
MORE = "anderson", "phantom", "neumann-phantom", "jacobian-free"
pairs = pytest.mark.parametrize("pair", cases(PAIRS, *MORE))


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x):
        return jnp.tanh(self.weight @ z + x)


W = jnp.asarray(matrix(SIZE, 0.7, 0), jnp.float32)
XS = jnp.asarray(2 * np.random.default_rng(1).standard_normal((BATCH, SIZE)), jnp.float32)


def layer(w, pair):
    solver, adjoint, max_steps = pair
    return deqjax.nn.DEQ(Cell(w), solver, adjoint, max_steps=max_steps)


def one(w, x, pair):
    return jnp.sum(jnp.sin(layer(w, pair)(x)[0]))


def many(w, xs, pair):
    """Per-example losses, from one batched state."""
    return jnp.sum(jnp.sin(layer(w, pair).batch(xs)[0]), axis=1)


def reference(pair):
    """A Python loop over single examples: no transformation but grad."""
    loss_and_grad = jax.jit(jax.value_and_grad(lambda w, x: one(w, x, pair), argnums=(0, 1)))
    outs = [loss_and_grad(W, x) for x in XS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def close(tree, truth, rtol=2e-5):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.max(jnp.abs(b))))


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pairs
def test_jit_vmap_and_batched(pair):
    loss, (gw, gx) = reference(pair)
    total = jnp.sum(gw, axis=0)
    batched = jax.jit(jax.value_and_grad(lambda w, xs: jnp.sum(many(w, xs, pair)), (0, 1)))(W, XS)
    close(batched, (jnp.sum(loss), (total, gx)))
    vmapped = lambda w, xs: jax.vmap(one, (None, 0, None))(w, xs, pair)
    close(jax.jit(vmapped)(W, XS), loss)
    grad_of_vmap = jax.jit(jax.grad(lambda w, xs: jnp.sum(vmapped(w, xs)), (0, 1)))
    close(grad_of_vmap(W, XS), (total, gx))
    vmap_of_grad = jax.jit(jax.vmap(jax.grad(one, (0, 1)), (None, 0, None)), static_argnums=2)
    close(vmap_of_grad(W, XS, pair), (gw, gx))


@pairs
def test_scan_remat_and_nested_vmap(pair):
    loss, (gw, _) = reference(pair)

    def scanned(w):
        body = jax.checkpoint(lambda c, x: (c + jnp.sum(many(w, x, pair)), None))
        return jax.lax.scan(body, 0.0, XS.reshape(4, 4, SIZE))[0]

    close(jax.jit(jax.value_and_grad(scanned))(W), (jnp.sum(loss), jnp.sum(gw, axis=0)))
    nested = jax.vmap(lambda xs: many(W, xs, pair))
    close(jax.jit(nested)(XS.reshape(4, 4, SIZE)).reshape(BATCH), loss)


@pairs
def test_named_sharding(pair):
    loss, (gw, gx) = reference(pair)
    shard = lambda x, spec: jax.device_put(x, NamedSharding(mesh(), spec))
    step = jax.jit(jax.value_and_grad(lambda w, xs: jnp.sum(many(w, xs, pair)), (0, 1)))
    out = step(shard(W, P()), shard(XS, P("data")))
    assert len(out[1][1].sharding.device_set) == 8
    close(out, (jnp.sum(loss), (jnp.sum(gw, axis=0), gx)))


@pairs
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pmap(pair):
    """A user's own pmap step around a layer: gradient averaged over devices, one update."""
    _, (gw, _) = reference(pair)
    optimiser = optax.sgd(0.1)

    def step(w, xs):
        grad = jax.grad(lambda w: jnp.sum(many(w, xs, pair)))(w)
        updates, _ = optimiser.update(jax.lax.psum(grad, "data"), optimiser.init(w))
        return optax.apply_updates(w, updates)

    out = jax.pmap(step, axis_name="data", in_axes=(None, 0))(W, XS.reshape(8, 2, SIZE))
    close(out, jnp.broadcast_to(W - 0.1 * jnp.sum(gw, axis=0), (8, *W.shape)))


@pairs
@pytest.mark.parametrize("closed_over", [False, True])
def test_shard_map(pair, closed_over):
    """With its default check of varying axes; parameters in a module, and closed over."""
    loss, (gw, gx) = reference(pair)
    solver, adjoint, max_steps = pair

    def body(w, xs):
        if not closed_over:
            return many(w, xs, pair)
        fn = lambda z, _: jnp.tanh(z @ w.T + xs)
        options = dict(batched=True, max_steps=max_steps, adjoint=adjoint)
        sol = deqjax.fixed_point(fn, solver, jnp.zeros_like(xs), **options)
        return jnp.sum(jnp.sin(sol.value), axis=1)

    sharded = jax.shard_map(body, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
    close(jax.jit(sharded)(W, XS), loss)
    grads = jax.jit(jax.grad(lambda w, xs: jnp.sum(sharded(w, xs)), (0, 1)))(W, XS)
    close(grads, (jnp.sum(gw, axis=0), gx))


@pairs
def test_shard_map_from_constants(pair):
    """A constant z0 and per-device stopping: the initial carry has to be made varying."""
    solver, adjoint, max_steps = pair
    loss, (gw, _) = reference(pair)

    def body(w, x):
        fn = lambda z, a: jnp.tanh(a[0] @ z + a[1])
        options = dict(max_steps=max_steps, adjoint=adjoint)
        sol = deqjax.fixed_point(fn, solver, jnp.zeros(SIZE), (w, x[0]), **options)
        return jnp.sum(jnp.sin(sol.value))[None]

    sharded = jax.shard_map(body, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
    total = lambda w: jnp.sum(sharded(w, XS[:8]))
    close(jax.jit(jax.value_and_grad(total))(W), (jnp.sum(loss[:8]), jnp.sum(gw[:8], axis=0)))


def primitives(jaxpr, inside=()):
    """`(primitive name, names of the primitives around it, shapes of its outputs)`, recursively."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside, [getattr(v.aval, "shape", ()) for v in eqn.outvars]
        for sub in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            sub = getattr(sub, "jaxpr", sub)
            if hasattr(sub, "eqns"):
                yield from primitives(sub, (*inside, eqn.primitive.name))


@pairs
def test_no_collective_in_a_loop(pair):
    """A loop that stops at its own time on each device would wait for ever."""
    body = lambda w, xs: many(w, xs, pair)
    sharded = jax.shard_map(body, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"))
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(sharded(w, XS))))(W)
    seen = list(primitives(jaxpr.jaxpr))
    assert any(name in ("while", "scan") for name, _, _ in seen)
    collective = [
        name for name, around, _ in seen if "psum" in name and {"while", "scan", "cond"} & {*around}
    ]
    assert not collective


@pairs
def test_no_callback_and_no_cotangent_per_example(pair):
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(many(w, XS, pair))))(W)
    seen = list(primitives(jaxpr.jaxpr))
    assert not [name for name, _, _ in seen if "callback" in name]
    assert not [shapes for _, _, shapes in seen if (BATCH, SIZE, SIZE) in shapes]


@pairs
def test_traces(pair):
    """Another tolerance, beta or budget does not trace f again, inside jit or out of it."""
    solver, adjoint, max_steps = pair
    count = collections.Counter()

    def fn(z, x):
        count["traces"] += 1
        return jnp.tanh(z + x) / 2

    def run(tol, steps):
        changed = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (tol, tol))
        return deqjax.fixed_point(
            fn,
            changed,
            jnp.zeros(3),
            jnp.ones(3),
            max_steps=max_steps,
            steps=steps,
            adjoint=adjoint,
        ).value

    for tol, steps in [(1e-3, 3), (1e-2, 4), (0.1, 5)]:
        run(tol, steps)
    assert count["traces"] == 3  # once a call, for what it closes over
    jitted = jax.jit(run)
    jitted(jnp.asarray(1e-3), 3)
    count["traces"] = 0
    for tol, steps in [(1e-2, 4), (0.0, 5)]:
        jitted(jnp.asarray(tol), steps)
    assert count["traces"] == 0

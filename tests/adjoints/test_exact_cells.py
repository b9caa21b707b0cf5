"""Cells that XLA rounds differently before and after differentiation, reversed bit for bit.

The cells of the design page's table: small dense ones with several activations, normalisation by a
square root, convolutions, attention; single and batched, their arrays passed in and closed over.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error
from registry import names

import deqjax

pytestmark = pytest.mark.optimised
STEPS = 16


def normalise(v, axes=-1):
    # Dividing by a square root on purpose: XLA rewrites it where the root is not needed as well.
    centred = v - jnp.mean(v, axes, keepdims=True)
    return centred / jnp.sqrt(jnp.var(v, axes, keepdims=True) + 1e-5)


def group_norm(v):
    split = v.reshape(*v.shape[:-1], 2, v.shape[-1] // 2)
    return normalise(split, (-4, -3, -1)).reshape(v.shape)


def conv(v, w):
    many = v if v.ndim == 4 else v[None]
    layout = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(many, w, (1, 1), "SAME", dimension_numbers=layout)
    return out if v.ndim == 4 else out[0]


# Every cell uses its arrays in the order in which it gets them: that of `d_fn`, closed over.


def dense(act):
    return lambda z, p: act(p[0] @ z + p[1])


def rows(act):
    return lambda z, p: act(z @ p[0].T + p[1])


def mlp(z, p):
    x, up, down = p
    return normalise(jax.nn.gelu(normalise(z + x) @ up) @ down)


def convolution(z, p):
    up, down, x = p
    y = jax.nn.relu(group_norm(conv(z, up)))
    return group_norm(jax.nn.relu(z + group_norm(conv(y, down) + x)))


def attention(z, p):
    x, qkv, out, up, down = p
    h = normalise(z + x) @ qkv
    q, k, v = jnp.split(h.reshape(*h.shape[:-1], 2, -1), 3, -1)
    scores = jnp.einsum("...qhd,...khd->...hqk", q, k)
    causal = jnp.broadcast_to(np.tril(np.ones(scores.shape[-2:], bool)), scores.shape)
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    z = z + jnp.einsum("...hqk,...khd->...qhd", weights, v).reshape(z.shape) @ out
    return normalise(z + jax.nn.gelu(normalise(z) @ up) @ down)


def cell(fn, state, *shapes, batched=False, beta=0.5):
    return fn, state, shapes, batched, beta


ACTIVATIONS = [jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.silu, jax.nn.softplus]
CELLS = {}
for n, act in [*zip([1, 2, 3, 4, 5, 6, 7, 9, 16], 2 * ACTIVATIONS, strict=False)]:
    CELLS[f"{act.__name__}-{n}"] = cell(dense(act), (n,), (n, n), (n,))
for act, beta in zip(ACTIVATIONS, [0.5, 0.8, 1.2, 0.8, 0.5], strict=True):
    CELLS[f"{act.__name__}-8"] = cell(dense(act), (8,), (8, 8), (8,), beta=beta)
for n, act, beta in [(3, jnp.tanh, 0.5), (8, jax.nn.relu, 0.8), (9, jax.nn.gelu, 1.2)]:
    shapes = (n, n), (3, n)
    CELLS[f"batched-{act.__name__}-{n}"] = cell(rows(act), (3, n), *shapes, batched=True, beta=beta)
for n, beta in [(4, 0.5), (5, 0.8), (6, 0.8), (8, 1.2), (16, 0.5)]:
    CELLS[f"mlp-{n}"] = cell(mlp, (n,), (n,), (n, 2 * n), (2 * n, n), beta=beta)
CELLS["batched-mlp-4"] = cell(mlp, (3, 4), (3, 4), (4, 8), (8, 4), batched=True, beta=0.8)
for c, n, beta in [(4, 4, 0.5), (8, 3, 0.8), (4, 2, 1.2)]:
    kernel = (3, 3, c, c)
    CELLS[f"convolution-{c}-{n}"] = cell(
        convolution, (n, n, c), kernel, kernel, (n, n, c), beta=beta
    )
kernel, state = (3, 3, 4, 4), (2, 3, 3, 4)
CELLS["batched-convolution"] = cell(convolution, state, kernel, kernel, state, batched=True)
t, d = 3, 4
shapes = (t, d), (d, 3 * d), (d, d), (d, 2 * d), (2 * d, d)
CELLS[f"attention-{t}-{d}"] = cell(attention, (t, d), *shapes)


def build(name, guard=None):
    fn, state, shapes, batched, beta = CELLS[name]
    rng = np.random.default_rng(len(name))

    def draw(shape):
        x = rng.standard_normal(shape)
        # The weights of a cell without a norm have to contract; its input has to be large enough
        # for the states to have digits that matter.
        matrix = len(shape) == 2 and shape[0] == shape[1]
        x = 0.7 * x / np.linalg.norm(x, 2) if matrix else x / np.sqrt(np.prod(shape[:-1]))
        return jnp.asarray(x if shape != state else 2 * x, jnp.float32)

    p = tuple(map(draw, shapes))
    z0, g = (jnp.asarray(rng.standard_normal(state), jnp.float32) for _ in range(2))
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, guard_bits=guard)
    return fn, p, z0, g, solver, dict(batched=batched, max_steps=STEPS)


def stored(fn, p, z0, g, beta):
    """The gradient with respect to p and z0 of the floating-point steps, all states stored."""
    jax.config.update("jax_disable_most_optimizations", True)  # faster, until the next test

    def last(p, z0):
        step = lambda s, _: ((s[1], (1 - beta) * s[0] + beta * fn(s[1], p)), None)
        return jax.lax.scan(step, (z0, z0), length=STEPS)[0][1]

    return jax.jit(lambda p, z0, g: jax.vjp(last, p, z0)[1](g))(p, z0, g)


QUICK = {"tanh-1", "relu-2", "gelu-3", "silu-4", "softplus-5", "batched-tanh-3", "mlp-4"}
QUICK |= {"batched-mlp-4", "convolution-4-4", "batched-convolution", "attention-3-4"}
assert QUICK < set(CELLS)


@pytest.mark.parametrize("name", names(CELLS, *(set(CELLS) - QUICK)))
def test_every_cell_is_reversed_to_the_bit(name):
    """By guard digits, and with f isolated; its arrays passed in, and closed over."""
    fn, p, z0, g, guarded, options = build(name)
    isolated = build(name, guard=0)[4]
    inside = lambda z, _: fn(z, p)
    (_, *found), stats = deqjax.reversible_vjp(fn, guarded, z0, p, g, **options)
    (_, *alone), apart = deqjax.reversible_vjp(fn, isolated, z0, p, g, **options)
    (d_fn, _, d_start), closed = deqjax.reversible_vjp(inside, isolated, z0, None, g, **options)
    for out in (stats, apart, closed):
        assert jnp.all(out["reversal_residual"] == 0)
        assert jnp.all(out["trusted"])
        assert jnp.all(out["num_steps"] == STEPS)
    assert jnp.all(stats["guard"] < 0.5)
    truth = stored(fn, p, z0, g, guarded.beta)
    for grads in (found, alone, (d_fn, d_start)):
        assert relative_error(tuple(grads), truth) < 1e-4


@pytest.mark.parametrize("name", ["mlp-6", "convolution-4-4"])
def test_the_hazard_is_real(monkeypatch, name):
    """Without its loop of one trip f has other bits in the sweep, and the gradient is refused.

    So guard digits have something to correct.
    """
    monkeypatch.setattr("deqjax.adjoints.reversible._tape.Digits.isolated", False)
    # None that has been compiled with the loop.
    monkeypatch.setattr("deqjax._program._programs", collections.OrderedDict())
    fn, p, z0, g, solver, options = build(name, guard=0)
    assert jnp.any(deqjax.reversible_vjp(fn, build(name)[4], z0, p, g, **options)[1]["guard"] > 0)
    grads, stats = deqjax.reversible_vjp(fn, solver, z0, p, g, **options)
    assert stats["reversal_residual"] > 0
    assert not stats["trusted"]
    assert all(jnp.all(jnp.isnan(x)) for x in jax.tree.leaves(grads))

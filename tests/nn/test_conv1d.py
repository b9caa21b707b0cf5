"""`nn.Conv1d` against its sums, written out, and what a loop makes of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error

from deqjax.nn import Conv1d

kinds = pytest.mark.parametrize(
    "size, causal", [(1, False), (3, False), (5, False), (1, True), (2, True), (3, True), (4, True)]
)


def sums(conv, x):
    size = conv.kernel.shape[0]
    before = size - 1 if conv.causal else size // 2
    x = jnp.pad(x, ((before, size - 1 - before), (0, 0)))
    taps = [x[a : a + len(x) - size + 1] @ conv.kernel[a] for a in range(size)]
    return sum(taps) + (0 if conv.bias is None else conv.bias[None])


@pytest.mark.x64
@kinds
def test_value_and_cotangents(getkey, size, causal):
    conv = Conv1d(3, 4, size, causal=causal, dtype=jnp.float64, key=getkey())
    for length in (1, 2, 7):
        x, g = (jax.random.normal(getkey(), (length, n)) for n in (3, 4))
        y, pull = eqx.filter_vjp(lambda conv, x: conv(x), conv, x)
        truth, expected = eqx.filter_vjp(sums, conv, x)
        assert y.shape == (length, 4)
        assert relative_error(y, truth) < 1e-12
        for a, b in zip(*(jax.tree.leaves(p(g)) for p in (pull, expected)), strict=True):
            assert relative_error(a, b) < 1e-12


@pytest.mark.x64
def test_under_transformations(getkey):
    conv = Conv1d(3, 3, 3, causal=True, use_bias=False, dtype=jnp.float64, key=getkey())
    xs = jax.random.normal(getkey(), (4, 6, 3))
    assert relative_error(jax.vmap(conv)(xs), jax.vmap(lambda x: sums(conv, x))(xs)) < 1e-12
    loss = lambda conv, apply: jnp.sum(jnp.sin(jax.vmap(lambda x: apply(conv, x))(xs)))
    for derive in (jax.grad, lambda f: jax.jacfwd(jax.grad(f)), lambda f: jax.jacrev(jax.grad(f))):
        run = lambda w, apply, conv=conv: loss(eqx.tree_at(lambda c: c.kernel, conv, w), apply)
        ours, theirs = (
            derive(lambda w, a=a, run=run: run(w, a))(conv.kernel) for a in (Conv1d.__call__, sums)
        )
        assert relative_error(ours, theirs) < 1e-11


def test_a_position_sees_no_later_one(getkey):
    conv = Conv1d(2, 2, 4, causal=True, key=getkey())
    x = jax.random.normal(getkey(), (6, 2))
    later = x.at[4:].set(7.0)
    np.testing.assert_array_equal(conv(x)[:4], conv(later)[:4])
    assert jnp.all(conv(x)[4] != conv(later)[4])


def test_the_batch_has_one_kernel_cotangent(getkey):
    """And products of two matrices, with no cotangent of a convolution left in it."""
    conv, xs = Conv1d(4, 4, 3, key=getkey()), jax.random.normal(getkey(), (8, 5, 4))
    step = lambda conv, xs: jnp.sum(jnp.tanh(jax.vmap(conv)(xs)))
    text = str(jax.make_jaxpr(eqx.filter_grad(step))(conv, xs))
    assert "(8,3,4,4)" not in text.replace(" ", "") and "f32[8,3," not in text
    assert text.count("deqjax_conv2d_kernel") == 1


def test_dtypes(getkey):
    conv = Conv1d(3, 3, compute_dtype=jnp.bfloat16, key=getkey())
    x = jax.random.normal(getkey(), (5, 3))
    assert conv(x).dtype == jnp.float32
    assert 1e-4 < relative_error(conv(x), sums(conv, x)) < 2e-2


def test_refused(getkey):
    for size in (2, 0, 1.0):
        with pytest.raises(ValueError, match="expects"):
            Conv1d(3, 3, size, key=getkey())
    with pytest.raises(ValueError, match="kernel_size"):
        Conv1d(3, 3, 0, causal=True, key=getkey())
    conv = Conv1d(3, 3, key=getkey())
    for x in (jnp.ones((2, 5, 3)), jnp.ones((5, 2)), jnp.ones((5, 3), jnp.bfloat16)):
        with pytest.raises(ValueError, match="Conv1d expects one sequence"):
            conv(x)

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax.nn import GroupNorm


@pytest.mark.x64
@pytest.mark.parametrize(
    ("groups", "shape"), [(1, (4, 5, 6)), (2, (5, 6)), (3, (4, 5, 6)), (3, (6,))]
)
def test_against_equinox(getkey, groups, shape):
    x = 3 + 2 * jax.random.normal(getkey(), shape)
    weight, bias = jax.random.normal(getkey(), (2, 6))
    fields = lambda norm: (norm.weight, norm.bias)
    ours = eqx.tree_at(fields, GroupNorm(groups, 6), (weight, bias))
    theirs = eqx.tree_at(fields, eqx.nn.GroupNorm(groups, 6), (weight, bias))
    truth = lambda x: jnp.moveaxis(theirs(jnp.moveaxis(x, -1, 0)), 0, -1)
    np.testing.assert_allclose(ours(x), truth(x), atol=1e-12)
    total = lambda f: jax.grad(lambda x: jnp.sum(jnp.sin(f(x))))(x)
    np.testing.assert_allclose(total(ours), total(truth), atol=1e-11)


def test_half_precision_is_normalised_in_float32():
    # The sum of 4096 ones is 256 if it is taken in bfloat16, the mean 1/16, and nothing is centred.
    x = jnp.ones((64, 64, 2), jnp.bfloat16).at[::2].set(3)
    y = GroupNorm(1, 2, dtype=jnp.bfloat16)(x)
    assert y.dtype == jnp.bfloat16
    assert jnp.all(jnp.abs(y) == 1) and jnp.sum(y.astype(jnp.float32)) == 0


def test_a_constant_example_has_finite_derivatives():
    norm = GroupNorm(2, 4)
    g = jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(jnp.ones((3, 3, 4)))
    assert jnp.all(jnp.isfinite(g))


def test_bad_input_raises():
    with pytest.raises(ValueError, match="divide channels, got 4 groups of 6"):
        GroupNorm(4, 6)
    with pytest.raises(ValueError, match=r"6 channels on the last axis, got shape \(6, 3\)"):
        GroupNorm(2, 6)(jnp.ones((6, 3)))

"""Cells that the numerical test of the hypotheses refuses, and cells that it lets pass."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from registry import slow

from deqjax import nn
from deqjax.positive import PROPERTIES, Power, Shifted, check_hypotheses, saturating

check = partial(check_hypotheses, key=jax.random.key(7), samples=64)


def matrix(key, radius, n=8):
    w = jax.random.uniform(key, (n, n))
    z = jnp.ones(n)
    for _ in range(50):
        z = w @ z / jnp.max(w @ z)
    return radius * w / jnp.max(w @ z)


def refused(found):
    return {name for name, finding in found._asdict().items() if not finding.holds}


three = lambda z: jnp.stack([z[0] - z[1], z[1] - z[0]])  # W z, W = [[1, -1], [-1, 1]]
COUNTEREXAMPLES = {
    # f, x, and the hypotheses that it breaks, at least
    "x below 0": (lambda z, x: jax.nn.sigmoid(10 * z + x), [-5.0], {"concave", "scalable"}),
    "tanh, x = 0": (lambda z, x: jnp.tanh(2 * z + x), [0.0], {"positive"}),
    "sqrt, x = 0": (lambda z, x: jnp.sqrt(5 * z + x), [0.0], {"positive"}),
    "cycle": (lambda z, x: jnp.tanh(-3 * z + x), [1.0], {"positive", "monotone"}),
    "softplus": (lambda z, x: jax.nn.softplus(z / 2 + x), [0.0], {"concave"}),
    "three": (lambda z, x: jnp.tanh(three(z) + x) + 1.2, [0.0, 0.0], {"monotone", "concave"}),
}


@pytest.mark.parametrize("name", COUNTEREXAMPLES)
@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.x64)])
def test_counterexamples_are_refused(name, x64):
    f, x, broken = COUNTEREXAMPLES[name]
    found = check(f, jnp.asarray(x))
    assert not found.holds and broken <= refused(found)
    assert all(getattr(found, name).violation > 100 for name in broken)


@pytest.mark.parametrize("slope", [10.0, slow(30.0), slow(60.0), 100.0])
@pytest.mark.parametrize("x64", [False, pytest.param(True, marks=pytest.mark.x64)])
@pytest.mark.parametrize("n", [1, 5])
def test_points_reach_every_fixed_point(slope, x64, n):
    """However small f(0) is: 2e-22 with the steepest, whose other two are 1/2 and 1."""
    f = lambda z, x: jax.nn.sigmoid(slope * z + x)
    for seed in range(5):
        found = check(f, jnp.full(n, -slope / 2), key=jax.random.key(seed))
        assert "concave" in refused(found) and found.concave.violation > 100


@pytest.mark.x64
def test_the_three_fixed_points():
    f, x, _ = COUNTEREXAMPLES["three"]
    starts = jnp.asarray([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    ends = jax.vmap(lambda z: jax.lax.fori_loop(0, 500, lambda _, z: f(z, jnp.asarray(x)), z))(
        starts
    )
    expected = [[1.2, 1.2], [2.1575, 0.2425], [0.2425, 2.1575]]
    np.testing.assert_allclose(ends, expected, atol=1e-4)


def test_a_witness_is_a_counterexample():
    f, x, _ = COUNTEREXAMPLES["cycle"]
    x = jnp.asarray(x)
    found = check(f, x)
    assert f(found.positive.witness, x) <= 0
    z = found.monotone.witness
    assert jax.jvp(lambda z: f(z, x), (z,), (jnp.ones(1),))[1] < 0
    f, x, _ = COUNTEREXAMPLES["x below 0"]
    x = jnp.asarray(x)
    z, a = check(f, x).scalable.witness, jnp.exp(jnp.linspace(0.0, 4.0, 99))
    assert jnp.max(f(a * z, x) / a) > 2 * f(z, x)[0]
    # Seen at f(0) already: then 0 is the witness.
    f, x, _ = COUNTEREXAMPLES["sqrt, x = 0"]
    assert check(f, jnp.asarray(x)).positive.witness == 0


@pytest.mark.parametrize("radius", [0.5, 0.9, 0.99, 1.01, 1.5])
def test_relu_has_a_fixed_point_if_the_radius_is_below_one(getkey, radius):
    w = matrix(getkey(), radius)
    f = lambda z, x: jax.nn.relu(w @ z + x)
    found = check(f, jnp.linspace(1e-3, 1.0, 8))
    assert refused(found) == (set() if radius < 1 else {"exists"})
    if radius < 1:
        u = found.exists.witness
        assert jnp.all(f(u, jnp.linspace(1e-3, 1.0, 8)) <= u)
        np.testing.assert_allclose(1 + found.exists.violation * _rounding(8), radius, rtol=0.02)


def _rounding(n):
    return 2 * (8 + np.sqrt(n)) * float(jnp.finfo(jnp.float32).eps)


qualified = [f for f, known in PROPERTIES.items() if known.concave and known.sublinear]


@pytest.mark.parametrize(
    "activation",
    # The first of the names of one function.
    [
        *{f.__name__: f for f in reversed(qualified)}.values(),
        Shifted(jnp.tanh, 1.2),
        Power(0.5, 1e-3),
    ],
    ids=lambda f: getattr(f, "__name__", "parametrised"),
)
def test_what_holds_passes(getkey, activation):
    cell = nn.PositiveConcaveLinear(8, activation, key=getkey())
    for size in (1.0, 1e4):
        v = jnp.sqrt(size) * cell.weight.args[0]  # pyright: ignore
        found = check(eqx.tree_at(lambda c: c.weight.args[0], cell, v), jnp.linspace(-5, 3, 8))
        assert found.holds
        worst = max(float(f.violation) for f in found[:4])
        assert worst < 0.3  # far from what would be a counterexample


@pytest.mark.parametrize(
    "rough", [lambda u: 1 - jnp.exp(-u), lambda u: 1 - 2 / (jnp.exp(2 * u) + 1), jnp.tanh]
)
def test_cancellation_is_no_counterexample(getkey, rough):
    cell = eqx.Partial(lambda w, z, x: rough(w @ z + x))
    for size in (1e-3, 1.0, 30.0):
        assert check(eqx.Partial(cell, matrix(getkey(), size)), jnp.full(8, 1e-3)).holds


@pytest.mark.parametrize("p", [0.1, 0.02, 0.01])
def test_rounding_that_f_amplifies_is_reported_and_no_counterexample(getkey, p):
    """A mean of exponent p is concave; the power 1 / p multiplies every rounding by as much."""
    w = matrix(getkey(), 1.0, 4)
    w = w / jnp.sum(w, axis=1, keepdims=True)
    found = check(lambda z, x: 0.5 * (w @ z**p) ** (1 / p) + x, jnp.full(4, 0.1))
    assert found.holds
    assert max(found.concave.violation, found.scalable.violation) > (1 if p < 0.1 else 0)


def test_other_cells(getkey):
    x = jax.random.normal(getkey(), (4, 5, 3))
    for nonnegative in (jnp.square, jax.nn.softplus, None):
        cell = nn.PositiveConcaveConv2d(3, nonnegative=nonnegative, key=getkey())
        assert check(cell, x).holds
    assert check(nn.SubhomogeneousConv2d(3, key=getkey()), x).holds
    # A user's own cell, wrapped, with a parametrised weight and a pair as state.
    weight = paramax.Parameterize(jnp.exp, jax.random.normal(getkey(), (5, 5)))
    assert check(nn.PositiveConcave(Pair(weight)), (x[0, :, 0], x[1, :, 1])).holds
    # Two dtypes.
    two = lambda z, x: (jnp.tanh(z[0] + x[0]), jnp.log1p(z[1] + x[1]))
    assert check(two, (jnp.ones(2), jnp.ones(1, jnp.bfloat16))).holds
    # Division by the largest entry is not monotone.
    found = check(nn.SubhomogeneousLinear(5, normalise=True, key=getkey()), x[0, :, 0])
    assert "monotone" in refused(found) and found.exists.holds


class Pair(eqx.Module):
    weight: paramax.Parameterize

    def __call__(self, z, x):
        w = self.weight
        return saturating(w @ z[1] + x[0]), jnp.log1p(w @ z[0] + x[1])


def test_a_state_unlike_the_input(getkey):
    w = jax.random.uniform(getkey(), (3, 5))
    f = lambda z, x: jnp.tanh(z[:3] + w @ x)
    assert check(f, jnp.ones(5), z=jnp.zeros(3)).holds
    with pytest.raises(ValueError, match="structure, shapes and dtypes of z0"):
        check(f, jnp.ones(5))


def test_half_precision(getkey):
    for dtype in (jnp.bfloat16, jnp.float16):
        cell = nn.PositiveConcaveLinear(8, dtype=dtype, key=getkey())
        found = check(cell, jnp.linspace(-1, 1, 8, dtype=dtype))
        assert found.holds and found.concave.witness.dtype == dtype
        assert not check(lambda z, x: jnp.tanh(-3 * z + x), jnp.ones(1, dtype)).monotone.holds


def test_values_that_are_not_finite_are_refused():
    found = check(lambda z, x: jnp.tanh(z + x) + jnp.where(z > 10, jnp.nan, 0), jnp.ones(2))
    assert "positive" in refused(found)


def test_under_transformations(getkey):
    cell, xs = nn.PositiveConcaveLinear(4, key=getkey()), jax.random.normal(getkey(), (2, 4))
    found = jax.jit(jax.vmap(lambda x: check(cell, x)))(xs)
    assert found.holds.shape == (2,) and jnp.all(found.holds)
    assert found.concave.violation.shape == (2,) and found.exists.witness.shape == (2, 4)
    np.testing.assert_allclose(found.concave.violation[0], check(cell, xs[0]).concave.violation)


def test_bad_input_raises():
    f = lambda z, x: jnp.tanh(z + x)
    with pytest.raises(ValueError, match=r"expects a cell\(z, x\)"):
        check(jnp.ones(3), jnp.ones(3))
    for samples in (0, 1.5, True):
        with pytest.raises(ValueError, match="samples to be an int"):
            check(f, jnp.ones(3), samples=samples)
    with pytest.raises(ValueError, match="floating-point arrays"):
        check(f, jnp.ones(3, bool))

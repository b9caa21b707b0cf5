"""The table of activations, against the functions themselves."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax import nn, positive
from deqjax.positive import ACTIVATIONS, PROPERTIES, Power, Shifted, properties, qualify

parametrised = [
    Shifted(jnp.tanh, 1.2),
    Shifted(jnp.tanh, 1.603),
    Shifted(jax.nn.hard_tanh, 0.5),
    Shifted(jax.nn.sigmoid, 0.1),
    Shifted(positive.saturating, 2.0),
    Power(0.5, 1e-3),
    Power(0.9),
    Power(0.1, 2.0),
]
everything = [*PROPERTIES, *parametrised]


def label(f):
    """No address: pytest's workers have to agree on the names of tests."""
    name = lambda x: getattr(x, "__name__", None) or str(x)
    return "-".join(map(name, dataclasses.astuple(f))) if dataclasses.is_dataclass(f) else name(f)


each = pytest.mark.parametrize("activation", everything, ids=label)


@pytest.mark.x64
@each
def test_the_record_is_true(activation):
    known = properties(activation)
    np.testing.assert_allclose(activation(jnp.zeros(())), known.at_zero, rtol=1e-15)
    assert known.kind == (1 if known.at_zero == 0 else 2)
    u = jnp.linspace(0.0, 20.0, 4001)
    s = activation(u)
    rise, ulp = jnp.diff(s), 8 * jnp.finfo(s.dtype).eps * jnp.max(s)
    assert jnp.all(rise >= -ulp) and s[1] > 0
    assert bool(jnp.all(jnp.diff(rise) <= ulp)) == known.concave
    far = float(activation(jnp.asarray(1e8)))
    assert far <= known.supremum * (1 + 1e-15)
    assert far > known.supremum - 1e-7 if math.isfinite(known.supremum) else far > 6
    assert (far < 1e7 * 2) == known.sublinear


@pytest.mark.x64
@each
def test_the_subhomogeneity_is_the_supremum(activation):
    known = properties(activation)
    u = jnp.geomspace(1e-8, 1e8, 200_001)
    value, slope = jax.jvp(activation, (u,), (u,))
    largest = float(jnp.max(slope / value))
    # The grid's step is 2e-4 in log u, and a supremum may be a limit at either end.
    assert largest <= known.subhomogeneity * (1 + 1e-12)
    np.testing.assert_allclose(largest, known.subhomogeneity, rtol=1e-3)


def test_known_values():
    mu = lambda f: properties(f).subhomogeneity
    np.testing.assert_allclose(mu(jax.nn.sigmoid), 0.2784645427610738, rtol=1e-15)
    np.testing.assert_allclose(mu(Shifted(jnp.tanh, 1.2)), 0.24699398, rtol=1e-7)
    np.testing.assert_allclose(mu(Shifted(jnp.tanh, 1.603)), 0.20144583, rtol=1e-7)
    # At the kink u = 1, 1 / (1 + shift).
    np.testing.assert_allclose(mu(Shifted(jax.nn.hard_tanh, 0.5)), 2 / 3, rtol=1e-6)
    assert mu(Power(0.3, 1.0)) == 0.3


@pytest.mark.x64
@each
def test_an_interference_map_is_monotone_and_scalable(getkey, activation):
    known = properties(activation)
    w = jax.random.uniform(getkey(), (6, 6))
    x = 0.1 if known.kind == 1 else 0.0
    f = lambda z: activation(w @ z + x)
    for size in (1e-2, 0.1, 1.0):
        z, d = size * jax.random.uniform(getkey(), (2, 6))
        assert jnp.all(f(z) > 0) and jnp.all(f(z + d) >= f(z))
        assert jnp.all(f(3 * z) < 3 * f(z))


@pytest.mark.x64
@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.identity, jax.nn.softplus])
def test_without_sublinearity_a_fixed_point_needs_a_small_radius(getkey, activation):
    assert not properties(activation).sublinear
    w = jax.random.uniform(getkey(), (6, 6))
    w = w / jnp.max(jnp.abs(jnp.linalg.eigvals(w)))
    for radius, exists in ((0.98, True), (1.02, False)):
        f = lambda z, r=radius: activation(r * w @ z + 0.1)
        z = jax.lax.fori_loop(0, 3000, lambda _, z, f=f: f(z), jnp.zeros(6))
        assert bool(jnp.max(jnp.abs(f(z) - z)) < 1e-8) == exists
        assert bool(jnp.max(z) > 1e8) != exists


def test_what_qualifies():
    for f in everything:
        known = properties(f)
        if known.concave and known.sublinear:
            assert qualify(f) == (known.kind, known.supremum)
        else:
            assert f in (jax.nn.relu, jax.nn.identity, jax.nn.softplus) and f not in ACTIVATIONS
            with pytest.raises(ValueError, match="spectral radius"):
                qualify(f)


@pytest.mark.parametrize("other", [jax.nn.gelu, lambda u: jnp.tanh(u), "tanh", [1], None])
def test_unknown_activations_raise(other):
    with pytest.raises(ValueError, match=r"something is known.*tanh.*got .*AbstractActivation"):
        properties(other)


@dataclasses.dataclass(frozen=True)
class Mine(positive.AbstractActivation):
    """A user's own, which says that it is concave."""

    scale: float

    @property
    def properties(self):
        return properties(jnp.tanh)._replace(supremum=self.scale)

    def __call__(self, u):
        return self.scale * jnp.tanh(u)


def test_an_activation_of_ones_own(getkey):
    assert qualify(Mine(3.0)) == (1, 3.0)
    cell = nn.PositiveConcaveLinear(3, Mine(3.0), key=getkey())
    assert jnp.all(cell(jnp.ones(3), cell.inject(jnp.ones(3))) <= 3)


def test_bad_numbers_raise():
    for shift in (0.0, -1.0, True, math.inf, math.nan, jnp.ones(())):
        with pytest.raises(ValueError, match="number above 0 as shift"):
            Shifted(jnp.tanh, shift)  # pyright: ignore
    for base in (jnp.sqrt, jax.nn.relu, jax.nn.softplus):
        with pytest.raises(ValueError, match="concave and bounded"):
            Shifted(base, 1.0)
    for numbers in ((1.0,), (0.0,), (0.5, -1.0), (0.5, False), (jnp.ones(()),)):
        with pytest.raises(ValueError, match="0 < exponent < 1"):
            Power(*numbers)  # pyright: ignore
    for number in (0.0, True, math.inf, math.nan, jnp.ones(())):
        for field in ("floor", "sharpness"):
            with pytest.raises(ValueError, match="expects floor > 0"):
                positive.StrictlyPositive(**{field: number})  # pyright: ignore


def test_a_numpy_number_is_a_python_one(getkey):
    """Else its dtype would be the output's."""
    number, x = np.float64(0.5), jnp.linspace(0, 1, 3, dtype=jnp.bfloat16)
    assert Power(number, number)(x).dtype == x.dtype
    assert positive.StrictlyPositive(number, np.float64(2))(x).dtype == x.dtype
    for make in (nn.PositiveConcaveLinear, nn.SubhomogeneousLinear):
        for activation in (Shifted(jnp.tanh, number), Power(number)):
            cell = make(3, activation, floor=number, dtype=x.dtype, key=getkey())
            assert cell(x, cell.inject(x)).dtype == x.dtype
    assert Power(number) == Power(0.5) and isinstance(Power(number).exponent, float)


def test_equal_numbers_compile_once(getkey):
    traces = []

    @eqx.filter_jit
    def apply(cell, z):
        traces.append(1)
        # The record is at hand where everything is traced.
        return cell(z, z) * properties(cell.activation).subhomogeneity

    key = getkey()
    for make in (lambda: Shifted(jnp.tanh, 1.2), lambda: Power(0.5, 1e-3)):
        for _ in range(2):
            apply(nn.PositiveConcaveLinear(3, make(), key=key), jnp.ones(3))
    assert len(traces) == 2
    assert Shifted(jnp.tanh, 1.2) != Shifted(jnp.tanh, 1.3) and Power(0.5) != Power(0.6)
    assert len({Power(0.5), Power(0.5), Shifted(jnp.tanh, 1.0)}) == 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("activation", [positive.saturating, *parametrised[::3]], ids=label)
def test_dtypes(activation, dtype):
    u = jnp.asarray([0.0, 1e-3, 1.0, 30.0], dtype)
    got = activation(u)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32),
        activation(u.astype(jnp.float32)),
        rtol=4 * float(jnp.finfo(dtype).eps),
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strictly_positive(dtype):
    tree = (jnp.asarray([-100.0, 0.0], dtype), {"x": jnp.full((2, 1), 50.0, dtype)})
    low, high = positive.StrictlyPositive(floor=0.25, sharpness=2.0)(tree)
    assert low.dtype == dtype and high["x"].shape == (2, 1)
    np.testing.assert_allclose(low.astype(jnp.float32), [0.25, 0.25 + np.log(2) / 2], rtol=1e-2)
    np.testing.assert_allclose(high["x"].astype(jnp.float32), 50.25, rtol=1e-2)

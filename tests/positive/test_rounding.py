"""Roundings are counted, never below what happens, and what cannot be counted is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deqjax._problem import convert
from deqjax.nn import PositiveConcaveConv2d
from deqjax.positive._rounding import rounding

UNIT = 2.0**-24


def bound(fn, z, args=None, fan_in=None):
    """At the precision that is asked for around f; any other would round the inputs too."""
    with jax.default_matmul_precision("highest"):
        return float(rounding(convert(fn, z, args)[0], z, args, fan_in))


def units(fn, z, args=None, fan_in=None, unit=UNIT):
    total = bound(fn, z, args, fan_in)
    return round(total / (1 + total) / unit, 3)  # from float32


def test_sums_count_their_terms():
    z, w = jnp.ones(7), jnp.ones((7, 7))
    assert units(lambda z, w: w @ z, z, w) == 7
    assert units(lambda z, w: jnp.tanh(w @ z + 1), z, w) == 7 + 1 + 8
    assert units(lambda z, w: jax.nn.relu6(w @ z), z, w) == 7
    assert units(lambda z, _: z + jnp.sum(z), z) == 7 + 1
    np.testing.assert_allclose(units(lambda z, w: jnp.tanh(w @ z), z, w, fan_in=3), 12)
    # Arrays that do not depend on z count as exact.
    assert units(lambda z, w: z + w @ jnp.ones(7), z, w) == 1


def test_loops_branches_and_jitted_functions():
    z, w = jnp.ones(5), jnp.ones((5, 5))
    inner = jax.jit(lambda z, w: w @ z)
    assert units(inner, z, w) == 5

    def scan(z, w):
        return jax.lax.scan(lambda c, _: (w @ c, None), z, length=3)[0]

    assert units(scan, z, w) == 15
    assert units(lambda z, w: jax.checkpoint(inner)(z, w), z, w) == 5
    assert units(lambda z, w: jax.lax.cond(w[0, 0] > 0, inner, lambda z, w: z, z, w), z, w) == 5
    assert units(lambda z, _: jax.nn.softplus(z), z) == 4


def test_loops_with_a_counter_are_counted():
    z, w = jnp.ones(5), jnp.ones((5, 5))
    loop = lambda z, w: jax.lax.fori_loop(0, 3, lambda i, s: w @ s, z)
    assert units(loop, z, w) == 15
    hidden = lambda z, _: jax.lax.fori_loop(0, 3, lambda i, s: (s + 1e3) - 1e3, z)
    with pytest.raises(ValueError, match="'sub', which may cancel"):
        units(hidden, z)
    with pytest.raises(ValueError, match="'while', which is a loop"):
        units(lambda z, n: jax.lax.fori_loop(0, n, lambda i, s: 2 * s, z), z, jnp.asarray(3))
    first = jax.jit(lambda z: (jnp.argmax(z), (z + 1.0) - 1.0))
    with pytest.raises(ValueError, match="'argmax', which is not of real"):
        units(lambda z, _: first(z)[1], z)
    with pytest.raises(ValueError, match="'fft'|'convert_element_type', which is not of real"):
        units(lambda z, _: jnp.abs(jnp.fft.ifft(jnp.fft.fft(z))), z)
    with pytest.raises(ValueError, match="'reduce_precision', which is none"):
        units(lambda z, _: jax.lax.reduce_precision(z, 8, 7), z)


def test_convolutions(getkey):
    cell = PositiveConcaveConv2d(4, 3, key=getkey())
    z = jnp.ones((2, 6, 6, 4))
    # The square of the reparametrisation does not depend on z.
    assert units(jax.vmap(cell), z, z) == 36 + 1 + 8

    def stock(z, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(z, kernel, (1, 1), "SAME", dimension_numbers=layout)

    assert units(stock, z, jnp.ones((3, 3, 4, 4))) == 36


def test_half_precision_and_mixed():
    assert units(lambda z, _: z + z, jnp.ones(3, jnp.bfloat16), unit=2.0**-8) == 1
    low = lambda z, _: (z.astype(jnp.bfloat16) * 2).astype(jnp.float32)
    np.testing.assert_allclose(units(low, jnp.ones(3)), 2 * 2**16)
    w = jnp.ones((300, 300), jnp.bfloat16)
    assert bound(lambda z, w: w @ z, w[0], w) == np.inf


@jax.jit
def softplus(u):
    """Not JAX's."""
    return jnp.log1p(u) + jnp.sum(u)


@jax.jit
def mul(z, w):
    """Not the primitive."""
    return w @ z


def test_names_are_not_trusted():
    z, w = jnp.ones(5), jnp.ones((5, 5))
    assert units(mul, z, w) == 5
    assert units(lambda z, _: softplus(z), z) == 5 + 1  # the sum, and the addition
    assert units(lambda z, _: jax.nn.softplus(z), z) == 4


def test_what_is_passed_on():
    """Errors are followed through the function, not merely added up."""
    z, w = jnp.ones(5), jnp.ones((5, 5))
    assert units(lambda z, w: jnp.sqrt(w @ z), z, w) == 5 / 2 + 1
    assert units(lambda z, w: (w @ z) ** 2, z, w) == 2 * 5 + 2
    assert units(lambda z, w: (w @ z) ** 0.5, z, w) == 5 / 2 + 8
    assert units(lambda z, w: jnp.maximum(w @ z, z), z, w) == 5
    assert units(lambda z, w: (w @ z) * (w @ z) / (1 + z), z, w) == 5 + 5 + 1 + 1 + 3
    assert units(lambda z, w: -jnp.expm1(-(w @ z)), z, w) == 5 + 8


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (lambda z, _: jax.nn.sigmoid(10 * z - 5), "'sub', which may cancel"),
        (lambda z, _: jax.nn.sigmoid(10 * z + -5.0), "'add', which of numbers of opposite signs"),
        (lambda z, _: 1 + (-1 * z), "'add', which of numbers of opposite signs"),
        (lambda z, _: jnp.log(1 + z), "'log', which is none"),
        (lambda z, _: jnp.exp(z), "'exp', which is none"),
        (lambda z, _: jnp.expm1(z), "'expm1', which of a positive number"),
        (lambda z, _: jax.nn.sigmoid(-z), "'logistic', which of a negative number"),
        (lambda z, _: z**z, "'pow', which has an exponent that is no constant"),
        (lambda z, _: jnp.sort(z), "'sort', which is none"),
        (lambda z, _: jax.lax.while_loop(lambda z: z[0] < 1, lambda z: 2 * z, z), "'while'"),
    ],
)
def test_what_cannot_be_counted_is_refused(fn, what):
    z = jnp.ones(3)
    with pytest.raises(ValueError, match=f"certify expects fn.*{what}.*pass fan_in"):
        units(fn, z)
    np.testing.assert_allclose(units(fn, z, fan_in=3), 12)


@pytest.mark.parametrize("fan_in", [0, 2.0, True])
def test_bad_fan_in(fan_in):
    with pytest.raises(ValueError, match="fan_in to be an int of at least 1.*or None"):
        units(lambda z, _: z, jnp.ones(3), fan_in=fan_in)


@pytest.mark.x64
@pytest.mark.optimised
@pytest.mark.parametrize("sigma", [jnp.tanh, jax.nn.sigmoid, jax.nn.soft_sign, jnp.log1p, jnp.sqrt,
                                   jnp.arctan, jax.lax.erf, jax.nn.softplus])  # fmt: skip
def test_the_bound_is_above_what_happens(sigma):
    rng = np.random.default_rng(0)
    f = lambda z, args: sigma(z @ args[0] + args[1])
    w, x = rng.uniform(size=(80, 80)) / 40, rng.uniform(size=(1, 80))
    z = np.exp(rng.uniform(-9, 2, (2000, 80)))
    small = [jnp.asarray(a, jnp.float32) for a in (z, w, x)]
    wide = [a.astype(jnp.float64) for a in small]
    most = bound(f, small[0], small[1:])
    got = eqx.filter_jit(f)(small[0], small[1:])
    error = jnp.abs(got.astype(jnp.float64) / f(wide[0], wide[1:]) - 1)
    assert 0 < jnp.max(error) < most < 1e-5


def test_precision_and_bodies():
    z, w = jnp.ones(5), jnp.ones((5, 5))
    # At less than the highest precision inputs are rounded, whatever the platform here.
    low = lambda z, w: jnp.matmul(w, z, precision="default")
    np.testing.assert_allclose(units(low, z, w), 5 + 2**17, rtol=1e-6)
    assert float(rounding(convert(lambda z, w: w @ z, z, w)[0], z, w, None)) > 2.0**-7
    # An early result of a loop may be less exact than the last, and a later carry.
    early = lambda z, w: jax.lax.scan(lambda c, a: (a, c), w @ z, w)[1][0]
    assert units(early, z, w) == 5
    # The body of a reduction is not that of a call.
    folded = lambda z, _: jax.lax.reduce(z, np.float32(1), lambda a, b: a * b * a, (0,))
    with pytest.raises(ValueError, match="'reduce', which is none"):
        units(lambda z, _: z + folded(z, _), z)

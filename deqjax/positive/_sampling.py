"""Random points at which the hypotheses of the theorem are tested, and the violations there."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._tree import quotient, widen

# Half of the points lie within so many powers of ten of the size of f(0). The other half lie
# anywhere up to as many powers of ten above the largest fixed point.
_DECADES = 4.0


class _Chord(NamedTuple):
    """f along the chord from z to y, at m between them, and at points above z."""

    z: Float[Array, " n"]
    m: Float[Array, " n"]
    t: Float[Array, ""]  # m = (1 - t) z + t y
    a: Float[Array, ""]  # above 1
    values: Float[Array, "3 n"]  # f at z, m and y
    slopes: Float[Array, "3 n"]  # along y - z, at z, m and y
    steep: Float[Array, "3 n"]  # along |y - z|, at z, m and y
    rise: Float[Array, " n"]  # at z, along a direction v >= 0
    higher: Float[Array, " n"]  # f(z + v)
    scaled: Float[Array, " n"]  # f(a z)


def sample(f, b, size, above, rounding, key) -> tuple[Float[Array, "4"], Float[Array, "4 n"]]:
    """The violation of each hypothesis, in roundings, at random points, and these points."""
    chord = _chord(f, size, above, key)
    units = lambda excess, size: _units(excess, rounding * size)
    positive = jnp.all(b > 0)
    sign = jnp.where((b > 0) & (chord.values[0] > 0), 0, jnp.inf)
    found = (sign, _monotone(chord, units), _concave(chord, units), _scalable(chord, units))
    violations = jnp.stack([jnp.max(widen(v)) for v in found])
    z, m = chord.z, chord.m
    return violations, jnp.stack([jnp.where(positive, z, 0), z, m, z])


def _chord(f, size, above, key) -> _Chord:
    keys = jax.random.split(key, 7)
    draw = lambda i, low, high: jax.random.uniform(keys[i], (), size.dtype, low, high)
    # Three points of one scale: with very different scales a chord sees only the larger one.
    wide = _DECADES + jnp.where(jax.random.bernoulli(keys[6]), above, 0)
    decade = -_DECADES + (wide + _DECADES) * widen(draw(0, 0.0, 1.0))
    z, y, v = jax.vmap(lambda key: _point(size, decade, key))(keys[1:4])
    t, a = draw(4, 0.1, 0.9), jnp.exp(draw(5, 0.0, 4.0))
    d, m = y - z, (1 - t) * z + t * y
    # One trace of f for all points and directions: compiling f takes most of the time.
    points = jnp.stack([z, m, y, z, m, y, z])
    ways = jnp.stack([d, d, d, *[jnp.abs(d)] * 3, v])
    values, slopes = jax.vmap(lambda p, way: jax.jvp(f, (p,), (way,)))(points, ways)
    t, a, values, slopes, (higher, scaled) = jax.tree.map(
        widen, (t, a, values, slopes, jax.vmap(f)(jnp.stack([z + v, a * z])))
    )
    return _Chord(
        z, m, t, a, values[:3], slopes[:3], slopes[3:6], slopes[6], higher=higher, scaled=scaled
    )


def _monotone(c: _Chord, units: Callable) -> Float[Array, " n"]:
    # The smaller of two: 1 - exp(-u) cancels in its value, 1 - tanh^2 in its derivative.
    fz = c.values[0]
    size = _largest(fz, c.higher)
    return jnp.minimum(units(fz - c.higher, size), units(-c.rise, size))


def _concave(c: _Chord, units: Callable) -> Float[Array, " n"]:
    (fz, fm, fy), (first, middle, last) = c.values, c.slopes
    chord = units((1 - c.t) * fz + c.t * fy - fm, _largest(fz, fm, fy))
    steeper = jnp.maximum(jnp.maximum(middle, last) - first, last - middle)
    return jnp.minimum(chord, units(steeper, _largest(*c.steep)))


def _scalable(c: _Chord, units: Callable) -> Float[Array, " n"]:
    # f(z) <= 0 is a violation of `positive`, which `sample` counts.
    fz = c.values[0]
    return jnp.where(fz > 0, units(c.scaled - c.a * fz, c.a * fz), 0)


def _units(excess: Float[Array, " n"], size: Float[Array, " n"]) -> Float[Array, " n"]:
    """`excess / size`; 0 / 0 is no violation, and a value that is not finite is one."""
    units = jnp.where(excess <= 0, 0, quotient(excess, size))
    return jnp.where(jnp.isnan(units), jnp.inf, units)


def _largest(*arrays: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.max(jnp.abs(jnp.stack(arrays)), axis=0)


def _point(size, decade, key):
    of_scale, of_mask, of_density = jax.random.split(key, 3)
    density = jnp.asarray([1.0, 0.5, 1 / size.size])[jax.random.randint(of_density, (), 0, 3)]
    keep = jax.random.bernoulli(of_mask, density, size.shape)
    spread = jax.random.uniform(of_scale, size.shape, decade.dtype, -1.0, 1.0)
    z = jnp.minimum(widen(size) * 10 ** (decade + spread), limit(size.dtype))
    return jnp.where(keep, z, 0).astype(size.dtype)


def limit(dtype) -> float:
    """The largest entry of a point; its square is finite."""
    return float(jnp.finfo(dtype).max) ** 0.5

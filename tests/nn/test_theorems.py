"""Each cell is certified by its own theorem: no enclosure without the fixed point in it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest
from layers import Cell, layer

import deqjax
from deqjax import nn
from deqjax.positive import Power, Shifted

KEY = jax.random.key(0)
LONG = np.longdouble


def outside(c, z, given):
    """Problems whose enclosure holds and is wrong: of z*, or of the error of the z given."""
    lower, upper, error = (np.asarray(x).astype(LONG) for x in c[:3])
    tiny = 1e-15 * np.abs(z)
    wrong = np.any((z < lower - tiny) | (z > upper + tiny), -1)
    gap = np.abs(np.asarray(given).astype(LONG) - z) - tiny
    relative = np.max(np.where(gap > 0, gap / np.where(z > 0, z, 1e-300), 0), -1)
    return np.sum((wrong | (relative > error * (1 + LONG(1e-9)))) & np.asarray(c.holds))


def stored(x, dtype):
    return LONG(np.dtype(dtype).type(x))


# sigma in JAX, and in any precision with the numbers of a dtype.
SIGMAS = {
    "tanh": (Shifted(jnp.tanh, 1.603), lambda u, d: np.tanh(u) + stored(1.603, d)),
    "power": (Power(0.4), lambda u, d: u ** stored(0.4, d)),
    "sigmoid": (jax.nn.sigmoid, lambda u, d: 1 / (1 + np.exp(-u))),
}


def picard(sigma, w, x, normalise, steps=120):
    """z* in long double."""
    w, x, dtype = w.astype(LONG), x.astype(LONG), w.dtype
    z = np.ones_like(x)
    for _ in range(steps):
        y = sigma(np.einsum("bij,bj->bi", w, z) + x, dtype)
        z = y / np.max(y, -1, keepdims=True) if normalise else y
    return z


@pytest.mark.x64
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "normalise"), [("tanh", True), ("power", True), ("sigmoid", False)]
)
def test_no_subhomogeneous_cell_is_outside_its_enclosure(name, normalise, dtype):
    """None of 1,500; a normalised f is not monotone, and `deqjax.certify` errs for some."""
    activation, sigma = SIGMAS[name]
    rng, batch, n = np.random.default_rng(0), 250, 5
    cell = nn.SubhomogeneousLinear(
        n, activation, normalise=normalise, nonnegative=None, dtype=dtype, key=KEY
    )
    sizes = lambda low, high, *shape: 10 ** rng.uniform(low, high, (batch, *shape))
    sparse = rng.uniform(size=(batch, n, n)) < rng.choice([1.0, 0.3], (batch, 1, 1))
    w = (sizes(-3, 3, 1, 1) * rng.uniform(size=(batch, n, n)) * sparse).astype(dtype)
    x = (1e-3 + sizes(-3, 1, 1) * rng.uniform(size=(batch, n))).astype(dtype)
    truth = picard(sigma, w, x, normalise)
    # From a z that is right to one that is wrong by a factor of ten and more.
    off = sizes(-16, 0.5, 1) * (rng.uniform(size=(batch, 1)) < 0.8)
    z = (truth * np.exp(off * rng.normal(size=(batch, n)))).astype(dtype)

    @jax.jit
    @jax.vmap
    def run(w, x, z):
        return eqx.tree_at(lambda c: c.weight, cell, w).certify(z, x)

    c = run(w, x, z)
    assert np.all(c.holds) and outside(c, truth, z) == 0
    exact = off[:, 0] == 0
    assert np.max(c.relative_error[exact]) < 200 * np.finfo(dtype).eps
    np.testing.assert_allclose(c.spectral_radius[1], cell.rate, rtol=1e-5)


@pytest.mark.x64
def test_the_bound_by_contraction_is_attained():
    """`(w z)^0.9`, x = 0: an error of t in log z is one of 0.9 t in log f(z)."""
    cell = nn.SubhomogeneousLinear(1, Power(0.9), nonnegative=None, key=KEY)
    cell = eqx.tree_at(lambda c: c.weight, cell, jnp.full((1, 1), 3.0))
    truth = 3.0**9
    for t in (1e-6, 1.0):
        c = cell.certify(jnp.asarray([truth * np.exp(t)]), jnp.zeros(1))
        assert c.holds and c.lower[0] <= truth
        np.testing.assert_allclose(np.log(truth / c.lower[0]), 1e-9 * t, atol=1e-6 * t)
        np.testing.assert_allclose(c.relative_error, np.expm1(t), rtol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_what_the_contraction_asks_for(normalise):
    cell = nn.SubhomogeneousLinear(3, normalise=normalise, nonnegative=None, key=KEY)
    x = jnp.asarray([0.5, 0.0, 2.0])
    z, _ = layer(cell)(x)
    where = lambda c: c.weight
    changed = lambda bad: eqx.tree_at(where, cell, cell.weight.at[1, 2].set(bad))
    cells = [changed(bad) for bad in (-1e-3, jnp.nan, jnp.inf)]
    run = eqx.filter_jit(lambda cell, z, x: cell.certify(z, x))
    assert run(cell, z, x).holds
    refused = [run(wrong, z, x) for wrong in cells]
    refused += [run(cell, z.at[0].set(bad), x) for bad in (0.0, -1.0, jnp.nan, jnp.inf)]
    refused += [run(cell, z, x.at[0].set(bad)) for bad in (-1e-3, jnp.nan, jnp.inf)]
    for c in refused:
        assert not c.holds and c.relative_error == jnp.inf and c.spectral_radius[1] == jnp.inf
        assert jnp.all(c.lower == 0) and jnp.all(c.upper == jnp.inf)


def equilibrium(w, x, margin):
    """z* in long double, from the right set of active units; and a bound of its error."""
    m, n = np.eye(len(x)) - w.astype(np.float64), len(x)
    step = 1 / np.linalg.norm(m, 2)
    inverse, u = np.linalg.inv(np.eye(n) + step * m), np.zeros(n)
    for _ in range(3000):
        u = 2 * inverse @ (np.abs(u) + step * x) - np.abs(u)
    on, z = u > 0, np.zeros(n, LONG)
    for _ in range(4):
        missing = (x.astype(LONG) - z + w.astype(LONG) @ z)[on].astype(np.float64)
        z[on] += np.linalg.solve(m[np.ix_(on, on)], missing)
    z = np.maximum(z, 0)
    q = z - w.astype(LONG) @ z - x.astype(LONG)
    return z, np.linalg.norm(np.where(on, q, np.minimum(q, 0)).astype(float)) / margin


@pytest.mark.x64
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_monotone_cell_is_outside_its_enclosure(dtype):
    """W of any sign and size, with an eigenvalue at the margin in half of them."""
    rng, batch, n, margin = np.random.default_rng(1), 120, 6, 0.1
    draw = lambda *s: (
        rng.uniform(-1, 1, (batch, *s)) * 10 ** rng.uniform(-2, 1, (batch, *[1] * len(s)))
    )
    a, b, x = (draw(*s).astype(dtype) for s in ((n, n), (n, n), (n,)))
    a[::2, :, 0] = 0
    # A large symmetric part of B is no part of W, and of no rounding of it.
    b[::3] += (1e4 * (b[::3] + np.swapaxes(b[::3], 1, 2))).astype(dtype)
    cell = nn.MonotoneLinear(n, margin, dtype=dtype, key=KEY)
    put = lambda a, b: eqx.tree_at(lambda c: (c.weight.a, c.weight.b), cell, (a, b))
    w = np.asarray(jax.vmap(lambda a, b: paramax.unwrap(put(a, b).weight))(a, b))
    solved = [equilibrium(*each, margin) for each in zip(w, x, strict=True)]
    truth = np.stack([z for z, _ in solved])
    assert max(error / np.max(z, initial=1) for z, error in solved) < 1e-13
    assert np.any(truth == 0) and np.any(truth > 0)
    off = 10 ** rng.uniform(-16, 0.5, (batch, 1)) * (rng.uniform(size=(batch, 1)) < 0.7)
    z = (truth + off * rng.normal(size=(batch, n)) * (rng.uniform(size=(batch, n)) < 0.7)).astype(
        dtype
    )
    c = jax.jit(jax.vmap(lambda a, b, z, x: put(a, b).certify(z, x)))(a, b, z, x)
    assert np.all(c.holds) and outside(c, truth, z) == 0
    # Zeros are proved to be zeros, and the width is that of rounding.
    assert np.mean(np.asarray(c.upper)[truth == 0] == 0) > 0.5
    exact = (off[:, 0] == 0) & np.any(truth > 0, -1)
    width = np.max(np.asarray(c.upper - c.lower), -1)[exact] / np.max(truth, -1)[exact]
    assert np.median(width) < 4000 * np.finfo(dtype).eps


@pytest.mark.x64
def test_the_bound_by_monotonicity_is_attained():
    """A = B = 0: I - W is m I, and z* = x / m where x is positive."""
    cell = nn.MonotoneLinear(2, 0.25, key=KEY)
    cell = eqx.tree_at(lambda c: (c.weight.a, c.weight.b), cell, (jnp.zeros((2, 2)),) * 2)
    x = jnp.asarray([1.0, -1.0])
    c = cell.certify(jnp.asarray([4.0 + 1e-3, 0.0]), x)
    np.testing.assert_allclose(c.lower, [4.0, 0.0], atol=2e-5)
    np.testing.assert_allclose(c.upper, [4.0 + 1e-3, 0.0], atol=1e-3)
    assert c.lower[0] <= 4 and c.relative_error >= 2.5e-4
    # An entry that may be 0 has no finite relative error unless it is 0.
    c = cell.certify(jnp.asarray([4.0, 1e-9]), x)
    assert c.holds and c.relative_error == jnp.inf and c.upper[1] == 0


def test_what_monotonicity_asks_for():
    cell = nn.MonotoneLinear(3, 0.1, key=KEY)
    x = jnp.asarray([1.0, -0.5, 2.0])
    deq = layer(cell.peaceman_rachford())
    z, sol = deq(x)
    good = deq.certify(x, sol.value)
    assert good.holds and jnp.all((good.lower <= z) & (z <= good.upper))
    refused = [cell.certify(z.at[0].set(bad), x) for bad in (jnp.nan, jnp.inf)]
    refused += [cell.certify(z, x.at[0].set(bad)) for bad in (jnp.nan, jnp.inf, -jnp.inf)]
    # Less than rounding leaves of it, and half precision, leave no margin.
    refused.append(nn.MonotoneLinear(3, 1e-8, key=KEY).certify(z, x))
    half = nn.MonotoneLinear(3, 0.1, dtype=jnp.bfloat16, key=KEY)
    refused.append(half.certify(z.astype(jnp.bfloat16), x.astype(jnp.bfloat16)))
    for c in refused:
        assert not c.holds and c.relative_error == jnp.inf
        assert jnp.all(c.lower == 0) and jnp.all(c.upper == jnp.inf)
    with pytest.raises(ValueError, match="expects a weight with a margin"):
        deqjax.nn.PeacemanRachford(paramax.unwrap(cell.weight)).certify(z, x)


def test_half_precision_is_wide():
    cell = nn.SubhomogeneousLinear(4, nonnegative=None, dtype=jnp.bfloat16, key=KEY)
    x = cell.inject(jax.random.normal(KEY, (4,), jnp.bfloat16))
    w, x64 = (np.asarray(v, np.float64) for v in (cell.weight, x))
    sigma = lambda u, _: np.tanh(u) + float(jnp.bfloat16(1.2))
    truth = picard(sigma, w[None], x64[None], False)[0]
    z = cell(cell(jnp.ones(4, jnp.bfloat16), x), x)
    c = cell.certify(z, x)
    assert c.lower.dtype == jnp.float32 and c.holds and 1e-3 < c.relative_error < 0.2
    assert outside(c, truth, np.asarray(z, np.float64)) == 0
    half = nn.SubhomogeneousLinear(4, Power(0.3), dtype=jnp.float16, key=KEY)
    # Products of 1e-5 may have been flushed to 0 there.
    assert half.certify(jnp.ones(4, jnp.float16), jnp.ones(4, jnp.float16)).relative_error > 1


@pytest.mark.parametrize("kind", ["subhomogeneous", "monotone", "concave"])
def test_in_a_layer(kind):
    """One, a batch, in `vmap` and `jit`, without a gradient."""
    cells = {
        "subhomogeneous": nn.SubhomogeneousConv2d(2, normalise=True, key=KEY),
        "monotone": nn.MonotoneLinear(3, key=KEY).forward_backward(),
        "concave": nn.PositiveConcave(lambda z, x: jnp.tanh(z / 2 + x)),
    }
    deq, shape = layer(cells[kind]), (4, 3, 2) if kind == "subhomogeneous" else (3,)
    xs = jax.random.normal(KEY, (2, *shape))
    z, sol = deq.batch(xs)
    c = deq.certify(xs, sol.value, batched=True)
    assert jnp.all(c.holds) and c.holds.shape == (2,) and c.lower.shape == z.shape
    lower = lambda run: run(xs, sol.value).lower
    np.testing.assert_allclose(lower(jax.vmap(deq.certify)), c.lower, rtol=1e-4)
    np.testing.assert_allclose(deq.certify(xs[1], sol.value[1]).lower, c.lower[1], rtol=1e-4)
    total = lambda xs: jnp.sum(deq.certify(xs, sol.value, batched=True).lower)
    assert jnp.all(jax.jit(jax.grad(total))(xs) == 0)
    if kind != "concave":
        with pytest.raises(ValueError, match="one array like the injected x, float32 of shape"):
            deq.certify(xs, sol.value[0], batched=True)


def test_a_cell_of_no_known_theorem_is_refused():
    cell = Cell(jnp.eye(3) / 2, nn.VariationalDropout((3,)))
    with pytest.raises(ValueError, match=r"by which theorem.*got Cell.*nn.PositiveConcave\(cell\)"):
        layer(cell).certify(jnp.ones(3), jnp.ones(3))

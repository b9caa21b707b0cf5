"""An enclosure encloses, is as tight as theory and rounding let it be, and claims no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from concave import concave, relative
from jax.sharding import PartitionSpec as P

import deqjax
from deqjax.nn import PositiveConcaveConv2d

CASES = [
    ("tanh", 1.0, 0.1),
    ("tanh", 1.0, 1e-4),
    ("relu6", 1.0, 0.3),
    ("relu6", 1.01, 1e-3),
    ("sigmoid", 3.0, 0.1),
    ("soft_sign", 1.0, 0.1),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")


def check(c, z, truth, holds=True):
    """Nothing that the enclosure says is wrong; returns the true errors."""
    lower, upper = (np.asarray(x, np.float64) for x in (c.lower, c.upper))
    assert np.all(lower <= truth) and np.all(truth <= upper)
    error = relative(z, truth)
    assert np.all(np.asarray(c.relative_error) >= error)
    if holds:
        assert np.all(c.holds) and np.all(np.isfinite(c.relative_error))
    return error


def sources(p, dtype):
    """Points that solvers and others might return."""
    rng = np.random.default_rng(5)
    z = jnp.asarray(p.solution, dtype)
    noise = lambda size: jnp.asarray(1 + size * rng.uniform(-1, 1, z.shape), dtype)
    yield from (z, z * noise(1e-6), z * noise(1e-3), z * noise(0.1), z * 1.5, z / 3)
    yield jnp.asarray(rng.uniform(0, 10, z.shape), dtype)
    picard = jnp.zeros_like(z)
    yield picard
    for _ in range(20):
        picard = p.fn(picard, p.args)
    yield picard


@cases
@pytest.mark.x64
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_it_encloses_whatever_the_point(case, dtype):
    p = concave(*case, dtype=dtype)
    for z in sources(p, dtype):
        c = deqjax.certify(p.fn, z, p.args, batched=True)
        check(c, z, p.solution, holds=False)
        low, high = (np.asarray(x, np.float64) for x in c.spectral_radius)
        assert np.all(low <= p.rho) and np.all(p.rho <= high)


@cases
@pytest.mark.x64
def test_it_is_tight(case):
    """Within 15 % of the true error near the solution, or a factor of 2 beside a kink."""
    p = concave(*case)
    rng = np.random.default_rng(1)
    z = jnp.asarray(p.solution * (1 - 1e-5 * rng.uniform(0.5, 1, p.solution.shape)))
    c = deqjax.certify(p.fn, z, p.args, batched=True)
    error = check(c, z, p.solution)
    factor = 2 if case[0] == "relu6" else 1.15
    assert np.all(np.asarray(c.relative_error) <= factor * error)
    assert np.all(c.steps <= 11)
    low, high = c.spectral_radius
    assert np.all(high - low <= 0.2) and np.all(high < 1)


def test_float32_near_its_limit():
    """The bound is the error plus rounding over 1 - rho, not less and not much more."""
    p = concave("tanh", 1.0, 0.1)
    z = jnp.asarray(p.solution, jnp.float32)
    c = deqjax.certify(p.fn, z, p.args, batched=True)
    check(c, z, p.solution)
    rounding = (20 + 1 + 8) * 2.0**-24
    assert np.all(np.asarray(c.relative_error) <= 3 * rounding / (1 - p.rho))


@pytest.mark.x64
@pytest.mark.parametrize("start", [1e-3, 0.7, 1.6, 50.0])
def test_closed_form(start):
    """z = sqrt(z + a) has z* = (1 + sqrt(1 + 4 a)) / 2, and J = 1 / (2 z*) there."""
    f = lambda z, a: jnp.sqrt(z + a)
    z, a = jnp.asarray(start), jnp.asarray(1.0)
    c = deqjax.certify(f, z, a)
    truth = (1 + np.sqrt(5)) / 2
    check(c, z[None], np.array([truth]))
    assert c.spectral_radius[0] <= 1 / (2 * truth) <= c.spectral_radius[1]
    assert c.holds.shape == c.steps.shape == c.relative_error.shape == ()


@pytest.mark.x64
def test_pytrees_and_images(getkey):
    p = concave("tanh", 1.0, 0.3, batch=1)
    w, x = p.args
    cut = lambda v: {"a": v[:5], "b": (v[5:11].reshape(2, 3), v[11:].astype(jnp.float32))}
    join = lambda t: jnp.concatenate([t["a"], t["b"][0].reshape(-1), t["b"][1].astype(jnp.float64)])
    fn = lambda t, _: cut(jnp.tanh(w @ join(t) + x[0]))
    c = deqjax.certify(fn, cut(jnp.asarray(p.solution[0])))
    assert jax.tree.map(jnp.shape, c.lower) == {"a": (5,), "b": ((2, 3), (9,))}
    lower, upper = join(c.lower), join(c.upper)
    assert c.holds and np.all(lower <= p.solution[0]) and np.all(p.solution[0] <= upper)
    # One leaf is of float32.
    assert 1e-8 < c.relative_error < 1e-4

    cell = PositiveConcaveConv2d(3, 3, jax.nn.relu6, key=getkey())
    x = jax.vmap(cell.inject)(jax.random.normal(getkey(), (2, 5, 4, 3)))
    solver = deqjax.FixedPointIteration(rtol=1e-15, atol=0.0)
    sol = deqjax.fixed_point(jax.vmap(cell), solver, jnp.zeros_like(x), x, batched=True)
    z = sol.value * (1 + 1.0001e-4)
    c = deqjax.certify(jax.vmap(cell), z, x, batched=True)
    assert np.all(c.holds) and c.lower.shape == x.shape
    assert np.all((c.lower <= sol.value) & (sol.value <= c.upper))
    assert np.all((c.relative_error >= 1e-4) & (c.relative_error <= 2e-4))


@pytest.mark.x64
@pytest.mark.optimised
def test_rounding_does_not_cost_the_bound():
    """A first step that rounding refuses, from a z above z* in some entries: more of t v alone."""
    p = concave("relu6", 1.01, 1e-3, n=80, batch=64)
    solver = deqjax.PositiveConcaveSolver(rtol=1e-8, upper=6.0)
    z0 = jnp.zeros_like(p.args[1])
    z = deqjax.fixed_point(p.fn, solver, z0, p.args, batched=True).value
    c = deqjax.certify(p.fn, z, p.args, batched=True, fan_in=80)
    check(c, z, p.solution)
    assert np.all(np.asarray(c.relative_error) <= 1e-8)


@pytest.mark.x64
@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_radius_where_the_derivative_has_no_digit_left(dtype):
    """1 - tanh^2 of a saturated unit is rounding, which its large weight magnifies."""
    w = np.linspace(5, 25, 2001).astype(dtype)[:, None]
    fn = lambda z, w: jnp.tanh(w * z + 0.125)
    z = jnp.ones_like(w)
    low, high = deqjax.certify(fn, z, jnp.asarray(w), batched=True).spectral_radius
    wide = w[:, 0].astype(np.longdouble)
    u = wide + 0.125  # z* = 1 - 1e-4 or nearer to 1
    for _ in range(20):
        u = wide * np.tanh(u) + 0.125
    rho = wide / np.cosh(u) ** 2
    assert np.all(np.asarray(low) <= rho) and np.all(rho <= np.asarray(high))


def test_what_has_no_fixed_point_is_not_enclosed():
    w = jnp.full((3, 3), 0.4)  # spectral radius 1.2
    f = lambda z, x: jax.nn.relu(w @ z + x)
    for z in (jnp.zeros(3), jnp.full(3, 100.0)):
        c = deqjax.certify(f, z, jnp.ones(3))
        assert not c.holds and np.all(np.isinf(c.upper)) and np.isinf(c.relative_error)
    assert deqjax.certify(lambda z, x: f(z, x) / 2, jnp.zeros(3), jnp.ones(3)).holds


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1.0])
def test_bad_points_of_one_problem(bad):
    p = concave("sigmoid", 1.0, 0.1)
    z = jnp.asarray(p.solution, jnp.float32)
    good = deqjax.certify(p.fn, z, p.args, batched=True)
    c = deqjax.certify(p.fn, z.at[1, 3].set(bad), p.args, batched=True)
    check(c, z, p.solution, holds=False)
    for new, old in zip(jax.tree.leaves(c), jax.tree.leaves(good), strict=True):
        np.testing.assert_array_equal(np.delete(new, 1, 0), np.delete(old, 1, 0))
    if bad == -1:
        assert c.relative_error[1] > 1
    else:
        assert np.isinf(c.relative_error[1])


def test_half_precision_promises_nothing():
    p = concave("tanh", 1.0, 0.1, n=300, dtype=jnp.bfloat16)
    z = jnp.asarray(p.solution, jnp.bfloat16)
    c = deqjax.certify(p.fn, z, p.args, batched=True)
    assert not np.any(c.holds) and np.all(np.isinf(c.relative_error))
    check(c, z.astype(jnp.float32), p.solution, holds=False)


@pytest.mark.optimised
def test_batch_mates_do_not_matter():
    easy, hard = concave("tanh", 1.0, 1.0, batch=6), concave("tanh", 1.0, 1e-4, batch=6)
    w = easy.args[0]
    run = lambda z, x: deqjax.certify(easy.fn, z, (w, x), batched=True)
    z = 1.001 * jnp.asarray(easy.solution, jnp.float32)
    mixed_z = z.at[1:].set(jnp.asarray(hard.solution[1:], jnp.float32))
    one, two = run(z, easy.args[1]), run(mixed_z, easy.args[1].at[1:].set(hard.args[1][1:]))
    assert two.steps[0] < np.max(two.steps)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_transformations():
    p = concave("relu6", 1.0, 0.3)
    w, x = p.args
    z = jnp.asarray(p.solution, jnp.float32) * 1.0001
    whole = deqjax.certify(p.fn, z, p.args, batched=True)
    same = lambda c: jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), c, whole
    )
    one = lambda z, x: deqjax.certify(p.one, z, (w, x))
    same(jax.vmap(one)(z, x))
    same(jax.jit(jax.vmap(one))(z, x))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda z, x: deqjax.certify(p.fn, z, (w, x), batched=True),
        mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"),
    )  # fmt: skip
    same(jax.jit(sharded)(z, x))
    total = lambda z: jnp.sum(deqjax.certify(p.fn, z, p.args, batched=True).relative_error)
    assert not np.any(jax.grad(total)(z))


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (lambda z, x: jnp.sqrt(0.1 * z + x), 1e-40),
        (lambda z, x: jnp.sum(jnp.full(1000, 1e-39) * z) + x, 2e-38),
        (lambda z, x: (z + 1e20) / jnp.sqrt(1 + jnp.square(z + 1e20)) * x, 1.0),
    ],
)
def test_what_leaves_the_range_of_the_dtype_is_not_proved(f, x):
    for z in (0.0, 1.0):
        c = deqjax.certify(f, jnp.asarray(z), jnp.asarray(x))
        assert np.isinf(c.relative_error)


def test_a_logarithm_of_one_plus_is_not_trusted():
    """log(1 + u) of a small u has lost its digits before it is counted."""
    w = jnp.full((3, 3), 0.1)
    with pytest.raises(ValueError, match="'log', which is none whose rounding is known"):
        deqjax.certify(lambda z, x: jnp.log(1 + w @ z + x), jnp.ones(3), jnp.full(3, 1e-5))
    c = deqjax.certify(lambda z, x: jnp.log1p(w @ z + x), jnp.ones(3), jnp.full(3, 1e-5))
    assert np.all(c.lower > 0)


def test_structural_mistakes_raise():
    f = lambda z, _: jnp.tanh(z + 1)
    with pytest.raises(ValueError, match="floating-point"):
        deqjax.certify(f, jnp.ones(3, bool))
    with pytest.raises(ValueError, match="structure, shapes and dtypes"):
        deqjax.certify(lambda z, _: z[:2], jnp.ones(3))
    with pytest.raises(ValueError, match="batch of the same length"):
        deqjax.certify(f, (jnp.ones(3), jnp.ones(2)), batched=True)
    with pytest.raises(ValueError, match="'sub', which may cancel"):
        deqjax.certify(lambda z, _: jnp.tanh(z - 0.5), jnp.ones(3))

"""A negative number in an array is never taken for nonnegative, however it came in."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from jax import lax
from registry import CERTIFIED

import deqjax
from deqjax._bilinear import dense
from deqjax._problem import convert
from deqjax.nn._convolution import conv2d
from deqjax.positive._rounding import rounding

SUCCESS = deqjax.RESULTS.successful
SOLVERS = list(CERTIFIED.values())
root = lambda z: jnp.sqrt(1 + z)


@jax.custom_jvp
def ruled(u, m):
    return root(u) + m


ruled.defjvp(lambda p, t: (ruled(*p), t[0] / (2 * root(p[0])) + t[1]))


def scan_of_rows(z, m):
    return lax.scan(lambda c, m: (c + m, None), root(z), jnp.stack([m, m]))[0]


def scan_of_results(z, m):
    return lax.scan(lambda c, m: (c, m + c), root(z), jnp.stack([m, m]))[1][1]


def scan_that_carries(z, m):
    """Carries that do not depend on z at first, or at all."""
    step = lambda c, _: ((root(c[0]) + c[1], c[2], c[2] * c[2], c[0]), None)
    return lax.scan(step, (z, m, m, jnp.zeros_like(m)), length=2)[0][0]


convolve = lambda z, w: lax.conv_general_dilated(z[None, None], w, (1,), "SAME")[0, 0]
taps = lambda m: jnp.broadcast_to(m[0], (1, 1, 3))
two = lambda m: jnp.stack([jnp.ones_like(m), m])
# f(z, m), whose rounding can be counted for an array m > 0, and not for m < 0.
DISGUISES = {
    "sum": lambda z, m: root(z) + m,
    "factor": lambda z, m: m * z,
    "divisor": lambda z, m: z / m,
    "dividend": lambda z, m: m / root(z),
    "product": lambda z, m: jnp.stack([z, z]).T @ two(m)[:, 0],
    "dense": lambda z, m: dense(jnp.stack([z, z]).T, two(m)[:, :1])[:, 0],
    "convolution": lambda z, m: lax.conv_general_dilated(z[None, None], taps(m), (1,), "SAME")[
        0, 0
    ],
    "layer": lambda z, m: conv2d(z.reshape(1, 2, 2, 1), jnp.full((3, 3, 1, 1), m[0]), 1).ravel(),
    "minimum": lambda z, m: jnp.minimum(z, m),
    "clip": lambda z, m: jnp.clip(z, 0 * m, m),
    "lax clamp": lambda z, m: lax.clamp(m, m, z),
    "concatenate": lambda z, m: jnp.sum(jnp.stack([root(z), m]), 0),
    "pad": lambda z, m: jnp.pad(z[1:], (1, 0), constant_values=jnp.min(m)),
    "update": lambda z, m: lax.dynamic_update_slice(m, z[:2], (0,)),
    "selection by data": lambda z, m: z * jnp.where(m > 0, 1.0, -1.0),
    "selection by z": lambda z, m: jnp.where(z > 1, z, m),
    "selected row": lambda z, m: z * jnp.stack([jnp.abs(m), m])[1],
    "gathered": lambda z, m: z + jnp.asarray(m)[jnp.array([3, 2, 1, 0])],
    "masked": lambda z, m: root(z) + m * (z >= 0).astype(z.dtype),
    "made in f": lambda z, m: z + jnp.full(4, -1.0) * -m,
    "jit": lambda z, m: jax.jit(lambda z, m: root(z) + m)(z, m),
    "checkpoint": jax.checkpoint(lambda z, m: root(z) + m),
    "vmap": lambda z, m: jax.vmap(lambda z, m: root(z) + m)(z, m),
    "custom_jvp": ruled,
    "scan of rows": scan_of_rows,
    "scan of results": scan_of_results,
    "scan that carries": scan_that_carries,
    "fori_loop": lambda z, m: lax.fori_loop(0, 3, lambda i, c: c + two(m)[i % 2], z),
    "cond by z": lambda z, m: lax.cond(z[0] > 1, lambda z: z + m, lambda z: z, z),
    "cond by data": lambda z, m: lax.cond(m[0] > 1, lambda z: z, lambda z: z + m, z),
    "softplus": lambda z, m: jax.nn.softplus(z * m),
}


def counted(f, z, args=None, rank=0, fan_in=None):
    """The bound of the rounding of f."""

    @jax.jit
    @jax.default_matmul_precision("highest")
    def run(z, args):
        return rounding(convert(f, z, args)[0], z, args, fan_in, "certify", rank=rank)

    return run(z, args)


@pytest.mark.parametrize("name", DISGUISES)
def test_an_array_is_looked_at_however_it_came_in(name):
    f, z = DISGUISES[name], jnp.ones(4)
    m = jnp.array([[1.0] * 4, [-1.0] * 4, [0.5, 0.5, 0.5, -1e-30], [2.0] * 4])
    if name in ("product", "dense", "convolution", "layer", "pad", "fori_loop", "update"):
        m = m[:, ::-1]  # they see the first entries
    slack = jax.vmap(lambda m: counted(f, z, m))(m)
    np.testing.assert_array_equal(jnp.isinf(slack), [False, True, True, False])
    assert np.all(slack[::3] < 1e-4)
    # Closed over, as an array and as a constant of NumPy.
    for bad in (m[1], np.asarray(m[1])):
        assert np.isinf(counted(lambda z, _, bad=bad: f(z, bad), z))


def test_what_is_written_into_f_may_be_negative():
    """And what cannot be selected is not looked at."""
    w = jnp.ones((4, 4))
    for act in (
        jax.nn.hard_tanh,
        jax.nn.leaky_relu,
        jax.nn.hard_sigmoid,
        lambda u: -jnp.expm1(-u),
        lambda u: jnp.clip(u, -1, 1),
        lambda u: jnp.maximum(u, -jnp.ones(4)),
        lambda u: u * jnp.where(w[0] > 0, 1.0, -1.0),
        lambda u: jax.jit(lambda u: -1 * (-2 * u))(u),
        lambda u: lax.cond(w[0, 0] < 0, lambda u: -jnp.ones(4) * u, lambda u: u, u),
    ):
        assert 0 < counted(lambda z, w, act=act: act(w @ z + 1), jnp.ones(4), w) < 1e-4
    for f in (
        lambda z, _: jnp.minimum(z, -3.0) + 5 * z,
        lambda z, _: jnp.sum(jnp.concatenate([z, -z])) + z,
        lambda z, _: lax.pad(z[1:], jnp.float32(-1), [(1, 0, 0)]),
        lambda z, _: lax.cond(z[0] > 1, lambda z: z, lambda z: -z, z) + z,
        lambda z, _: lax.scan(lambda c, _: (-c, None), z, length=2)[0],
    ):
        with pytest.raises(ValueError, match="opposite signs may cancel"):
            counted(f, jnp.ones(4))


def test_a_given_fan_in_is_no_word_about_arrays():
    f = lambda z, x: 1 - jnp.exp(-(z / 2 + x))
    for x, fine in ((1.0, True), (-1.0, False)):
        assert np.isfinite(counted(f, jnp.ones(4), jnp.full(4, x), fan_in=2)) == fine
    w = jnp.full((3, 3), 0.2)
    f = lambda z, x: jnp.tanh(w @ z + x)
    for x, fine in ((0.1, True), (-0.1, False)):
        x = jnp.array([0.5, 0.5, x])
        for solver in (m(**k) for m in SOLVERS for k in ({"fan_in": 3}, {"slack": 1e-6})):
            sol = optimistix.fixed_point(f, solver, jnp.zeros(3), x, max_steps=99, throw=False)
            assert (sol.result == optimistix.RESULTS.successful) == fine


def test_the_case_it_came_from():
    """min(z / 2 + x, 6) by way of 6 - relu(6 - u): its rounding is 6 / x times what is counted."""
    f = lambda z, a: a[0] + a[1] * jax.nn.relu(a[0] + a[1] * (z / 2 + a[2]))
    x = jnp.array([[1e-4], [3e-3], [1e-2]])
    z = jnp.full_like(x, 1.0)
    one = lambda z, x, m: deqjax.certify(f, z, (jnp.float32(6), m, x))
    c = jax.vmap(one, (0, 0, None))(z, x, jnp.float32(-1))
    assert not np.any(c.holds) and np.all(np.isinf(c.relative_error)) and not np.any(c.lower)
    assert np.all(np.isinf(c.upper)) and np.all(np.isinf(c.spectral_radius[1]))
    # 6 + relu(6 + u) has no such sum, and is certified.
    above = 24 + 2 * np.asarray(x, np.float64)
    c = jax.vmap(one, (0, 0, None))(jnp.asarray(above, jnp.float32), x, jnp.float32(1))
    assert np.all(c.holds) and np.all(c.lower <= above) and np.all(above <= c.upper)
    assert np.all(c.relative_error < 1e-5)
    for method in SOLVERS:
        for m, truth in ((-1.0, 2 * x), (1.0, above)):
            args = (jnp.full_like(x, 6), jnp.full_like(x, m), x)
            solve = lambda a, s=method(): deqjax.fixed_point(f, s, jnp.ones(1), a)
            sol = jax.vmap(solve)(args)
            assert np.all((sol.result == SUCCESS) == (m > 0))
            assert np.all(sol.stats["rounding_limited"] == (m < 0))
            assert np.all(np.isinf(sol.stats["relative_error"]) == (m < 0))
            # No proof, but still a solution, as far as rounding lets it be one.
            np.testing.assert_allclose(sol.value, truth, rtol=0.02)
            assert np.all(sol.stats["num_steps"] < 40)


W = jnp.full((3, 3), 0.2)


def by_rows(z, x):
    return jnp.tanh(z @ W + x)


def by_vmap(z, x):
    return jax.vmap(lambda z, x: jnp.tanh(W @ z + x))(z, x)


def by_scan(z, x):
    return lax.scan(lambda c, x: (jnp.tanh(c @ W + x), None), z, jnp.stack([x, x]))[0]


def by_convolution(z, x):
    return jax.vmap(lambda z, x: jnp.tanh(convolve(z, W[:1, None]) + x))(z, x)


def by_parts(z, x):
    u = jnp.concatenate([z[:, 1:], z[:, :1]], 1).reshape(-1, 1, 3)[:, 0]
    u = jnp.sum(u[:, [2, 1]], 1, keepdims=True).T
    return jnp.tanh(0.1 * (u + x.T).T)


@pytest.mark.parametrize("f", [by_rows, by_vmap, by_scan, by_convolution, by_parts])
def test_the_array_of_one_problem_counts_for_that_one(f):
    x = jnp.full((4, 3), 0.5).at[2, 1].set(-0.1)
    np.testing.assert_array_equal(
        np.isinf(counted(f, jnp.ones((4, 3)), x, rank=1)), [False, False, True, False]
    )
    # A shared entry counts for every problem, and so does one that cannot be followed.
    shared = counted(lambda z, x: f(z, x) + x[2:3], jnp.ones((4, 3)), x, rank=1)
    turned = counted(lambda z, x: f(z[::-1], x)[::-1], jnp.ones((4, 3)), x[::-1], rank=1)
    assert np.all(np.isinf(shared)) and np.all(np.isinf(turned))


@pytest.mark.optimised
def test_batch_mates_of_a_negative_array():
    good = jnp.full((4, 3), 0.5)
    bad = good.at[2, 1].set(-0.1)
    z = jnp.full((4, 3), 0.8)
    runs = [lambda x: deqjax.certify(by_rows, z, x, batched=True)._asdict()]
    for method in SOLVERS:
        solver = method(upper=1.0)
        run = lambda x, s=solver: deqjax.fixed_point(by_rows, s, 0 * z, x, batched=True).stats
        runs.append(run)
    for run in runs:
        one, two = run(good), run(bad)
        for key in ("relative_error", "lower", "upper"):
            a, b = np.asarray(one[key]), np.asarray(two[key])
            np.testing.assert_array_equal(np.delete(a, 2, 0), np.delete(b, 2, 0))
        np.testing.assert_array_equal(np.isinf(two["relative_error"]), [0, 0, 1, 0])


def test_a_loop_in_f():
    """Three times z <- sqrt(z + a) has the fixed point of one, (1 + sqrt(5)) / 2 for a = 1."""
    f = lambda z, a: lax.fori_loop(0, 3, lambda i, z: jnp.sqrt(z + a[i]), z)
    truth = (1 + np.sqrt(5)) / 2
    for a in (jnp.ones(3), jnp.array([1.0, -1e-8, 1.0])):
        good = a[1] > 0
        results = [deqjax.certify(f, jnp.float32(truth), a)._asdict()]
        assert results[0]["holds"] == good
        for method in SOLVERS:
            sol = deqjax.fixed_point(f, method(rtol=1e-5), jnp.zeros(()), a)
            assert (sol.result == SUCCESS) == good
            results.append(sol.stats)
        for r in results:
            assert np.isinf(r["relative_error"]) != good
            assert not good or r["lower"] <= truth <= r["upper"] <= truth * (1 + 2e-5)

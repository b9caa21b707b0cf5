"""The Jacobian's norm and spectral radius, against closed forms and float64 eigenvalues."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from problems import matrix, pytree

import deqjax

SIZE = 6
KEY = jax.random.key(7)
linear = lambda z, a: a @ z
linears = lambda z, a: jnp.einsum("bij,bj->bi", a, z)


def rotation(radius, angle):
    c, s = radius * np.cos(angle), radius * np.sin(angle)
    return np.array([[c, -s], [s, c]])


def similar(blocks, seed=0):
    """A non-normal matrix with the eigenvalues of `blocks`; condition number of the basis: 10."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in range(2))
    basis = left @ np.diag(np.geomspace(1, 10, SIZE)) @ right
    diagonal = np.zeros((SIZE, SIZE))
    i = 0
    for block in map(np.atleast_2d, blocks):
        diagonal[i : i + len(block), i : i + len(block)] = block
        i += len(block)
    return basis @ diagonal @ np.linalg.inv(basis)


REST = [0.4, -0.3, 0.2, 0.1]
JACOBIANS = {
    "real": similar([0.9, 0.5, *REST]),
    "negative": similar([-0.9, 0.5, *REST]),
    "opposite signs": similar([0.9, -0.9, *REST]),
    "complex pair": similar([rotation(0.9, 1.1), *REST]),
    "imaginary pair": similar([rotation(0.9, np.pi / 2), *REST]),
    "two close ones": similar([0.9, 0.88, *REST]),
    "above one": similar([3.0, 0.5, *REST]),
    "tiny": 1e-30 * similar([rotation(0.9, 1.1), *REST]),
    "huge": 1e30 * similar([rotation(0.9, 1.1), *REST]),
    "zero": np.zeros((SIZE, SIZE)),
    "nilpotent": np.eye(SIZE, k=1),
}


# The squared Frobenius norm


def test_frobenius_is_unbiased_with_the_variance_of_signs():
    a = jnp.asarray(matrix(SIZE, 0.9, 0), jnp.float32)
    keys = jax.random.split(KEY, 4000)
    one = lambda key: deqjax.jacobian_frobenius(linear, jnp.zeros(SIZE), a, key=key)
    draws = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
    truth = np.sum(np.square(a, dtype=np.float64))
    gram = np.asarray(a, np.float64) @ np.asarray(a, np.float64).T
    variance = 2 * (np.sum(gram**2) - np.sum(np.diag(gram) ** 2))
    assert abs(draws.mean() - truth) < 4 * np.sqrt(variance / keys.size)
    assert abs(draws.var() / variance - 1) < 0.15
    mean = deqjax.jacobian_frobenius(linear, jnp.zeros(SIZE), a, key=KEY, samples=4000)
    assert abs(mean - truth) < 4 * np.sqrt(variance / keys.size)


@pytest.mark.x64
def test_frobenius_and_its_gradients_of_a_diagonal_jacobian(getkey):
    """One sample is exact there: sum of w^2 s^2 with t = tanh(w z + x), s = 1 - t^2."""
    w, x, z = (jax.random.normal(getkey(), (SIZE,)) for _ in range(3))

    class Cell(eqx.Module):
        weight: jax.Array

        def __call__(self, z, x):
            return jnp.tanh(self.weight * z + x)

    @ft.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def penalty(cell, x, z):
        return deqjax.jacobian_frobenius(cell, z, x, key=KEY)

    value, (d_cell, d_x, d_z) = jax.jit(penalty)(Cell(w), x, z)
    t = np.tanh(w * z + x)
    s = 1 - t**2
    chain = -4 * w**2 * s**2 * t
    np.testing.assert_allclose(value, np.sum(w**2 * s**2), rtol=1e-12)
    np.testing.assert_allclose(d_x, chain, rtol=1e-10)
    np.testing.assert_allclose(d_z, chain * w, rtol=1e-10)
    np.testing.assert_allclose(d_cell.weight, 2 * w * s**2 + chain * z, rtol=1e-10)


def test_frobenius_of_a_batch():
    """Each problem's own, whatever its batch-mates and their number; here a NaN is one."""
    a = jnp.stack([jnp.asarray(matrix(SIZE, 0.9, i), jnp.float32) for i in range(3)])
    a = a.at[2].set(jnp.nan)
    z = jnp.zeros((3, SIZE))
    run = ft.partial(deqjax.jacobian_frobenius, linears, key=KEY, samples=2, batched=True)
    values = run(z, a)
    assert values.shape == (3,) and jnp.isnan(values[2])
    np.testing.assert_allclose(run(z[:1], a[:1]), values[:1], rtol=1e-6)
    keys = jax.random.split(KEY, 2)  # of the samples, and then of the problems
    signs = [jax.random.split(jax.random.fold_in(k, 1), 1)[0] for k in keys]
    v = jnp.stack([jax.random.rademacher(k, (SIZE,), jnp.float32) for k in signs])
    np.testing.assert_allclose(values[1], jnp.mean(jnp.sum((v @ a[1]) ** 2, 1)), rtol=1e-6)


def test_frobenius_of_a_custom_vjp_on_half_precision_pytrees():
    """VJPs alone are used, their own rule's (here one that doubles), and summed in float32."""

    @jax.custom_vjp
    def double(z):
        return z

    double.defvjp(lambda z: (z, None), lambda _, g: (2 * g,))
    fn = lambda z, _: {"a": double(z["a"]), "b": z["b"] / 2}
    z = {"a": jnp.ones(300, jnp.bfloat16), "b": jnp.ones((2, 2), jnp.float32)}
    value = deqjax.jacobian_frobenius(fn, z, key=KEY)
    assert value.dtype == jnp.float32
    assert value == 4 * 300 + 4 / 4  # bfloat16 has no 1201


# The spectral radius


@ft.cache
def radii(dtype, max_steps=50):
    a = jnp.asarray(np.stack([*JACOBIANS.values()]), dtype)
    a = jnp.concatenate([a, jnp.full((1, SIZE, SIZE), jnp.nan, dtype)])
    z = jnp.zeros((len(a), SIZE), dtype)
    got = deqjax.spectral_radius(linears, z, a, key=KEY, batched=True, max_steps=max_steps)
    exact = np.asarray(a[:-1], np.float64)
    return got, [np.max(np.abs(np.linalg.eigvals(x))) for x in exact]


@pytest.mark.parametrize("name", JACOBIANS)
def test_spectral_radius(name):
    """In one batch with all the others, a NaN among them."""
    i = [*JACOBIANS].index(name)
    (value, residual), truth = radii(jnp.float32)
    # The roots of a recurrence whose coefficients are known to eps / gap are known to eps / gap^2.
    gap = 0.02 if name == "two close ones" else 1
    np.testing.assert_allclose(value[i], truth[i], rtol=2e-6 / gap**2)
    assert residual[i] < 5e-5
    if name in ("zero", "nilpotent"):
        assert value[i] == 0 and residual[i] == 0


def test_spectral_radius_in_half_precision():
    (value, residual), truth = radii(jnp.bfloat16)
    assert value.dtype == residual.dtype == jnp.float32
    np.testing.assert_allclose(value[:-1], truth, rtol=0.03, atol=1e-33)
    assert jnp.all(residual[:-1] < 0.02)
    assert jnp.isnan(value[-1]) and jnp.isnan(residual[-1])


def test_spectral_radius_says_when_it_is_bad():
    """Four eigenvalues of one modulus have no recurrence of two terms; nor has a first guess."""
    a = similar([rotation(0.9, 1.1), rotation(0.9, 2.0), 0.2, 0.1])
    a = jnp.asarray(a, jnp.float32)
    value, residual = deqjax.spectral_radius(linear, jnp.zeros(SIZE), a, key=KEY)
    assert residual > 0.1 and jnp.isfinite(value)
    (_, early), _ = radii(jnp.float32, 2)
    (_, late), _ = radii(jnp.float32)
    assert early[0] > 0.1 > 1e4 * late[0]


def test_spectral_radius_of_one_of_a_batch_of_one_and_of_vmap():
    i = [*JACOBIANS].index("complex pair")
    (value, _), _ = radii(jnp.float32)
    a = jnp.asarray(JACOBIANS["complex pair"], jnp.float32)
    one = lambda a: deqjax.spectral_radius(linear, jnp.zeros(SIZE), a, key=KEY)
    of_one = deqjax.spectral_radius(linears, jnp.zeros((1, SIZE)), a[None], key=KEY, batched=True)
    mapped = jax.jit(jax.vmap(one))(jnp.stack([a, 2 * a]))
    for got in (one(a).value, of_one.value[0], mapped.value[0], mapped.value[1] / 2):
        np.testing.assert_allclose(got, value[i], rtol=1e-5)
    assert of_one.value.shape == (1,)


@pytest.mark.x64
def test_spectral_radius_is_the_rate_of_picard_iteration():
    """At the fixed point of a nonlinear f, its state in a pytree or not; and no gradient."""
    w, x = similar([0.9, 0.5, *REST]), np.linspace(-0.1, 0.1, SIZE)
    fn = lambda z, args: jnp.tanh(args[0] @ z + args[1])
    step = lambda z: np.tanh(w @ z + x)
    z = ft.reduce(lambda z, _: step(z), range(2000), np.zeros(SIZE))
    args = jnp.asarray(w), jnp.asarray(x)
    rate, residual = deqjax.spectral_radius(fn, jnp.asarray(z), args, key=KEY)
    errors, y = [], z + 1e-5
    for _ in range(60):
        y = step(y)
        errors.append(np.linalg.norm(y - z))
    assert residual < 1e-8
    np.testing.assert_allclose((errors[-1] / errors[-21]) ** (1 / 20), rate, rtol=1e-6)

    q = pytree(0.5, dtype=np.float64)
    value, _ = deqjax.spectral_radius(q.fn, q.z0, q.args, key=KEY, max_steps=100)
    truth = np.max(np.abs(np.linalg.eigvals(np.asarray(q.args[0]))))
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    size = lambda args: deqjax.spectral_radius(fn, jnp.asarray(z), args, key=KEY).value
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(jax.grad(size)(args)))


@pytest.mark.parametrize("closed_over", [False, True])
def test_shard_map(closed_over):
    """Constants and keys are the same on all devices, z differs: loop carries have one type."""
    w = jnp.asarray(JACOBIANS["complex pair"], jnp.float32)
    xs = jnp.linspace(0.1, 1, 8)

    def body(w, xs):
        # Each device's Jacobian is a multiple of w.
        fn = lambda z, a: z @ (xs[0] * w if closed_over else a[1][0] * a[0]).T
        where = jnp.zeros((1, SIZE)), (w, xs)
        value, residual = deqjax.spectral_radius(fn, *where, key=KEY, batched=True)
        size = deqjax.jacobian_frobenius(fn, *where, key=KEY, batched=True)
        return value, residual, size

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    value, residual, size = jax.jit(sharded)(w, xs)
    np.testing.assert_allclose(value, 0.9 * xs, rtol=1e-5)
    assert jnp.all(residual < 1e-5)
    np.testing.assert_allclose(size, size[-1] * xs**2, rtol=1e-5)
    grad = jax.jit(jax.grad(lambda w: jnp.sum(sharded(w, xs)[2])))(w)
    np.testing.assert_allclose(jnp.sum(grad * w), 2 * jnp.sum(size), rtol=1e-5)  # homogeneous


def test_bad_input_raises():
    ask = ft.partial(deqjax.jacobian_frobenius, linear, key=KEY)
    radius = ft.partial(deqjax.spectral_radius, linear, key=KEY)
    with pytest.raises(ValueError, match="samples to be an int of at least 1, got 0"):
        ask(jnp.zeros(2), jnp.eye(2), samples=0)
    with pytest.raises(ValueError, match="max_steps to be an int of at least 2, got 1"):
        radius(jnp.zeros(2), jnp.eye(2), max_steps=1)
    with pytest.raises(ValueError, match="floating-point arrays"):
        radius(jnp.zeros(2, bool), jnp.eye(2))
    with pytest.raises(ValueError, match="same length on axis 0"):
        ask((jnp.zeros((2, 1)), jnp.zeros((3, 1))), batched=True)
    with pytest.raises(ValueError, match="structure, shapes and dtypes"):
        radius(jnp.zeros(2), jnp.ones((3, 2)))

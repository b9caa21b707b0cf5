"""The monotone cell has one fixed point, and its splittings find it at the rates of the theory."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
import pytest

import deqjax
from deqjax.nn import DEQ, MonotoneLinear

SIZES = (1.0, 3.0)


def cell_of(getkey, size=1.0, n=8, margin=0.5, dtype=None):
    """A and B scaled by `size`."""
    cell = MonotoneLinear(n, margin, dtype=dtype, key=getkey())
    where = lambda c: (c.weight.a, c.weight.b)
    return eqx.tree_at(where, cell, tuple(2 * size * w for w in where(cell)))


def constants(cell):
    """m as it is, from the spectrum, and L."""
    w = paramax.unwrap(cell.weight)
    m = jnp.eye(len(w)) - w
    return float(jnp.linalg.eigvalsh((m + m.T) / 2)[0]), float(cell.lipschitz())


def exact(cell, x, steps=3000):
    """The equilibrium by a closed form on the right set of active units, in float64."""
    w = np.asarray(paramax.unwrap(cell.weight), np.float64)
    z, m = np.zeros(len(w)), np.eye(len(w)) - w
    step = cell.weight.margin / np.linalg.norm(m, 2) ** 2
    for _ in range(steps):
        z = np.maximum(z - step * (m @ z - np.asarray(x, np.float64)), 0)
    on = z > 0
    z[on] = np.linalg.solve(m[np.ix_(on, on)], np.asarray(x, np.float64)[on])
    return z


def splittings(cell):
    m, lipschitz = constants(cell)
    yield cell.forward_backward()
    yield cell.forward_backward(m / lipschitz**2)
    yield cell.peaceman_rachford()
    for step in (0.1 / lipschitz, 1 / lipschitz, 1.0, 100.0):
        yield cell.peaceman_rachford(step)


@pytest.mark.x64
@pytest.mark.parametrize("margin", [0.05, 0.5, 2.0])
def test_the_spectrum(margin, getkey):
    for size in (0.0, *SIZES):
        cell = cell_of(getkey, size, margin=margin)
        m, lipschitz = constants(cell)
        assert m >= margin - 1e-12 and (size > 0 or abs(m - margin) < 1e-12)
        w = np.asarray(paramax.unwrap(cell.weight))
        np.testing.assert_allclose(lipschitz, np.linalg.norm(np.eye(8) - w, 2), rtol=1e-12)


@pytest.mark.x64
@pytest.mark.parametrize("size", SIZES)
def test_all_find_one_fixed_point_where_picard_diverges(size, getkey):
    cell = cell_of(getkey, size)
    xs = 3 * jax.random.normal(getkey(), (4, 8))
    expected = np.stack([exact(cell, x) for x in xs])
    assert np.any(expected == 0) and np.any(expected > 0)
    solver, adjoint = deqjax.FixedPointIteration(rtol=1e-12, atol=1e-12), deqjax.ImplicitAdjoint()
    options = dict(batched=True, max_steps=2000)
    sol = deqjax.fixed_point(lambda z, x: jax.vmap(cell)(z, x), solver, 0 * xs, xs, **options)
    assert jnp.all(sol.result != deqjax.RESULTS.successful)
    np.testing.assert_allclose(jax.vmap(cell)(jnp.asarray(expected), xs), expected, atol=1e-10)
    for splitting in splittings(cell):
        for start in (0.0, 10.0):
            deq = DEQ(splitting, solver, adjoint, max_steps=100_000)
            z, sol = deq.batch(xs, jnp.full(xs.shape, start))
            assert jnp.all(sol.result == deqjax.RESULTS.successful)
            np.testing.assert_allclose(z, expected, atol=1e-7)


@pytest.mark.x64
@pytest.mark.parametrize("size", SIZES)
def test_rates(size, getkey):
    """No step contracts by less than predicted; and the prediction is not idle."""
    cell = cell_of(getkey, size)
    m, lipschitz = constants(cell)
    x, *pairs = jax.random.normal(getkey(), (101, 8))
    y, z = jnp.asarray(pairs[::2]), jnp.asarray(pairs[1::2])

    def measured(cell):
        f = jax.vmap(lambda z: paramax.unwrap(cell)(z, x))
        return float(jnp.max(jnp.linalg.norm(f(y) - f(z), axis=1) / jnp.linalg.norm(y - z, axis=1)))

    for fraction in (0.1, 1.0, 1.9):
        step = fraction * m / lipschitz**2
        factor = np.sqrt(1 - 2 * step * m + (step * lipschitz) ** 2)
        assert measured(cell.forward_backward(step)) <= factor + 1e-12 and factor < 1
    i = jnp.eye(8) - paramax.unwrap(cell.weight)
    for step in (0.1 / lipschitz, 1 / lipschitz, 10 / lipschitz):
        factor = np.sqrt(1 - 4 * step * m / (1 + step * lipschitz) ** 2)
        eye = jnp.eye(8)
        norm = float(jnp.linalg.norm((eye - step * i) @ jnp.linalg.inv(eye + step * i), 2))
        assert norm <= factor + 1e-12 and factor < 1
        assert 0.4 * norm < measured(cell.peaceman_rachford(step)) <= norm + 1e-12


@pytest.mark.x64
def test_forward_backward_needs_a_small_step():
    """A = 0, B - B^T a rotation times 10: m = 0.5 and L^2 = 100.25; all units active."""
    cell = MonotoneLinear(2, 0.5, key=jax.random.key(0))
    where = lambda c: (c.weight.a, c.weight.b)
    cell = eqx.tree_at(where, cell, (jnp.zeros((2, 2)), jnp.asarray([[0.0, 10.0], [0.0, 0.0]])))
    m, lipschitz = constants(cell)
    np.testing.assert_allclose((m, lipschitz**2), (0.5, 100.25))
    x = (jnp.eye(2) - paramax.unwrap(cell.weight)) @ jnp.full(2, 3.0)
    for fraction in (0.5, 1.9, 2.1):
        f = paramax.unwrap(cell.forward_backward(fraction * m / lipschitz**2))
        factor = np.sqrt(1 - fraction * (2 - fraction) * m**2 / lipschitz**2)
        z = jnp.full(2, 3.0) + jnp.asarray([1e-3, 0.0])
        end = jax.lax.fori_loop(0, 2000, lambda _, z, f=f: f(z, x), z)
        # The bound is attained: both singular values of I - W are L.
        np.testing.assert_allclose(jnp.linalg.norm(end - 3) / 1e-3, factor**2000, rtol=1e-6)
        assert (factor < 1) == (fraction < 2)


@pytest.mark.x64
def test_gradients_are_those_of_the_closed_form(getkey):
    """dz = D (I - W D)^-1 ... with D the active units: v = (I - D W)^-T D g, dW = v z^T, dx = v."""
    cell = cell_of(getkey, 1.0)
    xs, g = jax.random.normal(getkey(), (2, 3, 8))

    def reference(weight, x, g):
        w = paramax.unwrap(weight)
        z = jnp.asarray(exact(cell, x))
        on = jnp.where(z > 0, 1.0, 0.0)
        v = jnp.linalg.solve((jnp.eye(8) - on[:, None] * w).T, g) * on
        _, vjp = jax.vjp(paramax.unwrap, weight)
        return vjp(jnp.outer(v, z))[0], v

    each = [reference(cell.weight, x, g) for x, g in zip(xs, g, strict=True)]
    weight = jax.tree.map(lambda *w: sum(w), *(w for w, _ in each))
    solver = deqjax.FixedPointIteration(rtol=1e-13, atol=1e-13)
    for splitting in splittings(cell):

        @eqx.filter_grad
        def gradient(deq_x):
            deq, xs = deq_x
            return jnp.sum(g * deq.batch(xs)[0])

        deq = DEQ(splitting, solver, deqjax.ImplicitAdjoint(), max_steps=20_000)
        deq, dx = gradient((deq, xs))
        got = deq.cell.weight
        for a, b in ((got.a, weight.a), (got.b, weight.b), (dx, jnp.stack([v for _, v in each]))):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [deqjax.Anderson(rtol=1e-5), deqjax.Broyden(rtol=1e-5)])
def test_any_solver_in_float32(solver, getkey):
    cell = cell_of(getkey, 2.0)
    x = jax.random.normal(getkey(), (8,))
    expected = exact(cell, x)
    for splitting in list(splittings(cell))[2:-1]:
        z, sol = DEQ(splitting, solver, deqjax.ImplicitAdjoint(), max_steps=500)(x)
        assert sol.result == deqjax.RESULTS.successful
        np.testing.assert_allclose(z, expected, atol=2e-3)
        # Through the front door the readout is the caller's.
        sol = deqjax.fixed_point(paramax.unwrap(splitting), solver, 0 * x, x, max_steps=500)
        np.testing.assert_allclose(splitting.readout(sol.value), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "step", "name"),
    [
        (MonotoneLinear.peaceman_rachford, 1.0, "lu"),
        (MonotoneLinear.peaceman_rachford, None, "svd"),
        (MonotoneLinear.forward_backward, None, "svd"),
    ],
)
def test_the_matrix_is_made_once_a_solve(getkey, make, step, name):
    """One factorisation in the whole program, and it stands outside every loop."""
    deq = DEQ(
        make(MonotoneLinear(4, key=getkey()), step),
        deqjax.FixedPointIteration(),
        deqjax.ImplicitAdjoint(),
    )
    jaxpr = jax.make_jaxpr(lambda x: deq.batch(x)[0])(jnp.ones((2, 4)))

    def count(jaxpr, inside):
        n = np.zeros(2, int)
        for eqn in jaxpr.eqns:
            n[inside] += eqn.primitive.name == name
            loop = inside or eqn.primitive.name in ("while", "scan")
            is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(sub):
                    n += count(sub if hasattr(sub, "eqns") else sub.jaxpr, int(loop))
        return n

    assert count(jaxpr.jaxpr, 0).tolist() == [1, 0]


def test_dtypes(getkey):
    cell = MonotoneLinear(4, dtype=jnp.bfloat16, key=getkey())
    x = jnp.linspace(-1, 1, 4, dtype=jnp.bfloat16)
    number = np.float64(0.1)
    for f in (cell, MonotoneLinear(4, number, dtype=jnp.bfloat16, key=getkey())):
        assert f(x, x).dtype == jnp.bfloat16
        for step in (None, 0.1, number):
            for make in (f.forward_backward, f.peaceman_rachford):
                assert make(step)(x, x).dtype == jnp.bfloat16
    assert cell.lipschitz().dtype == jnp.float32

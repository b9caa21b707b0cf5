"""The implicit function theorem: orders, failure, observability."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from problems import affine, relative_error, tanh

import deqjax
from deqjax import RESULTS

PICARD = deqjax.FixedPointIteration(rtol=1e-12, atol=1e-12)
SERIES = deqjax.FixedPointIteration(rtol=1e-6, atol=1e-6)  # as a linear solver: nothing else


def value(fn, z0, args, adjoint=deqjax.ImplicitAdjoint(), max_steps=1000, **kwargs):
    options = dict(max_steps=max_steps, adjoint=adjoint) | kwargs
    return deqjax.fixed_point(fn, PICARD, z0, args, **options).value


@pytest.mark.x64
@pytest.mark.parametrize("linear", [None, lineax.GMRES(1e-12, 1e-12)], ids=["series", "gmres"])
def test_forward_mode_and_second_derivatives(linear):
    """z = x / (1 - c z) has z = (1 - sqrt(1 - 4 c x)) / (2 c), with every derivative known."""
    fn = lambda z, a: a[0] / (1 - a[1] * z)
    adjoint = deqjax.ImplicitAdjoint(linear)
    solved = lambda x, c: value(fn, jnp.zeros(()), (x, c), adjoint)
    closed = lambda x, c: (1 - jnp.sqrt(1 - 4 * c * x)) / (2 * c)
    at = jnp.asarray(0.4), jnp.asarray(0.5)
    both = (0, 1)
    orders = [
        lambda f: f,
        lambda f: jax.grad(f, both),
        lambda f: jax.jacfwd(f, both),
        lambda f: jax.jacfwd(jax.grad(f, both), both),
        lambda f: jax.jacrev(jax.grad(f, both), both),
        lambda f: jax.jacrev(jax.jacfwd(f, both), both),
    ]
    for order in orders:
        np.testing.assert_allclose(
            jax.tree.leaves(jax.jit(order(solved))(*at)),
            jax.tree.leaves(order(closed)(*at)),
            rtol=1e-9,
        )


@pytest.mark.x64
def test_initial_iterate_and_solver_have_no_gradient():
    p = tanh(4, 0.5, dtype=np.float64)
    loss = lambda z0, damp: jnp.sum(
        deqjax.fixed_point(
            p.fn, deqjax.FixedPointIteration(1e-9, 1e-9, damp=damp), z0, p.args
        ).value
    )
    g_z0, g_damp = jax.grad(loss, (0, 1))(jnp.ones(4), jnp.asarray(0.1))
    assert not jnp.any(g_z0)
    assert g_damp == 0


@pytest.mark.x64
def test_initial_iterate_that_depends_on_parameters():
    p = tanh(4, 0.5, dtype=np.float64)
    direct = jax.grad(lambda x: jnp.sum(value(p.fn, jnp.zeros(4), (p.args[0], x))))
    warm = jax.grad(lambda x: jnp.sum(value(p.fn, jnp.tanh(x), (p.args[0], x))))
    np.testing.assert_allclose(warm(p.args[1]), direct(p.args[1]), rtol=1e-9)


@pytest.mark.x64
def test_closed_over_some_leaves_and_aux():
    p = affine(6, 0.5, dtype=np.float64)
    a, b = p.args

    def loss(a, b):
        fn = lambda z, _: (
            {"u": (a @ join(z) + b)[:2], "v": (a @ join(z) + b)[2:]},
            jnp.sum(b) * z["u"],
        )
        join = lambda t: jnp.concatenate([t["u"], t["v"]])
        z0 = {"u": jnp.zeros(2), "v": jnp.zeros(4)}
        sol = deqjax.fixed_point(fn, PICARD, z0, has_aux=True, max_steps=1000)
        return jnp.sum(sol.value["v"]) + jnp.sum(sol.aux)

    def closed(a, b):
        z = jnp.linalg.solve(jnp.eye(6) - a, b)
        return jnp.sum(z[2:]) + jnp.sum(b) * jnp.sum(z[:2])

    assert relative_error(jax.grad(loss, (0, 1))(a, b), jax.grad(closed, (0, 1))(a, b)) < 1e-9


@pytest.mark.optimised
@pytest.mark.x64
@pytest.mark.parametrize(
    "linear, last",
    [(None, True), (SERIES, False), (deqjax.Broyden(1e-12, 1e-12), True)],
    ids=["default", "series", "broyden"],
)
def test_batched_solve_stops_per_problem(linear, last):
    """Values and steps do not depend on batch-mates, bit for bit; memory mates stay finite."""
    rates = jnp.asarray([0.1, 0.5, 0.9, 1.5])
    fn = lambda z, rate: rate * z + 1
    z = 1 / (1 - rates)
    run = lambda z, rates: deqjax.implicit_vjp(
        fn,
        z,
        rates,
        jnp.ones_like(z),
        batched=True,
        max_steps=500,
        adjoint=deqjax.ImplicitAdjoint(linear, tol=1e-12),
    )
    (_, d_rates), stats = run(z, rates)
    good = stats["result"] == RESULTS.successful
    assert list(good) == [True, True, True, last]
    n = 3 + last
    np.testing.assert_allclose(d_rates[:n], (z / (1 - rates))[:n], rtol=1e-10)
    assert last or jnp.isnan(d_rates[3])
    for i in range(3):
        (_, alone), one = run(z[i : i + 1], rates[i : i + 1])
        assert alone[0] == d_rates[i]
        assert one["num_steps"][0] == stats["num_steps"][i]


@pytest.mark.parametrize("max_steps", [3, 100])
def test_failure_is_nan_kept_or_raised(max_steps):
    """rho = 0.99 leaves 0.37 of the slow mode after 100 terms: never a wrong number in silence."""
    fn = lambda z, b: 0.99 * z + b
    z, b = jnp.asarray([100.0]), jnp.asarray([1.0])
    run = lambda how: deqjax.implicit_vjp(
        fn,
        z,
        b,
        jnp.ones(1),
        adjoint=deqjax.ImplicitAdjoint(SERIES, on_failure=how),
        max_steps=max_steps,
    )
    (_, nan), stats = run("nan")
    assert jnp.isnan(nan[0])
    assert stats["result"] == RESULTS.nonlinear_max_steps_reached
    assert stats["num_steps"] == max_steps
    (_, kept), stats = run("keep")
    partial = lambda terms: (1 - 0.99**terms) / (1 - 0.99)
    np.testing.assert_allclose(kept[0], partial(max_steps + 1), rtol=1e-4)
    residual = 0.99 ** (max_steps + 1) / partial(max_steps + 2)
    np.testing.assert_allclose(stats["residual"], residual, rtol=1e-3)
    with pytest.raises(eqx.EquinoxRuntimeError, match="linear solve"):
        jax.block_until_ready(run("raise"))


def test_failure_poisons_the_gradient():
    series = deqjax.ImplicitAdjoint(SERIES)
    grad = jax.grad(lambda b: value(lambda z, b: 1.1 * z + b, -10.0, b, series, max_steps=50))
    assert jnp.isnan(grad(1.0))
    singular = deqjax.ImplicitAdjoint(lineax.GMRES(1e-6, 1e-6))
    grad = jax.grad(lambda b: jnp.sum(value(lambda z, b: z + 0 * b, jnp.ones(2), b, singular)))
    assert jnp.all(jnp.isnan(grad(jnp.ones(2))))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nonfinite_cotangent_gives_no_number(bad):
    fn = lambda z, b: 0.5 * z[::-1] + b
    z = jnp.asarray([2.0, 2.0])
    (_, d), stats = deqjax.implicit_vjp(fn, z, jnp.ones(2), jnp.asarray([bad, 1.0]))
    assert stats["result"] != RESULTS.successful
    assert jnp.all(jnp.isnan(d))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_any_size_of_cotangent(scale):
    fn = lambda z, b: 0.5 * z + b
    (_, d), stats = deqjax.implicit_vjp(fn, jnp.asarray(2.0), jnp.asarray(1.0), jnp.float32(scale))
    np.testing.assert_allclose(d, 2 * scale, rtol=1e-5)
    assert stats["result"] == RESULTS.successful


def test_implicit_vjp_is_the_backward_pass():
    """The numbers that jax.grad gives, of a module, of closed-over arrays and of args."""
    mlp = eqx.nn.Linear(4, 4, key=jax.random.key(0))
    mlp = eqx.tree_at(lambda m: m.weight, mlp, 0.5 * mlp.weight)
    x, g = jnp.linspace(-1, 1, 4), jnp.arange(4.0)
    picard = deqjax.FixedPointIteration(rtol=1e-7, atol=1e-7)

    class Cell(eqx.Module):
        mlp: eqx.nn.Linear

        def __call__(self, z, x):
            return jnp.tanh(self.mlp(z) + x)

    cell = Cell(mlp)
    z = deqjax.fixed_point(cell, picard, x, x).value
    loss = lambda cell, x: jnp.sum(deqjax.fixed_point(cell, picard, jnp.zeros(4), x).value * g)
    d_cell, d_x = eqx.filter_grad(lambda both: loss(*both))((cell, x))
    (v_cell, v_x), stats = deqjax.implicit_vjp(cell, z, x, g)
    assert relative_error((v_cell, v_x), (d_cell, d_x)) < 1e-5
    assert stats["result"] == RESULTS.successful
    (v_list, none), _ = deqjax.implicit_vjp(lambda z, _: cell(z, x), z, None, g)
    assert none is None
    expected = {a.shape: a for a in jax.tree.leaves((d_cell, d_x))}
    assert len(v_list) == 3
    assert (
        sum(
            relative_error(v, w) < 1e-5
            for v in v_list
            for w in expected.values()
            if v.shape == w.shape
        )
        >= 2
    )


def test_implicit_vjp_refuses_both_kinds_of_arrays():
    class Both(eqx.Module):
        a: jax.Array

        def __call__(self, z, x):
            return self.a * z + hidden

    hidden = jnp.ones(2)
    with pytest.raises(ValueError, match="either holds its arrays"):
        deqjax.implicit_vjp(Both(jnp.asarray(0.5)), jnp.ones(2), None, jnp.ones(2))


def test_bfloat16_trains():
    """Products in bfloat16 are no better than its eps; the sum is still found, not refused."""
    p = tanh(64, 0.9, dtype=jnp.bfloat16)
    solver = deqjax.FixedPointIteration(rtol=2e-2, atol=2e-2)

    def loss(args):
        z = deqjax.fixed_point(p.fn, solver, p.z0, args).value
        return jnp.sum(z * p.cotangent)

    error = relative_error(jax.grad(loss)(p.args), p.gradient)
    assert error < 5e-2 / (1 - p.rate)


def test_lineax_is_refused_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    adjoint = deqjax.ImplicitAdjoint(lineax.GMRES(1e-6, 1e-6))
    body = lambda x: value(lambda z, x: 0.5 * z + x, jnp.zeros(1), x, adjoint)
    sharded = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="outside jax.shard_map"):
        jax.grad(lambda x: jnp.sum(sharded(x)))(jnp.ones(8))


@pytest.mark.x64
def test_a_cell_with_its_own_vjp():
    """A cell that JAX cannot differentiate forwards still has its gradient in reverse mode."""
    p = tanh(5, 0.6, dtype=np.float64)
    act = jax.custom_vjp(jnp.tanh)
    act.defvjp(lambda u: (jnp.tanh(u), u), lambda u, g: (g * (1 - jnp.tanh(u) ** 2),))
    fn = lambda z, a: act(a[0] @ z + a[1])
    loss = lambda args, fn: jnp.sum(value(fn, p.z0, args) * p.cotangent)
    assert relative_error(jax.jit(jax.grad(lambda a: loss(a, fn)))(p.args), p.gradient) < 1e-9
    xs = jnp.stack([p.args[1], -p.args[1]])

    def batched(w, xs):
        fn = lambda z, a: jax.vmap(lambda z, x: act(a[0] @ z + x))(z, a[1])
        z = value(fn, jnp.zeros((2, 5)), (w, xs), batched=True)
        return jnp.sum(z[0] * p.cotangent)

    grad = jax.grad(batched, (0, 1))(p.args[0], xs)
    assert relative_error((grad[0], grad[1][0]), p.gradient) < 1e-9


@pytest.mark.parametrize("rate, terms", [(0.999, 2500), (0.9999, 10_000)])
def test_a_small_last_term_is_no_success(rate, terms):
    """The last term is below 100 tolerances, and 8 % or 37 % of the sum are still missing."""
    fn, z = lambda z, b: rate * z + b, 1 / (1 - rate)
    alone = deqjax.ImplicitAdjoint(SERIES)
    assert jnp.isnan(jax.grad(lambda b: value(fn, z, b, alone, max_steps=terms))(1.0))
    eps = float(jnp.finfo(np.float32).eps)
    bound = 10 * 10 * eps / (1 - rate)
    assert abs(jax.grad(lambda b: value(fn, z, b))(1.0) / z - 1) < bound


def test_a_large_fast_component_hides_no_slow_one():
    d = jnp.asarray([0.0, 0.999])
    g = jnp.asarray([1.0, 1.5e-4])
    z, fn = 1 / (1 - d), lambda z, b: d * z + b
    run = lambda how: deqjax.implicit_vjp(fn, z, jnp.ones(2), g, adjoint=how)
    (_, y), stats = run(deqjax.ImplicitAdjoint(SERIES))
    assert stats["result"] != RESULTS.successful
    assert jnp.all(jnp.isnan(y))
    (_, y), stats = run(deqjax.ImplicitAdjoint())
    assert stats["result"] == RESULTS.successful
    np.testing.assert_allclose(y, [1, 0.15], rtol=1e-2)


def test_half_precision_needs_no_more_terms():
    p = tanh(64, 0.5, dtype=jnp.bfloat16)
    z = jnp.asarray(p.solution, jnp.bfloat16)
    _, stats = deqjax.implicit_vjp(p.fn, z, p.args, p.cotangent)
    assert int(stats["num_steps"]) < 20
    assert stats["result"] == RESULTS.successful


def test_implicit_vjp_refuses():
    z = jnp.ones(2)
    for bad in (
        dict(cotangent=jnp.ones(3)),
        dict(cotangent=None),
        dict(max_steps=0),
        dict(max_steps=2.5),
    ):
        with pytest.raises(ValueError, match="implicit_vjp expects"):
            deqjax.implicit_vjp(lambda z, _: z / 2, z, None, **(dict(cotangent=z) | bad))

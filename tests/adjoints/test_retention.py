"""A relaxation per channel: reversed bit for bit, differentiated through its rounding."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import paramax
import pytest
from jax.sharding import PartitionSpec as P
from problems import relative_error

import deqjax
from deqjax.nn import DEQ

N, BATCH, STEPS, D = 12, 8, 24, 64
ADJOINT = deqjax.ReversibleAdjoint()


def cell(z, a):
    weight, x = a
    y = z + jnp.tanh(z @ weight + x)
    return y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)


def problem(dtype=jnp.float32, batch=(BATCH,)):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    beta = jnp.asarray(rng.uniform(0.02, 0.98, N), dtype)
    return (draw(N, N) / N**0.5, draw(*batch, N)), beta, draw(*batch, N), draw(*batch, N)


def solver(beta, tol=0.0, **options):
    return deqjax.Reversible(rtol=tol, atol=tol, beta=beta, **options)


def value(args, beta, z0, *, batched=True, max_steps=STEPS, adjoint=ADJOINT, **options):
    how = dict(batched=batched, max_steps=max_steps, adjoint=adjoint)
    return deqjax.fixed_point(cell, solver(beta, **options), z0, args, **how).value


def lattice(args, beta, z0, steps, d=D, bits=24):
    """The same steps on the same lattice, in float64, with derivatives straight through."""
    through = lambda exact, real: real + jax.lax.stop_gradient(exact - real)
    rounded = lambda x: through(jnp.round(x * 2.0**bits) / 2.0**bits, x)
    half_up = lambda x: jnp.floor(x + 0.5)
    n = jnp.clip(jnp.round(d * (1 - beta.astype(jnp.float32))), 1, d - 1).astype(jnp.float64)
    retention = through(n / d, 1 - beta)[None]

    def step(s, _):
        past, now = s
        nearest = half_up(n[None] * (jax.lax.stop_gradient(past) * 2.0**bits) / d)
        kept = through(nearest / 2.0**bits, retention * past)
        return (now, kept + rounded((1 - retention) * cell(now, args))), None

    start = rounded(z0)
    return jax.lax.scan(step, (start, start), length=steps)[0][1]


@pytest.mark.optimised
@pytest.mark.parametrize("steps", [8, 200])
def test_value_and_gradient_of_the_lattice_trajectory(steps):
    args, beta, z0, g = problem()
    run = jax.jit(lambda a, b, z: value(a, b, z, max_steps=steps))
    out, pull = jax.vjp(run, args, beta, z0)
    found = pull(g)
    _, stats = deqjax.reversible_vjp(cell, solver(beta), z0, args, g, batched=True, max_steps=steps)
    assert jnp.all(stats["reversal_residual"] == 0) and jnp.all(stats["trusted"])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (args, beta, z0, g))
        run = jax.jit(lambda a, b, z: lattice(a, b, z, steps))
        truth, pull = jax.vjp(run, *wide[:3])
        expected = pull(wide[3])
    assert relative_error(out, truth) < 1e-5
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 5e-5


@pytest.mark.x64
@pytest.mark.parametrize(
    "d, dtype", [(2, "float32"), (7, "float64"), (64, "bfloat16"), (65536, "float32")]
)
def test_any_denominator_and_dtype(d, dtype):
    args, beta, z0, g = problem(dtype)
    at = solver(beta, denominator=d)
    _, stats = deqjax.reversible_vjp(cell, at, z0, args, g, batched=True, max_steps=STEPS)
    assert jnp.all(stats["reversal_residual"] == 0)
    n = np.clip(np.round(d * (1 - np.asarray(beta, np.float32))), 1, d - 1)
    np.testing.assert_array_equal(at._lattice.n, n)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(at.relaxation, np.float64), 1 - n / d, atol=eps)


@pytest.mark.x64
@pytest.mark.parametrize("exact", [True, False])
def test_a_scalar_array_and_pytrees(exact):
    """One for each leaf, or for all below it; a scalar array is learned as well."""
    args, beta, z0, g = problem(jnp.float64)
    z0, g = ({"a": x[:, :5], "b": [x[:, 5:9], x[:, 9:]]} for x in (z0, g))

    def fn(z, a):
        new = cell(jnp.concatenate([z["a"], *z["b"]], -1), a)
        return {"a": new[:, :5], "b": [new[:, 5:9], new[:, 9:]]}

    options = dict(batched=True, max_steps=STEPS, adjoint=ADJOINT)

    def gradient(beta):
        run = lambda a, b: deqjax.fixed_point(fn, solver(b, exact=exact), z0, a, **options).value
        return jax.jit(lambda a, b: jax.vjp(run, a, b)[1](g))(args, beta)

    shared = jnp.asarray(0.75)
    d_args, d_shared = gradient(shared)
    again, d_whole = gradient({"a": shared, "b": shared})
    assert relative_error(again, d_args) < 1e-12
    assert relative_error(d_whole["a"] + d_whole["b"], d_shared) < 1e-9
    _, d_leaves = gradient({"a": beta[:5] * 0 + 0.75, "b": [beta[5:9] * 0 + 0.75, shared]})
    assert d_leaves["a"].shape == (5,)
    assert relative_error(jnp.sum(d_leaves["a"]), d_whole["a"]) < 1e-9
    below = jnp.sum(d_leaves["b"][0]) + d_leaves["b"][1]
    assert relative_error(below, d_whole["b"]) < 1e-9


def gradient(args, beta, z0, g, **options):
    return jax.vjp(lambda a, b: value(a, b, z0, **options), args, beta)[1](g)


def of_vmap(args, beta, z0, g):
    one = lambda a, b, z0: value(a, b, z0, batched=False)
    many = lambda a, b: jax.vmap(one, ((None, 0), None, 0))(a, b, z0)
    return jax.jit(lambda a, b: jax.vjp(many, a, b)[1](g))(args, beta)


def vmap_of_grad(args, beta, z0, g):
    one = lambda x, z0, g: gradient((args[0], x), beta, z0, g, batched=False)
    (w, x), b = jax.jit(jax.vmap(one))(args[1], z0, g)
    return (jnp.sum(w, 0), x), jnp.sum(b, 0)


def a_beta_per_example(args, beta, z0, g):
    one = lambda a, b, z0: value(a, b, z0, batched=False)
    many = lambda a, b: jax.vmap(one, ((None, 0), 0, 0))(a, b, z0)
    each = jnp.broadcast_to(beta, (BATCH, N))
    d_args, d_beta = jax.jit(lambda a, b: jax.vjp(many, a, b)[1](g))(args, each)
    return d_args, jnp.sum(d_beta, 0)


def vmap_of_batched(args, beta, z0, g):
    """Two problem axes."""
    split = lambda x: x.reshape(2, BATCH // 2, N)
    many = lambda a, b: jax.vmap(value, ((None, 0), None, 0))(a, b, split(z0))
    pull = lambda a, b: jax.vjp(many, a, b)[1](split(g))
    (w, x), b = jax.jit(pull)((args[0], split(args[1])), beta)
    return (w, x.reshape(BATCH, N)), b


def shard_mapped(args, beta, z0, g):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    one = lambda w, x, b, z0, g: gradient((w, x), b, z0, g)
    part = P("data")
    each = jax.shard_map(
        one, mesh=mesh, in_specs=(P(), part, P(), part, part), out_specs=((P(), part), P())
    )
    return jax.jit(each)(args[0], args[1], beta, z0, g)


def remat(args, beta, z0, g):
    loss = jax.checkpoint(lambda a, b: jnp.vdot(g, value(a, b, z0)))
    return jax.jit(jax.grad(loss, (0, 1)))(args, beta)


def pull_apart(args, beta, z0, g):
    _, pull = jax.jit(lambda a, b: jax.vjp(lambda a, b: value(a, b, z0), a, b))(args, beta)
    return jax.jit(pull)(g)


def segments(args, beta, z0, g):
    """The floating-point steps at the rounded beta, which it is given."""
    rounded = solver(beta).relaxation
    return jax.jit(lambda a, b: gradient(a, b, z0, g, exact=False))(args, rounded)


def checkpointed(args, beta, z0, g):
    how = dict(adjoint=deqjax.RecursiveCheckpointAdjoint())
    return jax.jit(lambda a, b: gradient(a, b, z0, g, **how))(args, beta)


WAYS = [of_vmap, vmap_of_grad, a_beta_per_example, vmap_of_batched, shard_mapped, remat, pull_apart]


@pytest.mark.x64
@pytest.mark.parametrize("way", [*WAYS, segments, checkpointed], ids=lambda way: way.__name__)
def test_under_every_transformation(way):
    args, beta, z0, g = problem(jnp.float64)
    plain = jax.jit(lambda a, b: gradient(a, b, z0, g))(args, beta)
    for found, expected in zip(way(args, beta, z0, g), plain, strict=True):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.x64
def test_forward_mode_second_derivatives_and_the_other_door():
    args, beta, z0, _ = problem(jnp.float64, batch=())
    beta = solver(beta).relaxation  # so that rounding moves nothing
    options = dict(batched=False, max_steps=5)
    loss = lambda b: jnp.sum(jnp.sin(value(args, b, z0, **options)))

    def plain(b):
        past = now = z0
        for _ in range(5):
            past, now = now, (1 - b) * past + b * cell(now, args)
        return jnp.sum(jnp.sin(now))

    for derive in (jax.grad, jax.jacfwd, jax.hessian, lambda f: jax.jacrev(jax.grad(f))):
        assert relative_error(jax.jit(derive(loss))(beta), jax.jit(derive(plain))(beta)) < 1e-9

    def theirs(b):
        options = dict(adjoint=ADJOINT, max_steps=5, throw=False)
        sol = optimistix.fixed_point(cell, solver(b), z0, args, **options)
        return jnp.sum(jnp.sin(sol.value))

    assert relative_error(jax.jit(jax.grad(theirs))(beta), jax.jit(jax.grad(plain))(beta)) < 1e-9


def test_a_layer_learns_it(getkey):
    """As a parameter of the solver, by the line of the docstring of `Reversible`."""
    weight, xs = jax.random.normal(getkey(), (N, N)) / N**0.5, jax.random.normal(getkey(), (4, N))
    beta = paramax.Parameterize(jax.nn.sigmoid, jnp.zeros(N))
    how = dict(max_steps=8)
    deq = DEQ(lambda z, x: cell(z, (weight, x)), solver(beta), ADJOINT, **how)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(deq):
        z, _ = deq(xs, batched=True)
        return jnp.sum(jnp.sin(z))

    found = gradient(deq).solver.beta.args[0]
    by_hand = lambda raw: eqx.tree_at(lambda deq: deq.solver.beta, deq, jax.nn.sigmoid(raw))
    loss = lambda raw: jnp.sum(jnp.sin(by_hand(raw)(xs, batched=True)[0]))
    assert found.shape == (N,) and jnp.all(found != 0)
    assert relative_error(found, jax.jit(jax.grad(loss))(jnp.zeros(N))) < 1e-6


def test_refused():
    args, beta, z0, _ = problem()
    for wrong in (0.0, 1.0, 1.2, jnp.nan):
        with pytest.raises(ValueError, match=r"expects a relaxation in \(0, 1\), got beta"):
            solver(beta.at[3].set(wrong))
    with pytest.raises(ValueError, match=r"expects a relaxation in \(0, 2\) and not 1"):
        solver(beta.at[3].set(1.0), exact=False)
    solver(beta.at[3].set(1.2), exact=False)
    for wrong in (beta[:5], jnp.ones((BATCH, 1, N)) / 2, {"z": beta}, [beta, beta]):
        with pytest.raises(ValueError, match="expects beta to be a number, an array that broad"):
            value(args, wrong, z0)
    for wrong in ("a", None, [], jnp.asarray(1), jnp.asarray(0.5 + 0j)):
        with pytest.raises(ValueError, match="beta to be a number, a real array, or a pytree"):
            solver(wrong)
    for wrong in (1, 2**16 + 1, 64.0, None):
        with pytest.raises(ValueError, match="expects denominator to be an int from 2 to 65536"):
            solver(beta, denominator=wrong)


def test_a_traced_beta_out_of_range_is_reported():
    args, beta, z0, _ = problem()

    @jax.jit
    def result(beta):
        sol = deqjax.fixed_point(cell, solver(beta), z0, args, batched=True, max_steps=4)
        return sol.result == deqjax.RESULTS.nonlinear_divergence

    assert not jnp.any(result(beta)) and jnp.all(result(beta.at[3].set(1.2)))


@pytest.mark.x64
@pytest.mark.parametrize("d, dtype", [(7, "float64"), (64, "float32"), (65536, "float32")])
def test_it_ends_at_the_fixed_point(d, dtype):
    """A step moves a state by no more than one spacing, whatever it keeps of it."""
    beta = jnp.asarray([1 / 64, 0.02, 0.3, 0.98], dtype)
    at = solver(beta, denominator=d)
    fn = lambda z, _: 0.5 * jnp.cos(z)
    sol = deqjax.fixed_point(fn, at, jnp.ones(4, dtype), max_steps=4000)
    spacing = 2.0 ** -(24 + 32 * (dtype == "float64"))
    off = np.abs(np.asarray(sol.value - fn(sol.value, None), np.float64))
    # One spacing a step, over what a step takes away of a distance: beta (1 - f') / 2.
    limit = 4 * spacing / np.asarray(at.relaxation, np.float64) + float(jnp.finfo(dtype).eps)
    assert np.all(off < limit)

"""Guard digits: an f that is rounded otherwise in the sweep is reversed bit for bit."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import ways
from problems import noisy, nothing_but_nan, relative_error, tanh

import deqjax

N, BATCH, STEPS = 6, 8, 40
ADJOINT = deqjax.ReversibleAdjoint()


@jax.custom_jvp
def total(x):
    """Sums of rows, in another order where they are differentiated."""
    return sum(x[..., i] for i in range(x.shape[-1]))


@total.defjvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return sum(x[..., i] for i in reversed(range(x.shape[-1]))), jnp.sum(t, -1)


def cell(z, a):
    weight, x = a
    y = z + jnp.tanh(total(jnp.broadcast_to(weight, (*z.shape, N)) * z[..., None, :]) + x)
    return y / jnp.sqrt(jnp.expand_dims(total(y**2), -1) / N + 1e-6)


def problem(dtype=jnp.float32, batch=()):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return (draw(N, N) / N**0.5, draw(*batch, N)), draw(*batch, N), draw(*batch, N)


def solver(guard=None, beta=0.8, tol=0.0, **bits):
    return deqjax.Reversible(rtol=tol, atol=tol, beta=beta, guard_bits=guard, **bits)


def truth(args, z0, g, beta=0.8, steps=STEPS, dtype=jnp.float32):
    """The cotangents of args and z0 by the steps, stored; accurate in float64."""
    with jax.enable_x64(True):
        args, z0, g = jax.tree.map(lambda x: x.astype(jnp.float64), (args, z0, g))

        def last(args, z0):
            step = lambda s, _: ((s[1], (1 - beta) * s[0] + beta * cell(s[1], args)), None)
            return jax.lax.scan(step, (z0, z0), length=steps)[0][1]

        return jax.jit(lambda *a: jax.vjp(last, *a[:2])[1](a[2]))(args, z0, g)


@pytest.mark.parametrize("beta", [0.5, 0.8, 0.9, 1.2])
@pytest.mark.parametrize("steps", [16, 200])
def test_sums_in_another_order(beta, steps):
    """Those of the derivative rule, which the sweep takes with guard digits."""
    args, z0, g = problem()
    run = lambda s: deqjax.reversible_vjp(cell, s, z0, args, g, max_steps=steps)
    (_, *found), stats = run(solver(beta=beta))
    assert stats["reversal_residual"] == 0 and stats["trusted"]
    assert 0 < stats["guard"] < 0.5
    if steps == 16:
        assert relative_error(found, truth(args, z0, g, beta, steps)) < 2e-5


def test_sums_in_a_new_order_at_each_call():
    """As in a nondeterministic kernel: exact with guard digits, and caught without."""
    calls = np.random.default_rng(0)

    @jax.custom_jvp
    def shuffled(x):
        shape = jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
        add = lambda x: np.add.accumulate(calls.permuted(x, axis=-1), -1, dtype=np.float32)[..., -1]
        return jax.pure_callback(add, shape, x)

    shuffled.defjvp(lambda x, t: (shuffled(*x), jnp.sum(t[0], -1)))
    fn = lambda z, a: jnp.tanh(shuffled(a[0] * z[None, :]) + a[1])
    args, z0, g = problem()
    run = lambda s: deqjax.reversible_vjp(fn, s, z0, args, g, max_steps=STEPS)
    plain = lambda z, a: jnp.tanh(a[0] @ z + a[1])
    quiet, _ = deqjax.reversible_vjp(plain, solver(), z0, args, g, max_steps=STEPS)
    found, stats = run(solver())
    assert stats["trusted"] and 0 < stats["guard"] < 0.5
    assert relative_error(found[1:], quiet[1:]) < 1e-5
    lost, stats = run(solver(0))
    assert not stats["trusted"] and nothing_but_nan(lost) and stats["guard"] == 0


def test_noise_of_the_size_of_rounding():
    """Other noise at each call: exact within the guard, and caught beyond."""
    p = tanh(4, 0.8, dtype=np.float32)
    run = lambda size, **kwargs: deqjax.reversible_vjp(
        noisy(size), solver(**kwargs), p.z0, p.args, p.cotangent, max_steps=15
    )
    quiet, _ = deqjax.reversible_vjp(p.fn, solver(), p.z0, p.args, p.cotangent, max_steps=15)
    more, coarser = {"guard": 12}, {"guard": 4, "fraction_bits": 16}
    for size, kwargs in (1e-7, {}), (3e-6, {}), (3e-5, more), (3e-5, coarser):
        found, stats = run(size, **kwargs)
        assert stats["trusted"] and 0 < stats["guard"] < 1
        if size < 1e-5:
            assert relative_error(found, quiet) < 1e3 * size
    for size, guard in (1e-7, 0), (3e-5, None):
        found, stats = run(size, guard=guard)
        assert not stats["trusted"] and nothing_but_nan(found)
    assert run(3e-5)[1]["guard"] > 0.9


def test_the_message_says_which_number_to_raise():
    args, z0, g = problem()
    adjoint = deqjax.ReversibleAdjoint(on_failure="raise")
    with pytest.raises(eqx.EquinoxRuntimeError, match="raise guard_bits of deqjax.Reversible"):
        fn = noisy(1e-4)
        out = deqjax.reversible_vjp(fn, solver(), z0, args, g, max_steps=15, adjoint=adjoint)
        jax.block_until_ready(out)


@pytest.mark.x64
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_dtype(dtype):
    args, z0, g = problem(dtype)
    _, stats = deqjax.reversible_vjp(cell, solver(), z0, args, g, max_steps=STEPS)
    assert stats["reversal_residual"] == 0 and stats["guard"] < 0.25


def test_a_batch_that_stops_early_and_a_pytree():
    """Each problem in its own number of steps, from leaves of two dtypes."""
    args, z0, g = problem(batch=(BATCH,))

    def fn(z, a):
        new = cell(z["a"], (a[0], a[1]))
        return {"a": new, "b": [0.5 * jnp.cos(z["b"][0])]}

    state = {"a": z0, "b": [z0[:, :2].astype("bfloat16")]}
    g = {"a": g, "b": [g[:, :2].astype("bfloat16")]}
    xs = args[1] * jnp.arange(1, BATCH + 1, dtype=jnp.float32)[:, None]
    options = dict(batched=True, max_steps=STEPS)
    many = lambda z, a: jax.vmap(fn, (0, (None, 0)))(z, a)
    out, stats = deqjax.reversible_vjp(many, solver(tol=1e-2), state, (args[0], xs), g, **options)
    assert len(set(stats["num_steps"].tolist())) > 2
    assert jnp.all(stats["reversal_residual"] == 0) and jnp.all(stats["guard"] < 0.5)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(out[1:]))


def solve(args, z0, batched=False, **options):
    options = dict(max_steps=STEPS, adjoint=ADJOINT, batched=batched) | options
    return deqjax.fixed_point(cell, solver(), z0, args, **options).value


def steps_per_problem(solve, args, z0, g):
    budget = dict(max_steps=STEPS + 9, steps=jnp.full(BATCH, STEPS, jnp.int32))
    return ways.plain(ft.partial(solve, **budget), args, z0, g)


@pytest.mark.parametrize("way", [*ways.WAYS.values(), steps_per_problem], ids=lambda w: w.__name__)
def test_under_every_transformation(way):
    """An f that is not reproducible, and the gradient that a plain batched solve has."""
    args, z0, g = problem(batch=(BATCH,))
    plain = ways.plain(solve, args, z0, g)
    assert relative_error(plain, truth(args, z0, g)[0]) < 1e-4
    assert relative_error(way(solve, args, z0, g), plain) < 1e-4


def test_through_optimistix():
    """Their loop records nothing."""
    args, z0, g = problem()
    options = dict(adjoint=ADJOINT, max_steps=STEPS, throw=False)
    value = lambda a: optimistix.fixed_point(cell, solver(), z0, a, **options).value
    found = jax.jit(lambda a: jax.vjp(value, a)[1](g)[0])(args)
    assert relative_error(found, truth(args, z0, g)[0]) < 1e-4


@pytest.mark.x64
def test_forward_mode_and_second_derivatives():
    args, z0, _ = problem(jnp.float64)
    options = dict(max_steps=6, adjoint=ADJOINT)
    loss = lambda a: jnp.sum(jnp.sin(deqjax.fixed_point(cell, solver(), z0, a, **options).value))

    def plain(a):
        past = now = z0
        for _ in range(6):
            past, now = now, (1 - 0.8) * past + 0.8 * cell(now, a)
        return jnp.sum(jnp.sin(now))

    for derive in (jax.grad, jax.jacfwd, lambda f: jax.jacfwd(jax.grad(f))):
        assert relative_error(jax.jit(derive(loss))(args), jax.jit(derive(plain))(args)) < 1e-10


def test_only_the_isolated_mode_has_loops_of_one_trip():
    """One in each of the two loops: an evaluation of f that guard digits spare."""
    args, z0, g = problem()

    def loops(guard):
        value = lambda a: (
            deqjax.fixed_point(cell, solver(guard), z0, a, max_steps=STEPS, adjoint=ADJOINT).value
        )
        text = str(jax.make_jaxpr(lambda a: jax.vjp(value, a)[1](g))(args))
        return text.count(" while[")

    assert loops(None) == 2
    assert loops(0) == 4


@pytest.mark.parametrize("bits", [8, 12, 16, 17, 20, 24])
def test_a_coarse_grid_has_digits_for_both_directions(bits):
    """On it a tiny difference moves a rounded update by one, up or down."""

    @jax.custom_jvp
    def moved(x):
        return x

    for sign in (1, -1):
        by = 1 + sign * 2e-7
        moved.defjvp(lambda x, t, by=by: (x[0] * by, t[0]))
        args, z0, g = problem()
        at = solver(beta=0.5, fraction_bits=bits)
        fn = lambda z, a: moved(jnp.tanh(a[0] @ z + a[1]))
        _, stats = deqjax.reversible_vjp(fn, at, z0, args, g, max_steps=STEPS)
        assert stats["trusted"] and stats["guard"] <= 0.5


@pytest.mark.parametrize("beta", [0.5, 0.75, jnp.full(N, 0.5)], ids=["half", "quarter", "array"])
def test_an_error_that_wraps_around_is_caught(beta):
    """An f that forgets z: powers of an even d bring the error of a state back to 0."""
    calls = []

    def draw(z):
        calls.append(0)
        return np.full(N, 1e-3 * (len(calls) == 45), np.float32)

    def fn(z, a):
        noise = jax.pure_callback(draw, z, jax.lax.stop_gradient(z))
        return a[1] + a[2] * jnp.sin(z) + noise

    args, z0, g = problem()
    args = (*args, jnp.zeros(N))
    found, stats = deqjax.reversible_vjp(fn, solver(beta=beta), z0, args, g, max_steps=STEPS)
    assert len(calls) > 45
    assert not stats["trusted"] and nothing_but_nan(found)

"""The exact mode reversed: its gradient at any depth, dtype and order, and its memory."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from hypothesis import given, settings, strategies as st
from problems import relative_error, tanh

import deqjax

CHECKPOINTED = deqjax.RecursiveCheckpointAdjoint()
TEXTBOOK = deqjax.ReversibleAdjoint(segment=None)


def reversible(beta, tol=0.0, **kwargs):
    return deqjax.Reversible(rtol=tol, atol=tol, beta=beta, **kwargs)


@contextlib.contextmanager
def compiled_fast():
    """For the references in tests marked `optimised`: no bit of theirs matters."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@eqx.filter_jit
def real_vjp(fn, beta, z0, args, g, **options):
    """The cotangents of args and z0 by the floating-point steps, from checkpoints."""
    options = dict(adjoint=CHECKPOINTED) | options
    solver = reversible(beta, exact=False)
    value = lambda a, z0: deqjax.fixed_point(fn, solver, z0, a, **options).value
    return jax.vjp(value, args, z0)[1](g)


SHAPES = st.lists(st.integers(0, 2), max_size=2).map(tuple)
TREES = st.one_of(SHAPES, st.fixed_dictionaries({"a": SHAPES, "b": st.tuples(SHAPES)}))


@pytest.mark.optimised
@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.data())
def test_any_problem_is_reversed_to_the_bit(data):
    """70 steps are 3 words of digits at d = 2 and 6 at d = 5."""
    # Drawn from a few, since each of these compiles anew; what does not is drawn more often.
    beta = data.draw(st.sampled_from([0.5, 2 / 3, 0.8, 0.9, 1.2, 1.5]))
    bits = data.draw(st.sampled_from([8, 16, 24, 30]))
    tol = data.draw(st.sampled_from([0.0, 3e-2]))
    batch = data.draw(st.integers(1, 4))
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(i, int) for i in x)
    shapes = jax.tree.map(lambda s: (batch, *s), data.draw(TREES), is_leaf=is_shape)
    fn = lambda z, a: jax.tree.map(lambda x: a * jnp.cos(x), z)
    for _ in range(3):
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        draw = lambda s: jnp.asarray(rng.uniform(-1, 1, s), jnp.float32)  # noqa: B023
        z0, g = (jax.tree.map(draw, shapes, is_leaf=is_shape) for _ in range(2))
        steps = data.draw(st.lists(st.integers(0, 70), min_size=batch, max_size=batch))
        args, n = jnp.float32(0.3), jnp.asarray(steps, jnp.int32)
        options = dict(batched=True, max_steps=70)
        solver = reversible(beta, tol, fraction_bits=bits)
        out, stats = deqjax.reversible_vjp(fn, solver, z0, args, g, steps=n, **options)
        assert jnp.all(stats["reversal_residual"] == 0) and jnp.all(stats["trusted"])
        assert jnp.all(stats["num_steps"] == n) if tol == 0 else jnp.all(stats["num_steps"] <= n)
        with compiled_fast():
            truth = real_vjp(fn, beta, z0, args, g, steps=stats["num_steps"], **options)
        for a, b in zip(jax.tree.leaves(out[1:]), jax.tree.leaves(truth), strict=True):
            size = max(1.0, float(jnp.max(jnp.abs(b), initial=0)))
            np.testing.assert_allclose(a, b, atol=(20 * 2.0**-bits + 1e-5) * size)


def rotation(seed=0, n=16):
    """z -> A z + b that forgets slowly: a fast contraction would hide what reversal gets wrong."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return 0.98 * q, rng.standard_normal(n)


@pytest.mark.x64
@pytest.mark.optimised
@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_depth_1024_in_float32(beta):
    fn = lambda z, a: a[0] @ z + a[1]

    def grad(dtype, exact, adjoint):
        solver = reversible(beta, exact=exact)
        args = tuple(jnp.asarray(x, jnp.float32).astype(dtype) for x in rotation())

        def loss(args):
            options = dict(max_steps=1024, adjoint=adjoint)
            sol = deqjax.fixed_point(fn, solver, jnp.zeros(16, dtype), args, **options)
            return jnp.sum(jnp.sin(sol.value))

        return jax.jit(jax.grad(loss))(args)

    with compiled_fast():
        truth = grad("float64", False, CHECKPOINTED)
    ordinary = relative_error(grad("float32", False, CHECKPOINTED), truth)
    error = relative_error(grad("float32", True, deqjax.ReversibleAdjoint()), truth)
    assert error < 1e-4
    assert error < 10 * ordinary
    assert not relative_error(grad("float32", False, TEXTBOOK), truth) < 1e-2


@pytest.mark.x64
@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype(dtype):
    """A state of two bytes has the bits of float32; one of eight has 32 more."""
    p = tanh(6, 0.8, dtype=jnp.dtype(dtype))
    z0, g = p.cotangent / 4, p.cotangent
    out, stats = deqjax.reversible_vjp(p.fn, reversible(0.8), z0, p.args, g, max_steps=45)
    assert stats["reversal_residual"] == 0
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(dtype)}
    up = lambda tree: jax.tree.map(lambda x: x.astype("float64"), tree)
    with compiled_fast():
        truth = real_vjp(p.fn, 0.8, *up((z0, p.args, g)), max_steps=45)
    bound = 1e-12 if dtype == "float64" else 10 * float(jnp.finfo(dtype).eps)
    assert relative_error(up(out[1:]), truth) < bound


@pytest.mark.optimised
def test_batch_mates_do_not_matter():
    """To the bit: its value, its number of steps and its gradient are those of one example."""
    fn = lambda z, a: a * jnp.cos(z)
    z0 = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (4, 3)), "float32")
    rates = jnp.broadcast_to(jnp.asarray([[0.6], [0.1], [0.3], [0.9]], "float32"), (4, 3))

    def run(z0, rates):
        options = dict(batched=True, max_steps=60)
        solver = reversible(0.5, 1e-3)
        sol = deqjax.fixed_point(fn, solver, z0, rates, adjoint=CHECKPOINTED, **options)
        g = jnp.ones_like(z0)
        (_, d_args, d_z0), stats = deqjax.reversible_vjp(fn, solver, z0, rates, g, **options)
        assert jnp.all(stats["reversal_residual"] == 0)
        assert jnp.all(stats["num_steps"] == sol.stats["num_steps"])
        return sol.value, stats["num_steps"], d_args, d_z0

    mixed = run(z0, rates)
    assert len(set(mixed[1].tolist())) == 4
    alike = run(jnp.broadcast_to(z0[:1], z0.shape), jnp.broadcast_to(rates[:1], rates.shape))
    assert all(jnp.all(a[0] == b[0]) for a, b in zip(mixed, alike, strict=True))


@pytest.mark.x64
def test_some_leaves_aux_residual_and_what_is_no_float():
    p = tanh(6, 0.8, dtype=np.float64)
    key = jax.random.key(0)
    args = {"w": jnp.stack([*p.args[:1], -p.args[0]]), "i": jnp.asarray(1), "key": key, "no": None}

    def fn(z, a):
        flat = jnp.concatenate([z["a"], z["b"]])
        new = jnp.tanh(a["w"][a["i"]] @ flat + 0.3 * jax.random.normal(a["key"], (6,)))
        return {"a": new[:2], "b": new[2:]}, jnp.sum(jnp.cos(flat))

    def loss(w, exact, adjoint):
        z0 = {"a": jnp.zeros(2), "b": jnp.ones(4)}
        options = dict(max_steps=20, adjoint=adjoint, has_aux=True)
        solver = reversible(0.5, exact=exact)
        sol = deqjax.fixed_point(fn, solver, z0, args | {"w": w}, **options)
        return jnp.stack([jnp.sum(sol.value["b"] ** 2), sol.aux, sol.stats["residual"]])

    jac = lambda *how: jax.jit(jax.jacrev(lambda w: loss(w, *how)))(args["w"])
    mine, truth = jac(True, deqjax.ReversibleAdjoint()), jac(False, CHECKPOINTED)
    for i in range(3):
        assert relative_error(mine[i], truth[i]) < 1e-10


@pytest.mark.x64
def test_derivatives_of_every_order():
    """Rounding has no derivative of its own, and none may go missing in the integers."""
    p = tanh(3, 0.8, dtype=np.float64)
    w, x = p.args
    xs = jnp.stack([x, 2 * x, -x])

    def exact(x, w):
        options = dict(max_steps=5, adjoint=deqjax.ReversibleAdjoint())
        return deqjax.fixed_point(p.fn, reversible(0.5), jnp.zeros(3), (w, x), **options).value

    def unrolled(x, w):
        past = now = jnp.zeros(3)
        for _ in range(5):
            past, now = now, 0.5 * past + 0.5 * p.fn(now, (w, x))
        return now

    def derivatives(value):
        loss = lambda x, w: jnp.sum(jnp.sin(value(x, w)))
        squared = lambda x, w: jnp.sum(jax.grad(loss)(x, w) ** 2)
        return dict(
            jacrev=jax.jacrev(value, (0, 1))(x, w),
            jacfwd=jax.jacfwd(value)(x, w),
            hessian=jax.hessian(loss)(x, w),
            vmap_jacrev=jax.vmap(jax.jacrev(value, (0, 1)), (0, None))(xs, w),
            reverse_over_reverse=jax.grad(squared, 1)(x, w),
            forward_over_reverse=jax.jvp(jax.grad(loss), (x, w), (jnp.cos(x), jnp.cos(w)))[1],
        )

    mine = jax.jit(lambda: derivatives(exact))()
    truth = jax.jit(lambda: derivatives(unrolled))()
    for name, expected in truth.items():
        assert relative_error(mine[name], expected) < 1e-11, name


@pytest.mark.parametrize("beta, guard, words", [(0.5, 0, 2), (0.8, 0, 4), (0.8, 4, 9)])
def test_residuals_kept(beta, guard, words):
    """Two states, and the digits in whole words: whatever else is kept has O(1) bytes."""
    n, max_steps = 1000, 40

    def value(scale, z0):
        options = dict(max_steps=max_steps, adjoint=deqjax.ReversibleAdjoint())
        fn = lambda z, a: a * jnp.cos(z)
        solver = reversible(beta, guard_bits=guard)
        return deqjax.fixed_point(fn, solver, z0, scale, **options).value

    _, pull = jax.jit(lambda *a: jax.vjp(value, *a))(jnp.float32(0.5), jnp.ones(n))
    kept = sum(x.nbytes for x in jax.tree.leaves(pull) if eqx.is_array(x))
    inputs = 4 * n
    assert kept - inputs <= (8 + 4 * words) * n + 100


@pytest.mark.optimised
@pytest.mark.parametrize("exact", [True, False])
def test_vmap_has_no_parameter_cotangent_per_example(exact):
    n, batch = 256, 16
    options = dict(max_steps=6, adjoint=deqjax.ReversibleAdjoint())
    solver, zeros = reversible(0.5, exact=exact), jnp.zeros
    one = lambda w, x: deqjax.fixed_point(
        lambda z, a: jnp.tanh(a[0] @ z + a[1]), solver, zeros(n), (w, x), **options
    ).value  # fmt: skip
    many = lambda w, x: deqjax.fixed_point(
        lambda z, a: jnp.tanh(z @ a[0].T + a[1]), solver, zeros((batch, n)), (w, x),
        batched=True, **options,
    ).value  # fmt: skip

    def temporary(value):
        grad = jax.jit(jax.grad(lambda w, x: jnp.sum(value(w, x))))
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in [(n, n), (batch, n)]]
        return grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    batched = temporary(many)
    assert abs(temporary(jax.vmap(one, (None, 0))) - batched) < 0.1 * batched


@pytest.mark.x64
def test_optimistix_door_with_early_stopping():
    """The steps taken are retraced for the record, and reversed: those of our own door."""
    p = tanh(6, 0.5, dtype=np.float64)
    solver, adjoint = reversible(0.5, 1e-5), deqjax.ReversibleAdjoint()

    def theirs(args):
        options = dict(adjoint=adjoint, throw=False, max_steps=99)
        sol = optimistix.fixed_point(p.fn, solver, p.z0, args, **options)
        return jnp.sum(jnp.sin(sol.value)), sol.stats["num_steps"]

    grad, num_steps = jax.jit(jax.grad(theirs, has_aux=True))(p.args)
    assert 3 < num_steps < 60
    value = lambda a: deqjax.fixed_point(
        p.fn, reversible(0.5, exact=False), p.z0, a, max_steps=60, steps=num_steps,
        adjoint=CHECKPOINTED,
    ).value  # fmt: skip
    truth = jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(value(a)))))(p.args)
    assert relative_error(grad, truth) < 1e-11

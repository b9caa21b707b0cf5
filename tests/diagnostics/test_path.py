"""Solutions on the way: one undivided solve, its gradients, and what is handed on."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import affine

import deqjax
from deqjax import RESULTS

FIXED = deqjax.FixedPointIteration(rtol=0.0, atol=0.0)
PICARD = deqjax.FixedPointIteration(rtol=1e-5, atol=1e-5)
UNROLLED = dict(
    adjoint=deqjax.RecursiveCheckpointAdjoint(), path_adjoint=deqjax.RecursiveCheckpointAdjoint()
)
INDICES, DEPTH = (1, 4), 7
WEIGHTS = (0.25, 0.5, 1.0)
linear = lambda z, args: args[0] @ z + args[1]


def dyadic(dtype):
    """`W`, `b`, `z0` in quarters: seven steps and their gradients have no rounding in float32."""
    rng = np.random.default_rng(0)
    quarters = lambda *shape: jnp.asarray(rng.integers(-2, 3, shape) / 4, dtype)
    return (quarters(3, 3), quarters(3)), quarters(3)


def test_it_is_the_undivided_solve():
    """Values and gradients to the last bit, of an f whose arithmetic is exact."""
    args, z0 = dyadic(jnp.float32)
    task = lambda z: jnp.sum(z) + jnp.sum(z[:1]) / 2

    def divided(args, z0):
        options = dict(indices=INDICES, max_steps=DEPTH, **UNROLLED)
        sols = deqjax.fixed_point_path(linear, FIXED, z0, args, **options)
        values = tuple(sol.value for sol in sols)
        return sum(w * task(z) for w, z in zip(WEIGHTS, values, strict=True)), values

    def undivided(args, z0):
        options = dict(max_steps=DEPTH, adjoint=UNROLLED["adjoint"])
        solve = lambda n: deqjax.fixed_point(linear, FIXED, z0, args, steps=n, **options).value
        values = tuple(map(solve, (*INDICES, DEPTH)))
        return sum(w * task(z) for w, z in zip(WEIGHTS, values, strict=True)), values

    run = lambda loss: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(args, z0)
    one, other = run(divided), run(undivided)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(one[1]))


@pytest.mark.x64
def test_default_gradients():
    """On the way those of the steps taken; at the end those of the fixed point, handing on none."""
    p = affine(5, 0.3, dtype=np.float64)
    g, h = np.asarray(p.cotangent), np.arange(5.0)
    a, b = (np.asarray(x) for x in p.args)

    def loss(args, z0):
        options = dict(indices=(2,), max_steps=60)
        early, late = deqjax.fixed_point_path(p.fn, FIXED, z0, args, **options)
        return h @ early.value + g @ late.value

    z0 = np.ones(5)
    (d_a, d_b), d_z0 = jax.jit(jax.grad(loss, (0, 1)))(p.args, jnp.asarray(z0))
    z1 = a @ z0 + b
    np.testing.assert_allclose(d_z0, a.T @ a.T @ h, rtol=1e-10)
    np.testing.assert_allclose(d_b, p.gradient[1] + h + a.T @ h, rtol=1e-10)
    on_the_way = np.outer(h, z1) + np.outer(a.T @ h, z0)
    np.testing.assert_allclose(d_a, p.gradient[0] + on_the_way, rtol=1e-10)


def test_a_tolerance_met_early():
    """Step counts add up to those of one solve, per problem; what has converged takes no step."""
    rates = jnp.asarray([0.05, 0.5, 0.9])[:, None]
    fn = lambda z, rate: rate * z + 1
    options = dict(batched=True, max_steps=12)
    z0 = jnp.zeros((3, 1))
    sols = deqjax.fixed_point_path(fn, PICARD, z0, rates, indices=(6, 9), **options)
    whole = deqjax.fixed_point(fn, PICARD, z0, rates, **options)
    counts = np.stack([sol.stats["num_steps"] for sol in sols])
    np.testing.assert_array_equal(counts.sum(0), whole.stats["num_steps"])
    np.testing.assert_array_equal(counts[1:, 0], 0)
    np.testing.assert_array_equal(counts[:, 2], [6, 3, 3])
    np.testing.assert_array_equal(sols[-1].value, whole.value)
    met = lambda sol: jax.vmap(lambda code: code == RESULTS.successful)(sol.result).tolist()
    assert met(sols[0]) == met(sols[-1]) == met(whole) == [True, False, False]


def test_a_traced_budget():
    """Steps of the whole path, that never trace again; beyond the ceiling the last one says so."""
    args, z0 = dyadic(jnp.float32)
    traces = []

    @jax.jit
    def run(steps):
        traces.append(None)
        options = dict(indices=INDICES, max_steps=DEPTH, steps=steps)
        return deqjax.fixed_point_path(linear, FIXED, z0, args, **options)

    z = [z0]
    for _ in range(DEPTH):
        z.append(linear(z[-1], args))
    for n in (0, 1, 3, 7, 8):
        sols = run(n)
        ends = [min(n, i) for i in (*INDICES, DEPTH)]
        for sol, end in zip(sols, ends, strict=True):
            np.testing.assert_array_equal(sol.value, z[end])
        assert [int(s.stats["num_steps"]) for s in sols] == np.diff([0, *ends]).tolist()
        assert [bool(s.result == RESULTS.successful) for s in sols] == [True, True, n < 8]
    assert len(traces) == 1

    options = dict(indices=INDICES, max_steps=DEPTH, batched=True, has_aux=True)
    fn = lambda z, args: (z @ args[0].T + args[1], z)
    several = jnp.stack([z0, z0])
    args = args[0], args[1][None]
    steps = jnp.asarray([2, 5])
    sols = deqjax.fixed_point_path(fn, FIXED, several, args, steps=steps, **options)
    np.testing.assert_array_equal(sols[-1].aux, jnp.stack([z[2], z[5]]))


@pytest.mark.parametrize("exact", [True, False])
def test_a_reversible_path_in_half_precision(exact):
    """The memory starts anew; an adjoint of the steps hands its cotangent on, to z0."""
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=0.5, exact=exact)
    adjoint = deqjax.ReversibleAdjoint()
    (w, b), z0 = dyadic(jnp.bfloat16)
    args = w / 2, b

    def last(z0, adjoints):
        options = dict(indices=(2,), max_steps=4, **adjoints)
        return deqjax.fixed_point_path(linear, solver, z0, args, **options)[-1].value

    run = ft.partial(deqjax.fixed_point, linear, solver, max_steps=2, adjoint=adjoint)
    z = last(z0, dict(adjoint=adjoint, path_adjoint=adjoint))
    np.testing.assert_array_equal(z, run(run(z0, args).value, args).value)
    total = lambda z0, adjoints: jnp.sum(last(z0, adjoints).astype(jnp.float32))
    one = jax.grad(total)(z0, dict(adjoint=adjoint, path_adjoint=adjoint))
    other = jax.grad(total)(z0, UNROLLED)
    assert one.dtype == jnp.bfloat16 and jnp.all(one != 0)
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (one, other)), rtol=0.03)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (4, "a sequence of ints, got 4"),
        ((1.5,), "a sequence of ints"),
        ((0, 2), "increasing indices from 1 to max_steps - 1 = 6"),
        ((3, 3), "increasing"),
        ((7,), "solution is always returned"),
    ],
)
def test_bad_indices_raise(indices, words):
    args, z0 = dyadic(jnp.float32)
    with pytest.raises(ValueError, match=words):
        deqjax.fixed_point_path(linear, FIXED, z0, args, indices=indices, max_steps=DEPTH)


def test_the_path_goes_on_where_the_residual_rises():
    """Iterates on the way are those of the undivided solve, and not the best so far."""
    J = jnp.asarray([[0.5, 20.0], [0.0, 0.5]])
    fn = lambda z, b: J @ z + b
    b = jnp.asarray([0.0, 1.0])
    solver = deqjax.FixedPointIteration(1e-5, 1e-6)
    sols = deqjax.fixed_point_path(fn, solver, jnp.zeros(2), b, indices=(1, 2, 3), max_steps=60)
    z = jnp.zeros(2)
    for sol in sols[:3]:
        z = fn(z, b)
        assert jnp.array_equal(sol.value, z)
    assert sols[3].result == deqjax.RESULTS.successful

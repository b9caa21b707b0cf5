"""A reversible solve under `jax.vmap`, and a bad example among good ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from problems import matrix, relative_error

import deqjax

RESULTS = deqjax.RESULTS
EXACT = deqjax.Reversible(0.0, 0.0, beta=0.8)
FLOAT = deqjax.Reversible(0.0, 0.0, beta=0.8, exact=False)
MINE, STORED = deqjax.ReversibleAdjoint(), deqjax.RecursiveCheckpointAdjoint()
W = jnp.asarray(matrix(3, 0.9, 0), jnp.float32)
XS = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3)), jnp.float32)
tanh = lambda z, a: jnp.tanh(a[0] @ z + a[1])
each = pytest.mark.parametrize("solver", [EXACT, FLOAT], ids=["exact", "float"])


def solve(fn, z0, args, solver=EXACT, adjoint=MINE, max_steps=9, **kwargs):
    options = dict(max_steps=max_steps, adjoint=adjoint) | kwargs
    return deqjax.fixed_point(fn, solver, z0, args, **options)


@each
@pytest.mark.parametrize("steps", [[1, 5], [1, 5, 7]])
def test_vmap_over_steps_and_a_batch(solver, steps):
    """Budgets belong to the outer axis, also where it is as long as the batch."""
    steps = jnp.asarray(steps)

    def loss(w, adjoint, solver, inner):
        def one(n, x):
            return jnp.sum(
                jnp.sin(solve(tanh, jnp.zeros(3), (w, x), solver, adjoint, steps=n).value)
            )

        def batch(n):
            if not inner:
                rows = lambda z, _: jnp.tanh(z @ w.T + XS[:2])
                sol = solve(rows, XS[:2] * 0, None, solver, adjoint, steps=n, batched=True)
                return jnp.sum(jnp.sin(sol.value))
            return jnp.sum(jax.vmap(one, (None, 0))(n, XS[:2]))

        return jnp.sum(jax.vmap(batch)(steps) * jnp.arange(1.0, len(steps) + 1))

    truth = jax.value_and_grad(loss)(W, STORED, FLOAT, True)
    for inner in (True, False):
        assert relative_error(jax.value_and_grad(loss)(W, MINE, solver, inner), truth) < 1e-5


@each
def test_jacobian_of_one_leaf(solver):
    fn = lambda z, b: {"p": jnp.cos(z["p"]) / 2 + b, "q": jnp.sin(z["p"])}
    z0 = {"p": jnp.zeros(2), "q": jnp.zeros(2)}
    value = lambda b, s, a: solve(fn, z0, b, s, a, max_steps=4).value["p"]
    got = jax.jacrev(value)(jnp.ones(2), solver, MINE)
    assert relative_error(got, jax.jacrev(value)(jnp.ones(2), FLOAT, STORED)) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e3, 3e38])
@pytest.mark.parametrize("where", ["z0", "f"])
@pytest.mark.parametrize("door", [deqjax, optimistix])
def test_what_no_integer_can_hold_is_never_successful(bad, where, door):
    z0, b = (bad, 1.0) if where == "z0" else (0.0, bad)
    fn = lambda z, b: 0.5 * jnp.cos(z) + b
    z0, b = jnp.float32(z0), jnp.float32(b)

    def run(z0, b, solver):
        options = dict(max_steps=20, adjoint=MINE, throw=False)
        return door.fixed_point(fn, solver, z0, b, **options)

    assert run(z0, b, deqjax.Reversible(1e-4, 1e-4, beta=1.2)).result != RESULTS.successful
    if door is deqjax:
        fixed = deqjax.Reversible(0.0, 0.0, beta=1.2)
        sol = run(z0, b, fixed)
        finite = np.isfinite(bad)
        assert sol.stats["overflow"] == finite
        assert sol.result == (RESULTS.nonlinear_divergence if finite else RESULTS.nonfinite)
        _, stats = deqjax.reversible_vjp(fn, fixed, z0, b, jnp.float32(1), max_steps=20)
        assert not stats["trusted"]
        grads = jax.grad(lambda z0, b: run(z0, b, fixed).value, (0, 1))(z0, b)
        assert np.all(np.isnan(grads))


@pytest.mark.parametrize("batched", [False, True])
def test_a_masked_overflow_spoils_nothing(batched):
    """And without the mask only what is its own, and what all share."""
    xs = XS.at[1].set(1e3)
    fn = lambda z, a: 0.5 * a[0] @ z + a[1]

    def values(w, xs, adjoint):
        if batched:
            many = lambda z, a: 0.5 * z @ a[0].T + a[1]
            sol = solve(many, XS * 0, (w, xs), adjoint=adjoint, batched=True)
            return sol.value, jax.vmap(lambda r: r == RESULTS.successful)(sol.result)
        sol = jax.vmap(lambda x: solve(fn, jnp.zeros(3), (w, x), adjoint=adjoint))(xs)
        return sol.value, jax.vmap(lambda r: r == RESULTS.successful)(sol.result)

    def masked(w, xs, adjoint):
        value, good = values(w, xs, adjoint)
        return jnp.sum(jnp.where(good[:, None], jnp.sin(value), 0))

    grads = jax.grad(masked, (0, 1))(W, xs, MINE)
    assert np.all(grads[1][1] == 0)
    assert relative_error(grads, jax.grad(masked, (0, 1))(W, xs, STORED)) < 1e-5
    dw, dx = jax.grad(lambda w, xs: jnp.sum(values(w, xs, MINE)[0]), (0, 1))(W, xs)
    assert np.all(np.isnan(dw))
    assert np.all(np.isnan(dx[1]))
    # With batched=True it cannot be known which rows of an argument are whose.
    assert batched or np.all(np.isfinite(dx[jnp.asarray([0, 2])]))

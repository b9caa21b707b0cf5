"""`jax.experimental.checkify` is silent about a healthy solve, and tells what f itself does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from registry import slow

import deqjax
from deqjax import (
    Bracketing,
    FixedPointIteration,
    JacobianFreeAdjoint,
    PositiveConcaveSolver,
    Reversible,
    ReversibleAdjoint,
)

W = jnp.asarray([[0.3, 0.2], [0.1, 0.4]])
X = jnp.asarray([[0.5, 0.2], [1.0, 0.3]])


def fn(z, args):
    """Positive concave."""
    return jnp.tanh(z @ args[0].T + args[1])


def solution(x):
    z, w = np.zeros(2), np.asarray(W, float)
    for _ in range(99):
        z = np.tanh(w @ z + np.asarray(x, float))
    return jnp.asarray(z, jnp.float32)


def told(call, *args) -> str | None:
    error, _ = jax.jit(checkify.checkify(call, errors=checkify.float_checks))(*args)
    return error.get()


# With tolerances that are traced, of 0 and above, or that are known to be 0.
TRACED = {
    "implicit": (FixedPointIteration, deqjax.ImplicitAdjoint()),
    "phantom": (FixedPointIteration, deqjax.PhantomAdjoint()),
    "neumann": (FixedPointIteration, deqjax.NeumannPhantomAdjoint()),
    "checkpoint": (FixedPointIteration, deqjax.RecursiveCheckpointAdjoint()),
    "concave": (FixedPointIteration, deqjax.PositiveConcaveAdjoint()),
    "anderson": (deqjax.Anderson, JacobianFreeAdjoint()),
    "broyden": (deqjax.Broyden, deqjax.BroydenAdjoint()),
    "reversible": (Reversible, ReversibleAdjoint()),
    "reversible-float": (lambda *tol: Reversible(*tol, exact=False), ReversibleAdjoint()),
    "bracketing": (Bracketing, JacobianFreeAdjoint()),
    "certified": (PositiveConcaveSolver, JacobianFreeAdjoint()),
}
KNOWN = ["implicit", "reversible", "reversible-float"]
MORE = ["neumann", "bracketing", "reversible-float"]
CASES = [(name, False) for name in TRACED] + [(name, True) for name in KNOWN[1:]]
CASES = [case if case[0] not in MORE else slow(*case) for case in CASES] + [slow(KNOWN[0], True)]


@pytest.mark.parametrize("name, known", CASES)
def test_silent_where_nothing_is_wrong(name, known):
    """One problem starts at 0; the other at its solution, and its cotangent is 0."""
    make, adjoint = TRACED[name]
    z0 = jnp.stack([jnp.zeros(2), solution(X[1])])

    def loss(args, tol, steps):
        solver = make(0.0, 0.0) if known else make(tol, tol)
        options = dict(batched=True, max_steps=20, steps=steps, adjoint=adjoint)
        sol = deqjax.fixed_point(fn, solver, z0, args, **options)
        return jnp.sum(sol.value[0] ** 2), sol.stats

    grad = jax.value_and_grad(loss, has_aux=True)
    for tol, steps in [(1e-4, 20), (1e-4, 2), (0.0, 20)]:
        assert told(grad, (W, X), jnp.float32(tol), jnp.asarray(steps)) is None


def test_silent_where_the_solution_is_zero():
    """And the tolerance relative, and the residual infinite at first."""

    def value(z0):
        solver = FixedPointIteration(1e-3, 0.0, damp=0.5)
        sol = deqjax.fixed_point(lambda z, _: 0 * z, solver, z0, max_steps=3)
        return sol.value, sol.stats["residual"]

    assert told(value, jnp.ones(2)) is None


def test_silent_certificates():
    """From a good point, a poor one and none."""
    enclose = lambda z: deqjax.positive.certify(fn, z, (W, X), batched=True)
    for z in (jnp.stack([solution(x) for x in X]), jnp.ones((2, 2)), jnp.zeros((2, 2))):
        assert told(enclose, z) is None
    assert told(lambda x: deqjax.positive.check_hypotheses(
        lambda z, x: jnp.tanh(W @ z + x), x, key=jax.random.key(0), samples=4
    ).exists.violation, X[0]) is None  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize(
    "wrong, tells", [(lambda z: jnp.log(z - 2), "nan"), (lambda z: z / (z - z), "division by zero")]
)
def test_what_f_does_is_told(name, wrong, tells):
    """Checkify does not look into a loop that records; it meets what that has left at its end."""
    make, adjoint = TRACED[name]
    value = lambda z0: deqjax.fixed_point(
        lambda z, _: wrong(z), make(0.0, 0.0), z0, max_steps=3, adjoint=adjoint
    ).value  # fmt: skip
    tells = tells if name == "implicit" else "nan"
    assert tells in str(told(lambda z0: jax.vjp(value, z0), jnp.ones(2)))

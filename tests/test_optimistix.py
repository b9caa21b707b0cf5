"""Both front doors: deqjax solvers and adjoints in Optimistix, Optimistix's in deqjax."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from problems import pytree, relative_error, tanh
from registry import cases

import deqjax

pytestmark = pytest.mark.x64


def make():
    return tanh(6, 0.8, dtype=np.float64)


def loss(z, g):
    return sum(jax.tree.leaves(jax.tree.map(lambda z, g: jnp.sum(z * g), z, g)))


def optimistix_value(p, args, solver, adjoint, max_steps=400):
    return optimistix.fixed_point(
        p.fn, solver, p.z0, args, adjoint=adjoint, max_steps=max_steps, throw=False
    ).value


@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_reversible_in_optimistix_at_a_fixed_depth(beta):
    """The same value and gradient through either door, to the last bits."""
    p, n = make(), 8
    solver, adjoint = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta), deqjax.ReversibleAdjoint()

    def ours(args):
        return deqjax.fixed_point(p.fn, solver, p.z0, args, max_steps=n, adjoint=adjoint).value

    theirs = lambda args: optimistix_value(p, args, solver, adjoint, n)
    np.testing.assert_allclose(ours(p.args), theirs(p.args), rtol=2e-15)
    grad = lambda f: jax.grad(lambda args: loss(f(args), p.cotangent))(p.args)
    assert relative_error(grad(theirs), grad(ours)) < 1e-14


ADJOINTS = {
    "implicit": deqjax.ImplicitAdjoint(),
    "positive-concave": deqjax.PositiveConcaveAdjoint(),
    "checkpointed": deqjax.RecursiveCheckpointAdjoint(),
    "their-implicit": optimistix.ImplicitAdjoint(),
}
SOLVERS = {
    "picard": deqjax.FixedPointIteration(1e-12, 1e-12),
    "anderson": deqjax.Anderson(1e-12, 1e-12, depth=3),
    "broyden": deqjax.Broyden(1e-12, 1e-12, depth=4),
    "reversible": deqjax.Reversible(1e-12, 1e-12, beta=0.7, exact=False),
    "their-picard": optimistix.FixedPointIteration(1e-12, 1e-12),
    "their-newton": optimistix.Newton(1e-12, 1e-12),
}


@pytest.mark.parametrize("adjoint", cases(ADJOINTS))
@pytest.mark.parametrize("solver", cases(SOLVERS, "anderson", "reversible", "their-picard"))
def test_every_pair_in_both_doors(solver, adjoint):
    for p in (pytree(0.6, dtype=np.float64),):
        ours = lambda args, p=p: (
            deqjax.fixed_point(p.fn, solver, p.z0, args, max_steps=400, adjoint=adjoint).value
        )
        theirs = lambda args, p=p: optimistix_value(p, args, solver, adjoint)
        for door in (ours, theirs):
            grad = jax.jit(jax.grad(lambda a, door=door, p=p: loss(door(a), p.cotangent)))(p.args)
            assert relative_error(grad, p.gradient) < 1e-9


def test_aux_and_steps_through_optimistix_door():
    """Optimistix steps once more after the test; its aux is of the iterate before."""
    fn = lambda z, b: (0.5 * z + b, z)
    solver = deqjax.FixedPointIteration(1e-6, 1e-6)
    ours = deqjax.fixed_point(fn, solver, 0.0, 1.0, has_aux=True)
    theirs = optimistix.fixed_point(fn, solver, 0.0, 1.0, has_aux=True)
    assert theirs.result == optimistix.RESULTS.successful
    assert theirs.stats["num_steps"] == ours.stats["num_steps"] + 1
    assert ours.aux == ours.value == theirs.aux
    assert theirs.value == 0.5 * ours.value + 1


@pytest.mark.parametrize(
    "solver", [optimistix.LevenbergMarquardt(1e-9, 1e-9), optimistix.Dogleg(1e-9, 1e-9)]
)
def test_minimisers_have_the_implicit_gradient(solver):
    p = make()
    value = lambda args: deqjax.fixed_point(p.fn, solver, p.z0, args, max_steps=20).value
    grad = jax.jit(jax.grad(lambda args: loss(value(args), p.cotangent)))(p.args)
    assert relative_error(grad, p.gradient) < 1e-6


def test_failures_through_optimistix_door():
    fn = lambda z, b: 3 * z + b
    sol = optimistix.fixed_point(fn, deqjax.FixedPointIteration(), 0.0, 1.0, throw=False)
    # sqrt(largest float64) is 1.3e154 = 3^323: the cap comes first.
    assert sol.result == optimistix.RESULTS.nonlinear_max_steps_reached
    options = dict(throw=False, max_steps=1000)
    sol = optimistix.fixed_point(fn, deqjax.FixedPointIteration(), 0.0, 1.0, **options)
    assert sol.result == optimistix.RESULTS.nonlinear_divergence
    with pytest.raises(ValueError, match="expects the solver deqjax.Reversible"):
        optimistix.fixed_point(
            fn, deqjax.FixedPointIteration(), 0.0, 1.0, adjoint=deqjax.ReversibleAdjoint()
        )


def test_optimistix_statistics_are_not_differentiated_in_silence():
    p = make()

    def aux_of(args):
        fn = lambda z, a: (p.fn(z, a), jnp.sum(z))
        adjoint = deqjax.ImplicitAdjoint()
        solver = deqjax.FixedPointIteration()
        return optimistix.fixed_point(fn, solver, p.z0, args, has_aux=True, adjoint=adjoint).aux

    with pytest.raises(RuntimeError, match="cannot be reverse-mode"):
        jax.grad(lambda args: aux_of(args))(p.args)


def test_with_their_solvers_fn_is_traced_once_a_call():
    count = 0

    def fn(z, b):
        nonlocal count
        count += 1
        return jnp.cos(z) + b

    solve = lambda b: deqjax.fixed_point(fn, optimistix.Newton(1e-6, 1e-6), jnp.zeros(2), b)
    solve(jnp.asarray(0.1))
    assert count == 1
    solve(jnp.asarray(0.2))
    assert count == 2

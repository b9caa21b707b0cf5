"""Every solver on every family of problems, in both front doors: values, and implicit gradients.

A relative residual r leaves an error of at most cond(I - J) r; the gradient is made at that point,
and passes through (I - J)^-1 once more. What has a contraction in it gets contractions only.
"""

import functools as ft

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from dense import affine, curved, flat, tree
from problems import relative_error

import deqjax

FAMILIES = {
    name: ft.cache(make) for name, make in dict(affine=affine, curved=curved, tree=tree).items()
}
# What needs rho(J) < 1, or an eigenvalue below 1 in the real part.
CONTRACTIVE = ("picard", "damped", "reversible", "reversible-exact", "their-picard", "best-picard")


def solvers(tol):
    krylov = lineax.GMRES(tol / 10, tol / 10)
    return {
        "picard": deqjax.FixedPointIteration(tol, tol),
        "damped": deqjax.FixedPointIteration(tol, tol, damp=0.2),
        "anderson": deqjax.Anderson(tol, tol, depth=10),
        "anderson-mixed": deqjax.Anderson(tol, tol, depth=10, mixing=0.7),
        "broyden": deqjax.Broyden(tol, tol),
        "broyden-search": deqjax.Broyden(tol, tol, line_search=True),
        "reversible": deqjax.Reversible(tol, tol, beta=0.8, exact=False),
        "reversible-exact": deqjax.Reversible(tol, tol, beta=0.75),
        "their-picard": optimistix.FixedPointIteration(tol, tol),
        "newton": optimistix.Newton(tol, tol),
        "newton-krylov": optimistix.Newton(tol, tol, linear_solver=krylov),
        "chord": optimistix.Chord(tol, tol),
        "levenberg-marquardt": optimistix.LevenbergMarquardt(tol, tol),
        "dogleg": optimistix.Dogleg(tol, tol),
        "best-picard": optimistix.BestSoFarFixedPoint(optimistix.FixedPointIteration(tol, tol)),
        "best-newton": optimistix.BestSoFarRootFinder(optimistix.Newton(tol, tol)),
    }


def gradient(door, fn, solver, adjoint, max_steps=3000):
    """`(z0, args, g) -> (solution, dL/dargs)`, compiled once for a family."""
    options = dict(max_steps=max_steps, adjoint=adjoint, throw=False)

    @jax.jit
    def run(z0, args, g):
        def loss(args):
            sol = door(fn, solver, z0, args, **options)
            return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(sol.value))), sol

        (_, sol), grad = jax.value_and_grad(loss, has_aux=True)(args)
        return (sol.value, sol.result), grad

    return run


def check(door, name, tol, dtype, family, limit=np.inf):
    # 24 fraction bits resolve no less.
    tol = max(tol, 1e-6) if name == "reversible-exact" else tol
    solver = solvers(tol)[name]
    cases = FAMILIES[family]()
    if name in CONTRACTIVE:
        cases = [d for d in cases if d.problem.rho < 0.995]
    if name == "chord":  # I - J is singular at z0 = 0
        cases = [d for d in cases if "W >= 0" not in d.problem.name]
    cases = [d for d in cases if d.condition < limit]
    assert cases
    run = gradient(door, cases[0].problem.fn, solver, deqjax.ImplicitAdjoint(tol=tol / 10))
    for d in cases:
        p = d.problem.astype(dtype)
        g = jax.tree.map(lambda x: jnp.asarray(x, dtype), d.g)
        (value, result), grad = run(p.z0, p.args, g)
        assert result == deqjax.RESULTS.successful, d.problem.name
        error = np.linalg.norm(flat(value) - flat(p.solution)) / np.linalg.norm(flat(p.solution))
        slack = 10 * tol * d.condition
        assert error < slack, (d.problem.name, error, slack)
        error = relative_error(grad, d.implicit())
        assert error < slack * d.condition, (d.problem.name, error, slack * d.condition)


@pytest.mark.x64
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", solvers(1.0))
def test_float64(name, family):
    check(deqjax.fixed_point, name, 1e-10, jnp.float64, family)


@pytest.mark.x64
@pytest.mark.parametrize("name", solvers(1.0))
def test_through_the_door_of_optimistix(name):
    check(optimistix.fixed_point, name, 1e-10, jnp.float64, "tree")


@pytest.mark.parametrize("name", solvers(1.0))
def test_float32(name):
    check(deqjax.fixed_point, name, 1e-5, jnp.float32, "curved", limit=20)

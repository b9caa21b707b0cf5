"""The demands of the conformance suite on a solver."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import registry
from dense import affine, curved, flat, tree
from problems import relative_error

import deqjax

FAMILIES = {
    name: ft.cache(make) for name, make in dict(affine=affine, curved=curved, tree=tree).items()
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
    solver = registry.SOLVERS[name](tol)
    cases = FAMILIES[family]()
    if name in registry.CONTRACTIVE:
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

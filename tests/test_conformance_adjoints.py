"""Every adjoint against its own closed form, with the solvers that it goes with."""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from dense import affine, curved, flat, tree
from problems import relative_error
from registry import names, slow

import deqjax

ANDERSON = deqjax.Anderson(1e-12, 1e-12, depth=10)
BROYDEN = deqjax.Broyden(1e-12, 1e-12)
LINEAR = {
    "default": None,
    "picard": deqjax.FixedPointIteration(1e-11),
    "anderson": deqjax.Anderson(1e-11, depth=10),
    "broyden": deqjax.Broyden(1e-11),
    "gmres": lineax.GMRES(1e-12, 1e-12),
    "bicgstab": lineax.BiCGStab(1e-12, 1e-12),
    "lu": lineax.AutoLinearSolver(well_posed=None),
}
PHANTOMS = {
    "phantom": (deqjax.PhantomAdjoint(), (5, 0.5)),
    "phantom-3": (deqjax.PhantomAdjoint(steps=3, damp=0.2), (3, 0.2)),
    "neumann-phantom": (deqjax.NeumannPhantomAdjoint(), (5, 0.5)),
    "neumann-phantom-3": (deqjax.NeumannPhantomAdjoint(steps=3, damp=0.2), (3, 0.2)),
    "jacobian-free": (deqjax.JacobianFreeAdjoint(), (1, 0.0)),
    "one-plain-step": (deqjax.PhantomAdjoint(steps=1, damp=0.0), (1, 0.0)),
}
DOORS = {"ours": deqjax.fixed_point, "theirs": optimistix.fixed_point}


def gradient(fn, solver, adjoint, door=deqjax.fixed_point, max_steps=2000):
    """`(z0, args, g) -> dL/dargs` of `L = <g, z>`."""
    options = dict(max_steps=max_steps, adjoint=adjoint, throw=False)

    def loss(args, z0, g):
        value = door(fn, solver, z0, args, **options).value
        return sum(map(jnp.vdot, jax.tree.leaves(g), jax.tree.leaves(value)))

    return jax.jit(lambda z0, args, g: jax.grad(loss)(args, z0, g))


def inputs(d, dtype=jnp.float64):
    p = d.problem.astype(dtype)
    return p.z0, p.args, jax.tree.map(lambda x: jnp.asarray(x, dtype), d.g)


@pytest.mark.x64
@pytest.mark.parametrize("linear", LINEAR)
def test_every_linear_solver(linear):
    """On spectra up to 0.99, and up to 1.2 off the real axis, where the series diverges."""
    adjoint = deqjax.ImplicitAdjoint(LINEAR[linear])
    cases = [d for d in affine() if linear != "picard" or d.problem.picard]
    run = gradient(cases[0].problem.fn, ANDERSON, adjoint)
    for d in cases:
        error = relative_error(run(*inputs(d)), d.implicit())
        assert error < 1e-10 * d.condition, d.problem.name


@pytest.mark.x64
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", PHANTOMS)
def test_phantoms_are_partial_sums(name, door):
    """Exactly so at a fixed point: `(1 - damp) sum_k B^k`."""
    adjoint, closed = PHANTOMS[name]
    cases = curved() if door == "ours" else tree()
    run = gradient(cases[0].problem.fn, ANDERSON, adjoint, DOORS[door])
    for d in cases:
        assert relative_error(run(*inputs(d)), d.phantom(*closed)) < 1e-10 * d.condition
        # And no implicit gradient: the test could tell.
        assert relative_error(d.phantom(*closed), d.implicit()) > 1e-3


@pytest.mark.x64
@pytest.mark.parametrize("solver", ["newton", "picard", "minimiser"])
@pytest.mark.parametrize("name", ["phantom", "neumann-phantom", "jacobian-free"])
def test_phantoms_of_the_solvers_of_optimistix(name, solver):
    """A phantom gradient of f, though a minimiser works on the gradient of `||f(z) - z||^2`."""
    solver = {
        "newton": optimistix.Newton(1e-11, 1e-11),
        "picard": optimistix.FixedPointIteration(1e-11, 1e-11),
        "minimiser": optimistix.LevenbergMarquardt(1e-11, 1e-11),
    }[solver]
    adjoint, closed = PHANTOMS[name]
    (d,) = tree()
    run = gradient(d.problem.fn, solver, adjoint)
    assert relative_error(run(*inputs(d)), d.phantom(*closed)) < 1e-9 * d.condition


@pytest.mark.x64
def test_a_phantom_misses_the_gradient_by_its_first_term_left_out():
    """With A normal: by `rho(B)^steps` of it, and by nothing else."""
    d = affine()[1]
    errors = [relative_error(d.phantom(k, 0.5), d.implicit()) for k in (20, 40)]
    rho = 0.5 + 0.5 * d.problem.rho
    assert np.isclose(errors[1] / errors[0], rho**20, rtol=0.1)
    run = gradient(d.problem.fn, ANDERSON, deqjax.NeumannPhantomAdjoint(steps=40))
    assert np.isclose(relative_error(run(*inputs(d)), d.implicit()), errors[1], rtol=1e-6)


def test_phantoms_away_from_a_fixed_point():
    """Unrolled steps go on from where the solve stopped; the series stays there."""
    fn, steps = lambda z, b: jnp.cos(z + b), 3
    solver = deqjax.FixedPointIteration(rtol=0.0, atol=0.0)
    run = lambda adjoint: jax.grad(
        lambda b: deqjax.fixed_point(fn, solver, 0.5, b, max_steps=1, adjoint=adjoint).value
    )(0.2)
    z = slope = jnp.cos(0.7)
    held = -jnp.sin(z + 0.2)
    unrolled, series = 0.0, 0.0
    for _ in range(steps):
        slope = -jnp.sin(z + 0.2)
        unrolled = 0.5 * unrolled + 0.5 * slope * (1 + unrolled)
        z = 0.5 * z + 0.5 * jnp.cos(z + 0.2)
        series = 0.5 * series + 0.5 * held * (1 + series)
    options = dict(steps=steps, damp=0.5)
    np.testing.assert_allclose(run(deqjax.PhantomAdjoint(**options)), unrolled, rtol=1e-5)
    np.testing.assert_allclose(run(deqjax.NeumannPhantomAdjoint(**options)), series, rtol=1e-5)
    np.testing.assert_allclose(run(deqjax.JacobianFreeAdjoint()), held, rtol=1e-5)
    assert abs(unrolled - series) > 1e-2


@pytest.mark.parametrize("kind", [deqjax.PhantomAdjoint, deqjax.NeumannPhantomAdjoint])
def test_fields_of_phantoms(kind):
    for bad in (dict(steps=0), dict(steps=True), dict(steps=2.0), dict(damp=1.0), dict(damp=-0.1)):
        with pytest.raises(ValueError, match=f"^{kind.__name__} expects"):
            kind(**bad)


@pytest.mark.x64
@pytest.mark.parametrize("door", names(DOORS, "theirs"))
@pytest.mark.parametrize("solver", ["anderson", "broyden", "damped", "reversible", "exact"])
def test_checkpointed_steps_converge_to_the_implicit_gradient(solver, door):
    """The derivative of the iterates, of every solver of ours."""
    solver = {
        "anderson": deqjax.Anderson(1e-11, 1e-11, depth=3),
        "broyden": deqjax.Broyden(1e-11, 1e-11, depth=4),
        "damped": deqjax.FixedPointIteration(1e-11, 1e-11, damp=0.1),
        "reversible": deqjax.Reversible(1e-11, 1e-11, beta=0.8, exact=False),
        "exact": deqjax.Reversible(1e-6, 1e-6, beta=0.75),
    }[solver]
    (d,) = tree()
    adjoint = deqjax.RecursiveCheckpointAdjoint()
    run = gradient(d.problem.fn, solver, adjoint, DOORS[door], max_steps=256)
    assert relative_error(run(*inputs(d)), d.implicit()) < 1e3 * solver.rtol * d.condition


@pytest.mark.x64
@pytest.mark.parametrize("exact", [False, True])
def test_reversed_steps_converge_to_the_implicit_gradient(exact):
    tol = 1e-6 if exact else 1e-11
    solver = deqjax.Reversible(tol, tol, beta=0.75, exact=exact)
    (d,) = tree()
    run = gradient(d.problem.fn, solver, deqjax.ReversibleAdjoint(), max_steps=256)
    assert relative_error(run(*inputs(d)), d.implicit()) < 1e3 * tol * d.condition


@pytest.mark.x64
@pytest.mark.parametrize("door", DOORS)
def test_shine(door):
    """Near the implicit gradient as it comes, and at `tol` if asked: the series goes on from it."""
    cases = affine()[:5] if door == "ours" else tree()
    args = (cases[0].problem.fn, deqjax.Broyden(1e-12, 1e-12, depth=16))
    loose = gradient(*args, deqjax.BroydenAdjoint(tol=0.1), DOORS[door])
    tight = gradient(*args, deqjax.BroydenAdjoint(tol=1e-10), DOORS[door])
    for d in cases:
        # A relative residual of 0.1 is an error of at most cond(I - J) of that.
        assert relative_error(loose(*inputs(d)), d.implicit()) < 0.1 * d.condition
        assert relative_error(tight(*inputs(d)), d.implicit()) < 1e-9 * d.condition


def test_shine_of_a_solve_without_steps():
    """B is -I: the Jacobian-free gradient, kept if that is good enough and improved if not."""
    a, g = jnp.asarray([0.5, -0.4]), jnp.asarray([1.0, 2.0])
    fn, at = lambda z, b: a * z + b, 1 / (1 - a)
    run = lambda tol: jax.grad(
        lambda b: jnp.vdot(
            deqjax.fixed_point(
                fn, deqjax.Broyden(1e-4, 1e-4), at, b, adjoint=deqjax.BroydenAdjoint(tol=tol)
            ).value,
            g,
        )
    )(jnp.ones(2))
    np.testing.assert_allclose(run(0.9), g, rtol=1e-6)
    np.testing.assert_allclose(run(1e-6), g / (1 - a), rtol=1e-5)


def test_shine_needs_broyden():
    solve = lambda b: (
        deqjax.fixed_point(
            lambda z, b: z / 2 + b, deqjax.Anderson(), 0.0, b, adjoint=deqjax.BroydenAdjoint()
        ).value
    )
    with pytest.raises(ValueError, match="expects the solver deqjax.Broyden, got Anderson"):
        jax.grad(solve)(1.0)
    for bad in (dict(tol=0.0), dict(tol=None, on_failure="no"), dict(max_steps=0)):
        with pytest.raises(ValueError, match="^BroydenAdjoint expects"):
            deqjax.BroydenAdjoint(**bad)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, slow(jnp.float16)])
@pytest.mark.parametrize("solver", [deqjax.Anderson, deqjax.Broyden])
def test_low_precision(solver, dtype):
    eps = float(jnp.finfo(dtype).eps)
    tol = 10 * eps
    adjoints = [deqjax.ImplicitAdjoint(), deqjax.NeumannPhantomAdjoint()]
    if solver is deqjax.Broyden:
        adjoints.append(deqjax.BroydenAdjoint(tol=max(0.01, 4 * eps)))
    d = curved()[0]
    for adjoint in adjoints:
        grad = gradient(d.problem.fn, solver(tol, tol), adjoint)(*inputs(d, dtype))
        assert all(x.dtype == dtype for x in jax.tree.leaves(grad))
        truth = d.implicit() if adjoint not in adjoints[1:2] else d.phantom(5, 0.5)
        error = np.linalg.norm(flat(grad) - flat(truth)) / np.linalg.norm(flat(truth))
        assert error < max(10 * tol, getattr(adjoint, "tol", 0) or 0) * d.condition

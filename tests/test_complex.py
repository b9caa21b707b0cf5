"""A complex state against its real twin of twice the dimension: values, and gradients both ways.

JAX's cotangent a + ib of a number x + iy pairs with its tangent as a dx - b dy, so that the twin's
cotangents are a and -b. f is linear over the reals alone at every point: it conjugates, and takes
moduli and real parts.
"""

import dataclasses
import functools as ft

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from registry import names

import deqjax
from deqjax import RESULTS

PICARD = deqjax.FixedPointIteration(0.0, 0.0)
ANDERSON = deqjax.Anderson(0.0, 0.0, depth=3)
BROYDEN = deqjax.Broyden(0.0, 0.0)
REVERSIBLE = deqjax.Reversible(0.0, 0.0, beta=0.7, exact=False)
IMPLICIT = deqjax.ImplicitAdjoint(tol=1e-13)
LINEAR = {
    "picard": deqjax.FixedPointIteration(1e-13),
    "anderson": deqjax.Anderson(1e-13),
    "broyden": deqjax.Broyden(1e-13),
    "gmres": lineax.GMRES(1e-13, 1e-13),
    "lu": lineax.LU(),
}
WAYS = {
    "picard": (PICARD, IMPLICIT),
    "damped": (deqjax.FixedPointIteration(0.0, 0.0, damp=0.1), deqjax.JacobianFreeAdjoint()),
    "anderson": (ANDERSON, IMPLICIT),
    "anderson-mixed": (deqjax.Anderson(0.0, 0.0, mixing=0.8), deqjax.PhantomAdjoint(steps=3)),
    "broyden": (BROYDEN, IMPLICIT),
    "broyden-search": (
        deqjax.Broyden(0.0, 0.0, line_search=True),
        deqjax.NeumannPhantomAdjoint(steps=3),
    ),
    "broyden-inverse": (BROYDEN, deqjax.BroydenAdjoint(tol=1e-3)),
    "checkpoint": (PICARD, deqjax.RecursiveCheckpointAdjoint()),
    "reversible": (REVERSIBLE, deqjax.ReversibleAdjoint()),
    "reversible-checkpoint": (REVERSIBLE, deqjax.RecursiveCheckpointAdjoint()),
}
WAYS |= {f"linear-{k}": (PICARD, deqjax.ImplicitAdjoint(s, tol=None)) for k, s in LINEAR.items()}
# The implicit gradient to rounding, and no approximation.
EXACT = [k for k, (_, adjoint) in WAYS.items() if isinstance(adjoint, deqjax.ImplicitAdjoint)]
STEPS = 40


def cell(z, args):
    """Contracts by about 0.5, from a complex and a real leaf to themselves."""
    w, v, c = args
    bend = jax.lax.complex(z["b"].sum() * jnp.ones(3, z["b"].dtype), jnp.abs(z["a"]))
    a = w @ z["a"] + 0.2 * jnp.conj(z["a"]) + 0.1 * bend
    b = jnp.tanh(v * z["b"] + jnp.real(z["a"][:2]) / 5 + jnp.abs(c).sum())
    return {"a": 0.5 * a + c, "b": 0.5 * b}


def problem(dtype=jnp.complex128, batch=()):
    rng = np.random.default_rng(1)
    real = jnp.finfo(dtype).dtype
    draw = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    w = draw(3, 3)
    args = (
        jnp.asarray(w / np.linalg.norm(w, 2) / 2, dtype),
        jnp.asarray(rng.standard_normal(2) / 2, real),
        jnp.asarray(draw(*batch, 3) / 3, dtype),
    )
    like = lambda scale: {
        "a": jnp.asarray(scale * draw(*batch, 3), dtype),
        "b": jnp.asarray(scale * draw(*batch, 2).real, real),
    }
    tangent = [draw(*x.shape) if jnp.iscomplexobj(x) else draw(*x.shape).real for x in args]
    tangent = tuple(jnp.asarray(t, x.dtype) for t, x in zip(tangent, args, strict=True))
    return args, like(0.1), like(1.0), tangent


def real(tree):
    return jax.tree.map(lambda x: (x.real, x.imag) if jnp.iscomplexobj(x) else x, tree)


def joined(tree, like):
    leaf = lambda like, x: jax.lax.complex(*x) if jnp.iscomplexobj(like) else x
    return jax.tree.map(leaf, like, tree)


def conjugate(tree):
    return jax.tree.map(jnp.conj, tree)


def differentiated(fn, way):
    """`(z0, args, g, t) -> (value, cotangents of args for g, tangent for t)`."""
    solver, adjoint = WAYS[way]
    options = dict(adjoint=adjoint, max_steps=STEPS)

    def run(z0, args, g, t):
        solve = lambda args: deqjax.fixed_point(fn, solver, z0, args, **options).value
        value, pull = jax.vjp(solve, args)
        return value, pull(g)[0], jax.jvp(solve, (args,), (t,))[1]

    return jax.jit(run)


def twin(z0, args):
    """The same problem in real numbers alone."""
    return lambda x, p: real(cell(joined(x, z0), joined(p, args)))


def close(a, b, tol):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


@ft.cache
def reference():
    """Value, cotangents and tangent by Newton's method and dense solves, in NumPy."""
    args, z0, g, t = problem()
    flat, back = jax.flatten_util.ravel_pytree(real(z0))
    params, unravel = jax.flatten_util.ravel_pytree(real(args))
    f = jax.jit(lambda x, p: jax.flatten_util.ravel_pytree(twin(z0, args)(back(x), unravel(p)))[0])
    in_x, in_p = jax.jit(jax.jacobian(f)), jax.jit(jax.jacobian(f, 1))
    x = np.asarray(flat)
    for _ in range(30):
        x = x - np.linalg.solve(np.eye(x.size) - in_x(x, params), x - f(x, params))
    a = np.eye(x.size) - in_x(x, params)
    ravel = lambda tree: np.asarray(jax.flatten_util.ravel_pytree(real(tree))[0])
    pulled = np.asarray(in_p(x, params)).T @ np.linalg.solve(a.T, ravel(conjugate(g)))
    pushed = np.linalg.solve(a, np.asarray(in_p(x, params)) @ ravel(t))
    restore = lambda v: joined(back(jnp.asarray(v)), z0)
    return restore(x), conjugate(joined(unravel(jnp.asarray(pulled)), args)), restore(pushed)


@pytest.mark.x64
@pytest.mark.parametrize("way", names(WAYS, "anderson-mixed", "broyden-search", "linear-gmres"))
def test_the_real_twin(way):
    """Values, cotangents and tangents: by dense solves, or of the same solver and adjoint."""
    args, z0, g, t = problem()
    mine = differentiated(cell, way)(z0, args, g, t)
    if way in EXACT:
        close(mine, reference(), 1e-10)
        return
    run = differentiated(twin(z0, args), way)
    value, pulled, pushed = run(*map(real, (z0, args, conjugate(g), t)))
    close(mine, (joined(value, z0), conjugate(joined(pulled, args)), joined(pushed, z0)), 1e-11)


@pytest.mark.x64
@pytest.mark.parametrize("way", ["anderson", "broyden-inverse", "linear-gmres"])
@pytest.mark.filterwarnings("ignore:Complex support in Optimistix")
def test_through_the_door_of_optimistix(way):
    solver, adjoint = WAYS[way]
    args, z0, g, t = problem()
    tol = {"rtol": 1e-12, "atol": 1e-12}
    solver = type(solver)(**tol)
    solve = lambda args: optimistix.fixed_point(cell, solver, z0, args, adjoint=adjoint).value
    value, pull = jax.vjp(solve, args)
    exact, pulled, pushed = reference()
    close(value, exact, 1e-10)
    slack = 1e-10 if way != "broyden-inverse" else 0.02
    close(pull(g)[0], pulled, slack)
    close(jax.jvp(solve, (args,), (t,))[1], pushed, slack)


@pytest.mark.parametrize("way", ["anderson", "broyden", "reversible"])
def test_single_precision(way):
    solver, adjoint = WAYS[way]
    tol = {} if way == "reversible" else {"tol": 1e-6}
    args, z0, g, _ = problem(jnp.complex64)
    solver = dataclasses.replace(solver, rtol=1e-6, atol=1e-6)
    adjoint = dataclasses.replace(adjoint, **tol)

    def solve(args):
        sol = deqjax.fixed_point(cell, solver, z0, args, adjoint=adjoint)
        return sol.value, (sol.result, sol.stats)

    value, pull, (result, stats) = jax.vjp(solve, args, has_aux=True)
    assert result == RESULTS.successful
    assert stats["residual"].dtype == jnp.float32
    with jax.enable_x64(True):
        exact = reference()
    compare = ft.partial(jax.tree.map, ft.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5))
    compare(value, exact[0])
    compare(pull(g)[0], exact[1])


def half(z, b):
    return z / 2 + b


@pytest.mark.parametrize("linear", [None, "anderson", "gmres"])
def test_a_holomorphic_f(linear):
    """`z* = 2 b`, whose cotangents are `2 g`: without a conjugate, JAX's convention."""
    b, zero = jnp.asarray(1.0 + 2.0j), jnp.zeros((), jnp.complex64)
    g = jnp.asarray([1, 1j], jnp.complex64)
    solver = None if linear is None else dataclasses.replace(LINEAR[linear], rtol=1e-6)
    adjoint = deqjax.ImplicitAdjoint(solver)
    for x in g:
        (_, d), stats = deqjax.implicit_vjp(half, 2 * b, b, x, adjoint=adjoint)
        np.testing.assert_allclose(d, 2 * x, rtol=1e-5)
        np.testing.assert_allclose(stats["solution"], 2 * x, rtol=1e-5)
        assert stats["result"] == RESULTS.successful
    value = lambda b: deqjax.fixed_point(half, deqjax.Broyden(), zero, b, adjoint=adjoint).value
    pull = jax.vjp(value, b)[1]
    np.testing.assert_allclose(jnp.stack([pull(x)[0] for x in g]), 2 * g, rtol=1e-5)


@pytest.mark.x64
def test_a_warm_start_of_the_backward_solve():
    """The solution of an earlier one, of the same structure, is where no step is left to take."""
    args, _, g, _ = problem()
    z = reference()[0]
    tight = deqjax.ImplicitAdjoint(tol=1e-12)
    (_, d), stats = deqjax.implicit_vjp(cell, z, args, g, adjoint=tight)
    warm = dataclasses.replace(tight, tol=1e-9, y0=stats["solution"])
    (_, again), after = deqjax.implicit_vjp(cell, z, args, g, adjoint=warm)
    assert stats["num_steps"] > 10
    assert after["num_steps"] == 0
    close((d, again), (reference()[1],) * 2, 1e-7)


@pytest.mark.x64
def test_batches():
    """Each problem stops by itself, batched or mapped, and as it does alone."""
    solver = dataclasses.replace(ANDERSON, rtol=1e-9, atol=1e-9)
    (w, v, c), z0, _, _ = problem(batch=(3,))
    c = c * jnp.asarray([[0.01], [1.0], [3.0]], c.dtype)
    one = lambda z0, c: deqjax.fixed_point(cell, solver, z0, (w, v, c))
    many = lambda z, c: jax.vmap(lambda z, c: cell(z, (w, v, c)))(z, c)
    batch = lambda c: deqjax.fixed_point(many, solver, z0, c, batched=True)
    sol, mapped = jax.jit(batch)(c), jax.jit(jax.vmap(one))(z0, c)
    assert len(set(sol.stats["num_steps"].tolist())) > 1
    assert jnp.all(sol.stats["num_steps"] == mapped.stats["num_steps"])
    close(sol.value, mapped.value, 1e-12)
    alone = [one(jax.tree.map(lambda x, i=i: x[i], z0), c[i]).value for i in range(3)]
    close(sol.value, jax.tree.map(lambda *x: jnp.stack(x), *alone), 1e-12)
    loss = lambda z: jnp.sum(jnp.abs(z["a"]) ** 2)
    grads = jax.jit(jax.grad(lambda c: loss(batch(c).value)))(c)
    apart = jax.jit(jax.grad(lambda c: loss(jax.vmap(one)(z0, c).value)))(c)
    close(grads, apart, 1e-8)


@pytest.mark.x64
def test_the_backward_sweep_as_a_function():
    """`reversible_vjp`, and the gradient with respect to a beta that is traced."""
    args, z0, g, _ = problem()

    def run(fn, z0, args, g, beta):
        solver = lambda beta: deqjax.Reversible(0.0, 0.0, beta=beta, exact=False)
        options = dict(max_steps=9, adjoint=deqjax.ReversibleAdjoint(segment=3))
        solve = lambda beta: deqjax.fixed_point(fn, solver(beta), z0, args, **options).value
        (_, *out), stats = deqjax.reversible_vjp(fn, solver(beta), z0, args, g, **options)
        return *out, jax.vjp(solve, beta)[1](g)[0], stats["trusted"]

    beta = jnp.asarray(0.7)
    *mine, d_beta, trusted = jax.jit(ft.partial(run, cell))(z0, args, g, beta)
    theirs = jax.jit(ft.partial(run, twin(z0, args)))(*map(real, (z0, args, conjugate(g))), beta)
    assert trusted and theirs[3]
    close(mine, (conjugate(joined(theirs[0], args)), conjugate(joined(theirs[1], z0))), 1e-10)
    np.testing.assert_allclose(d_beta, theirs[2], rtol=1e-10)


REFUSED = {
    "reversible-exact": (deqjax.Reversible(), "Reversible.exact=True. expects a state of real"),
    "certified": (deqjax.PositiveConcaveSolver(), "PositiveConcaveSolver expects a state of real"),
    "known-slack": (deqjax.PositiveConcaveSolver(slack=1e-6), "an order of the states"),
    "bracketing": (deqjax.Bracketing(fan_in=3), "Bracketing expects a state of real numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Complex support in Optimistix")
def test_refused_in_words(name):
    solver, sentence = REFUSED[name]
    args = half, solver, jnp.ones(2, jnp.complex64), jnp.ones(2, jnp.complex64)
    with pytest.raises(ValueError, match=sentence):
        deqjax.fixed_point(*args)
    with pytest.raises(ValueError, match=sentence):
        optimistix.fixed_point(*args)


def test_theorems_refused_in_words():
    z = jnp.ones(2, jnp.complex64)
    with pytest.raises(ValueError, match="certify expects a state of real numbers, got complex64"):
        deqjax.certify(half, z, z)
    with pytest.raises(ValueError, match="check_hypotheses expects a state of real"):
        deqjax.positive.check_hypotheses(half, z, key=jax.random.key(0))
    adjoint = deqjax.PositiveConcaveAdjoint()
    solve = lambda z: deqjax.fixed_point(half, deqjax.Anderson(), z, z, adjoint=adjoint).value
    for ask in (
        lambda: jax.vjp(solve, z),
        lambda: deqjax.implicit_vjp(half, 2 * z, z, z, adjoint=adjoint),
    ):
        with pytest.raises(ValueError, match="PositiveConcaveAdjoint expects a state of real"):
            ask()


def test_the_jacobian_is_that_of_the_twin():
    """The Jacobian of `z -> d z + e conj(z)`: a 2 x 2 real block per entry."""
    d, e = jnp.asarray([0.5 + 0.6j, 0.1j, -0.3]), jnp.asarray([0.1, 0.2j, 0.3 + 0.1j])
    f = lambda z, _: d * z + e * jnp.conj(z)
    blocks = [
        np.array([[a.real + b.real, b.imag - a.imag], [a.imag + b.imag, a.real - b.real]])
        for a, b in zip(np.asarray(d), np.asarray(e), strict=True)
    ]
    z, key = jnp.ones(3, jnp.complex64), jax.random.key(0)
    radius = max(np.abs(np.linalg.eigvals(x)).max() for x in blocks)
    np.testing.assert_allclose(deqjax.spectral_radius(f, z, key=key).value, radius, rtol=1e-4)
    size = deqjax.jacobian_frobenius(f, z, key=key, samples=4000)
    np.testing.assert_allclose(size, sum((x**2).sum() for x in blocks), rtol=0.03)


def test_layers_and_paths():
    args, z0, _, _ = problem(jnp.complex64)
    sols = deqjax.fixed_point_path(cell, deqjax.FixedPointIteration(), z0, args, indices=(2,))
    alone = deqjax.fixed_point(cell, deqjax.Anderson(1e-6, 1e-6), z0, args)
    np.testing.assert_allclose(sols[-1].value["a"], alone.value["a"], rtol=1e-3)
    layer = deqjax.nn.DEQ(
        lambda z, x: x + 0.5j * jnp.conj(z), deqjax.Broyden(1e-6, 1e-6), deqjax.ImplicitAdjoint()
    )
    z, _ = layer.batch(args[2][None])
    np.testing.assert_allclose(z, args[2][None] + 0.5j * jnp.conj(z), rtol=1e-5, atol=1e-6)


def test_numbers_of_python():
    """A complex one stays complex, an integer is promoted to a float."""
    sol = deqjax.fixed_point(half, deqjax.Anderson(), 1j, 1.0 + 0j)
    assert sol.value.dtype == jnp.complex64
    np.testing.assert_allclose(sol.value, 2, rtol=1e-3)
    for z0 in (3, np.int8(3), jnp.asarray(3), np.uint64(3)):
        assert deqjax.fixed_point(half, deqjax.Broyden(), z0, 1.0).value.dtype == jnp.float32
        (_, d), _ = deqjax.implicit_vjp(half, z0, 1.0, jnp.asarray(1.0))
        assert d is None

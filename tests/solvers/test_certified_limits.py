"""Certified solvers where they fall short, and the precision that they ask for."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from concave import concave, relative
from registry import CERTIFIED

import deqjax
from deqjax import Bracketing, PositiveConcaveSolver

solvers = pytest.mark.parametrize("method", CERTIFIED.values(), ids=CERTIFIED)
SUCCESS = deqjax.RESULTS.successful


def solve(p, solver, max_steps=300, **kwargs):
    z0 = jnp.zeros_like(p.args[1])
    return deqjax.fixed_point(p.fn, solver, z0, p.args, batched=True, max_steps=max_steps, **kwargs)


def no_worse(sol, p):
    """All that is said is true, and no less than a certificate says of the same value."""
    bound = np.asarray(sol.stats["relative_error"])
    assert np.all(relative(sol.value, p.solution) <= bound)
    lower, upper = (np.asarray(sol.stats[k], np.float64) for k in ("lower", "upper"))
    assert np.all(lower <= p.solution) and np.all(p.solution <= upper)
    c = deqjax.certify(p.fn, sol.value, p.args, batched=True)
    # To the rounding of two programs.
    assert np.all(c.holds) and np.all(bound <= np.asarray(c.relative_error) * (1 + 1e-3))
    assert np.all(lower >= c.lower * (1 - 1e-6)) and np.all(upper <= c.upper * (1 + 1e-6))


def test_float32_says_what_it_cannot_prove():
    """Rounding over 1 - rho(J) is 1e-3 here."""
    p = concave("tanh", 1.0, 1e-4, n=80)
    sol = solve(p, PositiveConcaveSolver(rtol=1e-2, upper=1.0))
    assert np.all(sol.result == SUCCESS) and np.all(sol.stats["relative_error"] <= 1.0001e-2)
    assert np.all(relative(sol.value, p.solution) <= np.asarray(sol.stats["relative_error"]))
    sol = solve(p, PositiveConcaveSolver(rtol=1e-4, upper=1.0), max_steps=256)
    assert np.all(sol.stats["rounding_limited"])
    no_worse(sol, p)
    assert np.all(sol.result == deqjax.RESULTS.nonlinear_max_steps_reached)
    assert np.all(sol.stats["num_steps"] < 256)  # gave up
    assert np.all(relative(sol.value, p.solution) <= np.asarray(sol.stats["relative_error"]))
    assert np.max(relative(sol.value, p.solution)) < 1e-3


@solvers
@pytest.mark.parametrize("upper", [None, 1.0])
def test_more_than_float32_can_prove(method, upper):
    """Rounding, not steps, is in the way: it stops, says so, and gives what can be proved."""
    p = concave("tanh", 1.0, 0.3)
    sol = solve(p, method(rtol=1e-7, upper=upper))
    assert np.all(sol.result == deqjax.RESULTS.nonlinear_max_steps_reached)
    assert np.all(sol.stats["rounding_limited"]) and np.all(sol.stats["num_steps"] < 60)
    no_worse(sol, p)
    assert np.all(sol.stats["relative_error"] < 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@solvers
def test_products_are_of_the_highest_precision_on_every_platform(method, platform):
    """Lowered on a CPU, whose own products are exact anyway."""
    fn = lambda z, a: jnp.tanh(z @ a[0] + a[1])

    def loss(w, x):
        sol = deqjax.fixed_point(fn, method(upper=1.0), 0 * x, (w, x), batched=True)
        return jnp.sum(sol.value) + jnp.sum(sol.stats["relative_error"])

    w, x = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(w, x).mlir_module()
    products = [x for x in text.splitlines() if "stablehlo.dot_general" in x and "3x3xf32" in x]
    assert len(products) > 3 and all("[HIGHEST, HIGHEST]" in x for x in products)


@solvers
def test_steps_that_run_out(method):
    p = concave("tanh", 1.0, 0.1)
    sol = solve(p, method(upper=1.0), max_steps=3)
    assert np.all(sol.result == deqjax.RESULTS.nonlinear_max_steps_reached)
    assert np.all(relative(sol.value, p.solution) <= np.asarray(sol.stats["relative_error"]))
    free = solve(p, method(), max_steps=1)
    assert np.all(free.result == deqjax.RESULTS.nonlinear_max_steps_reached)
    assert not np.any(free.stats["rounding_limited"])
    no_worse(free, p)
    steps = jnp.array([2, 200, 300, 0])
    mixed = solve(p, method(upper=1.0), steps=steps)
    assert np.all(mixed.stats["num_steps"] <= steps)
    np.testing.assert_array_equal(mixed.result == SUCCESS, [False, True, True, False])


def test_a_function_without_forward_mode_is_still_solved():
    """It has no certificate of another kind than the solver's own."""
    sigma = jax.custom_vjp(jnp.tanh)
    sigma.defvjp(lambda u: (jnp.tanh(u), u), lambda u, g: (g / jnp.square(jnp.cosh(u)),))
    fn = lambda z, x: sigma(z / 2 + x)
    solve = lambda x: deqjax.fixed_point(fn, Bracketing(), jnp.zeros(2), x)
    sol, plain = solve(jnp.ones(2)), jnp.float32(0.89521927)
    assert sol.result == SUCCESS and sol.stats["relative_error"] <= 1e-4
    np.testing.assert_allclose(sol.value, plain, rtol=1e-4)
    slope = (1 - plain**2) / (1 - (1 - plain**2) / 2)
    got = jax.grad(lambda x: jnp.sum(solve(x).value))(jnp.ones(2))
    np.testing.assert_allclose(got, slope, rtol=1e-3)

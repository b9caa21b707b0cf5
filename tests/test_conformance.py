"""Every solver with every adjoint on every problem, in float32, float64 and bfloat16.

Tolerances follow from conditioning: a residual r leaves an error of at most r / (1 - rate), and
rounding one of at most a few eps / (1 - rate). The gradient passes through (I - J)^-1 once more.
"""

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix
import pytest
from problems import relative_error, suite
from registry import slow

import deqjax

DTYPES = {"float32": np.float32, "float64": np.float64, "bfloat16": jnp.bfloat16}


def dtypes(*usual, more=()):
    """Parameters, of which `more` are slow."""
    wide = lambda name: [pytest.mark.x64] if name == "float64" else []
    marks = lambda name: wide(name) + ([pytest.mark.slow] if name in more else [])
    return [pytest.param(DTYPES[name], id=name, marks=marks(name)) for name in (*usual, *more)]


def solvers(tol):
    return {
        "picard": deqjax.FixedPointIteration(tol, tol),
        "damped": deqjax.FixedPointIteration(tol, tol, damp=0.3),
        "reversible-0.8": deqjax.Reversible(tol, tol, beta=0.8),
        "reversible-1.2": deqjax.Reversible(tol, tol, beta=1.2),
        "anderson": deqjax.Anderson(tol, tol),
        "broyden": deqjax.Broyden(tol, tol, line_search=True),
        "newton": optimistix.Newton(tol, tol),
        "chord": optimistix.Chord(tol, tol),
    }


def tolerance(dtype):
    return 30 * float(jnp.finfo(dtype).eps)


def check(dtype, problem, solver, adjoint, reach=1.0):
    """`reach` is the tolerance of the backward solve in units of that of the forward one."""
    tol = tolerance(dtype)

    def loss(args):
        sol = deqjax.fixed_point(
            problem.fn, solver, problem.z0, args, max_steps=1000, adjoint=adjoint
        )
        terms = jax.tree.map(lambda z, g: jnp.sum(z * g), sol.value, problem.cotangent)
        return sum(jax.tree.leaves(terms)), sol

    (_, sol), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(problem.args)
    assert sol.result == deqjax.RESULTS.successful
    bound = 10 * tol / (1 - problem.rate)
    assert sol.stats["residual"] < bound
    assert relative_error(sol.value, problem.solution) < bound
    assert relative_error(grad, problem.gradient) < reach * bound / (1 - problem.rate)


@pytest.mark.parametrize("solver", solvers(1.0))
@pytest.mark.parametrize("dtype", dtypes("float32", "bfloat16", more=["float64"]))
def test_implicit(dtype, solver):
    if dtype == jnp.bfloat16 and solver in ("newton", "chord"):
        return  # Lineax's dense factorisation has no bfloat16
    for problem in suite(dtype):
        check(dtype, problem, solvers(tolerance(dtype))[solver], deqjax.ImplicitAdjoint())


@pytest.mark.parametrize("iterative", [True, False], ids=["gmres", "dense"])
@pytest.mark.parametrize("dtype", dtypes("float32", "float64"))
def test_implicit_by_lineax(dtype, iterative):
    tol = tolerance(dtype)
    linear = lineax.GMRES(tol, tol) if iterative else lineax.AutoLinearSolver(well_posed=None)
    for problem in suite(dtype):
        solver = deqjax.FixedPointIteration(tol, tol)
        check(dtype, problem, solver, deqjax.ImplicitAdjoint(linear))


@pytest.mark.parametrize(
    "solver", ["picard", slow("damped"), "reversible-0.8", slow("reversible-1.2")]
)
@pytest.mark.parametrize("dtype", dtypes("float32", "float64"))
def test_checkpointed(dtype, solver):
    # The derivative of the iterates converges at rho, up to a factor n: one decade of slack.
    for problem in suite(dtype):
        solver_ = solvers(tolerance(dtype))[solver]
        check(dtype, problem, solver_, deqjax.RecursiveCheckpointAdjoint(), reach=10)


@pytest.mark.parametrize(
    "adjoint", [deqjax.ReversibleAdjoint(), deqjax.RecursiveCheckpointAdjoint()]
)
@pytest.mark.parametrize("beta", [0.5, 0.8, 1.2])
@pytest.mark.parametrize("dtype", dtypes("float32", more=["float64"]))
def test_steps_taken(dtype, beta, adjoint):
    """At a fixed small depth the gradient is that of the unrolled iteration, in float64."""
    n = 6
    for problem in suite(dtype)[2:]:

        def loss(args, problem=problem):
            sol = deqjax.fixed_point(
                problem.fn,
                deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, exact=False),
                problem.z0,
                args,
                max_steps=n,
                adjoint=adjoint,
            )
            return sum(jax.tree.leaves(jax.tree.map(lambda z: jnp.sum(jnp.sin(z)), sol.value)))

        grad = jax.jit(jax.grad(loss))(problem.args)
        with jax.enable_x64(True):
            up = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)

            def unrolled(args, problem=problem, up=up):
                past = now = up(problem.z0)
                for _ in range(n):
                    mixed = lambda p, f: (1 - beta) * p + beta * f
                    past, now = now, jax.tree.map(mixed, past, problem.fn(now, args))
                return sum(jax.tree.leaves(jax.tree.map(lambda z: jnp.sum(jnp.sin(z)), now)))

            truth = jax.jit(jax.grad(unrolled))(up(problem.args))
        # Reversal multiplies rounding by 1 / |1 - beta| a step.
        noise = 1 if isinstance(adjoint, deqjax.RecursiveCheckpointAdjoint) else abs(1 - beta) ** -n
        assert relative_error(grad, truth) < 10 * noise * float(jnp.finfo(dtype).eps)

"""Measured rates of convergence against theory."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems import affine, relative_error

import deqjax

pytestmark = pytest.mark.x64


def errors(solver, problem, depths):
    """||z_n - z*|| at each depth, relative to ||z*||."""
    run = lambda n: deqjax.fixed_point(
        problem.fn, solver, problem.z0, problem.args, max_steps=max(depths), steps=n
    )
    return np.array([relative_error(run(n).value, problem.solution) for n in depths])


@pytest.mark.parametrize("damp", [0.0, 0.3, -0.2])
@pytest.mark.parametrize("rate", [0.4, 0.9])
def test_picard(rate, damp):
    """Asymptotically the spectral radius of damp I + (1 - damp) A, a step."""
    problem = affine(6, rate, dtype=np.float64)
    a = np.asarray(problem.args[0])
    rho = np.max(np.abs(np.linalg.eigvals(damp * np.eye(6) + (1 - damp) * a)))
    start, stop = 40, 100
    ends = errors(deqjax.FixedPointIteration(rtol=0.0, atol=0.0, damp=damp), problem, [start, stop])
    if ends[1] > 1e-13:  # not yet down to rounding
        measured = (ends[1] / ends[0]) ** (1 / (stop - start))
        assert np.isclose(measured, rho, rtol=2e-2)
    else:
        assert rho**start < 1e-4


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 1.2])
@pytest.mark.parametrize("slope", [-0.9, -0.3, 0.5, 0.95])
def test_reversible_scalar(beta, slope):
    """On f(z) = k z + 1 the recurrence's rate is its larger root: r^2 = beta k r + (1 - beta)."""
    fn = lambda z, _: slope * z + 1
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, exact=False)
    solve = lambda n: deqjax.fixed_point(fn, solver, jnp.asarray(0.0), max_steps=64, steps=n).value
    gap = np.array([float(solve(n)) - 1 / (1 - slope) for n in range(65)])
    roots = np.roots([1, -beta * slope, -(1 - beta)])
    # e[n] = c1 r1^n + c2 r2^n with e[-1] = e[0]: compare all of it with the recurrence's solution.
    r1, r2 = roots
    c = np.linalg.solve([[1, 1], [1 / r1, 1 / r2]], [gap[0], gap[0]])
    predicted = np.real(c[0] * r1 ** np.arange(65) + c[1] * r2 ** np.arange(65))
    assert np.allclose(gap, predicted, rtol=1e-9, atol=1e-12)
    # The paper's bound: a pair of steps shrinks the error by at least |1 - beta| + beta |k|.
    pair = abs(1 - beta) + beta * abs(slope)
    if pair < 1:
        assert np.max(np.abs(roots)) ** 2 <= pair + 1e-12


@pytest.mark.parametrize("beta", [0.5, 0.8, 1.1])
def test_reversible_pair_bound(beta):
    """In any norm in which f contracts by k, max(|e_n|, |e_n+1|) shrinks as promised."""
    k = 0.7
    problem = affine(8, k, dtype=np.float64)
    pair = abs(1 - beta) + beta * k
    assert pair < 1
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, exact=False)
    error = errors(solver, problem, list(range(60)))
    size = np.maximum(error[:-1], error[1:])
    assert np.all(size[2:] <= pair * size[:-2] * (1 + 1e-9) + 1e-14)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_neumann_series(rate):
    """The backward solve needs log(tol) / log(rho) terms."""
    problem = affine(8, rate, dtype=np.float64)
    rho = np.max(np.abs(np.linalg.eigvals(np.asarray(problem.args[0]))))
    tol = 1e-10
    (_, (da, db)), stats = deqjax.implicit_vjp(
        problem.fn,
        jnp.asarray(problem.solution),
        problem.args,
        problem.cotangent,
        adjoint=deqjax.ImplicitAdjoint(tol=tol),
        max_steps=1000,
    )
    predicted = np.log(tol) / np.log(rho)
    assert 0.7 * predicted < int(stats["num_steps"]) < 1.3 * predicted + 5
    assert stats["result"] == deqjax.RESULTS.successful
    assert relative_error((da, db), problem.gradient) < 10 * tol / (1 - rate)

"""The solvers that are compared, ours and jaxopt's, all under one stopping test and one count.

The test: `||f(z) - z||_2 <= tol`, over the whole state, which is jaxopt's own and, with `rtol=0`
and the 2-norm, ours. The count: evaluations of f in the loop. A step of ours makes one, and the one
that meets the tolerance is counted (`num_fn_evals`); an iteration of jaxopt's makes one (its
Anderson method makes another before the first, for aux, which XLA drops and which isn't counted).
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import PyTree

import deqjax

from bench.blocks import Cell, make_attention, make_conv
from bench.problems import Problem


def load() -> Any:
    """The module jaxopt, or None where it isn't installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says on import that nobody maintains it any more
        try:
            return importlib.import_module("jaxopt")
        except ImportError:
            return None


JAXOPT = load()

TESTED: dict[str, Any] = {"rtol": 0.0, "norm": optimistix.two_norm}
OURS: dict[str, Callable[[float], deqjax.AbstractSolver]] = {
    "Picard": lambda tol: deqjax.FixedPointIteration(atol=tol, **TESTED),
    "damped Picard": lambda tol: deqjax.FixedPointIteration(atol=tol, damp=0.5, **TESTED),
    "Anderson": lambda tol: deqjax.Anderson(atol=tol, **TESTED),
    "Broyden": lambda tol: deqjax.Broyden(atol=tol, **TESTED),
}
THEIRS = {"jaxopt Picard": "FixedPointIteration", "jaxopt Anderson": "AndersonAcceleration"}
PAIRS = {"Picard": "jaxopt Picard", "Anderson": "jaxopt Anderson"}


def available() -> list[str]:
    """The methods that can be run here."""
    return [*OURS, *(THEIRS if JAXOPT is not None else ())]


def solve(
    method: str, fn: Callable, tol: float, max_steps: int, **options: Any
) -> Callable[[PyTree, PyTree], tuple[PyTree, Any]]:
    """`(z0, args) -> (z, evaluations)`; `options` are of `deqjax.fixed_point`."""

    def ours(z0, args):
        solver = OURS[method](tol)
        sol = deqjax.fixed_point(fn, solver, z0, args, max_steps=max_steps, **options)
        return sol.value, sol.stats["num_fn_evals"]

    def theirs(z0, args):
        solver = getattr(JAXOPT, THEIRS[method])(fn, maxiter=max_steps, tol=tol)
        z, state = solver.run(z0, args)
        return z, state.iter_num

    return ours if method in OURS else theirs


def history(method: str, problem: Problem, length: int) -> list[float]:
    """`||f(z) - z||_2` at each of the first evaluations, step by step without a stop."""
    fn, z0, args = problem.fn, problem.z0, problem.args
    solver: Any = OURS[method](1.0) if method in OURS else getattr(JAXOPT, THEIRS[method])(fn)

    def ours(carry, args):
        z, memory = carry
        fz = fn(z, args)
        return solver.mix(z, fz, memory), distance(fz, z)

    def theirs(carry, args):
        z, state = solver.update(*carry, args)
        return (z, state), state.error

    def run(z0, args):
        if method in OURS:
            start, step = solver.blank(z0), ours
        else:
            start, step = solver.init_state(z0, args), theirs
        return jax.lax.scan(lambda c, _: step(c, args), (z0, start), length=length)[1]

    return jax.jit(run)(z0, args).tolist()


def newton(problem: Problem, length: int) -> list[float]:
    """The same after each step of Optimistix's Newton method, with its dense Jacobian."""
    solver: Any = optimistix.Newton(rtol=0.0, atol=0.0)
    residual = lambda z, args: (jax.tree.map(jnp.subtract, problem.fn(z, args), z), None)
    struct = jax.eval_shape(lambda: problem.z0)
    fixed = (problem.args, {})
    state = solver.init(residual, problem.z0, *fixed, struct, None, frozenset())

    @eqx.filter_jit
    def step(z, state):
        z, state, _ = solver.step(residual, z, *fixed, state, frozenset())
        return z, state, distance(problem.fn(z, problem.args), z)

    z, found = problem.z0, []
    for _ in range(length):
        z, state, size = step(z, state)
        found.append(float(size))
    return found


def distance(a: PyTree, b: PyTree) -> Any:
    """`||a - b||_2`."""
    return optimistix.two_norm(jax.tree.map(jnp.subtract, a, b))


def attention_block(batch: int, length: int, width: int, heads: int, seed: int) -> Cell:
    """A block that contracts by about 0.83 a step as it is made."""
    return make_attention(batch, length, width, heads, jax.random.key(seed))


def convolution_block(batch: int, size: int, channels: int, seed: int) -> Cell:
    """A block that contracts by about 0.86 a step as it is made."""
    return make_conv(batch, size, channels, jax.random.key(seed))


def inject(cell: Cell, factor: float) -> Cell:
    """The more is injected, the more the last normalisation contracts."""
    params, x = cell.args
    return cell._replace(name=f"{cell.name}, {factor:g} x injected", args=(params, factor * x))


def as_problem(cell: Cell) -> Problem:
    """Finds the solution of the cell, and the spectral radius there."""
    tol = 100 * float(jnp.finfo(cell.z0.dtype).eps) * cell.z0.size**0.5
    z, _ = jax.jit(solve("Anderson", cell.fn, tol, 2000))(cell.z0, cell.args)
    found = deqjax.spectral_radius(cell.fn, z, cell.args, key=jax.random.key(0))
    return Problem(cell.name, cell.fn, cell.z0, cell.args, z, float(found.value))

"""Every way of differentiating a solve, on the same problems, against the exact gradient."""

import functools as ft
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax
import numpy as np
from tqdm import tqdm

import deqjax

from bench.blocks import Cell
from bench.compare.methods import JAXOPT
from bench.compare.time import error, exact
from bench.problems import linear
from bench.rows import Row
from bench.timing import compiled, interleaved, temporary_bytes

JAXOPT_ROW = "jaxopt, implicit_diff"


class Way(NamedTuple):
    """A solver that goes with an adjoint."""

    adjoint: deqjax.AbstractAdjoint
    solver: deqjax.AbstractSolver
    max_steps: int


# Near where float32 ends: what is left is the error of the adjoint.
TIGHT: dict[str, Any] = {"rtol": 2e-6, "atol": 2e-6}
ANDERSON = deqjax.Anderson(**TIGHT)
LINEAR: dict[str, Any] = {"rtol": 1.2e-6, "atol": 0.0}  # 10 eps, the default of ImplicitAdjoint()
# Lineax tests each entry against atol + rtol |b|: with less, float32 stagnates, and gives NaN.
KRYLOV: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def implicit(linear_solver: Any = None) -> Way:
    return Way(deqjax.ImplicitAdjoint(linear_solver), ANDERSON, 500)


def ways(steps: int) -> dict[str, Way]:
    """The ways by name. `steps` are for those that differentiate steps, and not the fixed point."""
    fixed: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}
    picard = deqjax.FixedPointIteration(**fixed)
    return {
        "Implicit": implicit(),
        "Implicit, series": implicit(deqjax.FixedPointIteration(**LINEAR)),
        "Implicit, Anderson": implicit(deqjax.Anderson(**LINEAR)),
        "Implicit, Broyden": implicit(deqjax.Broyden(**LINEAR)),
        "Implicit, GMRES": implicit(lineax.GMRES(**KRYLOV)),
        "Implicit, BiCGStab": implicit(lineax.BiCGStab(**KRYLOV)),
        "Phantom": Way(deqjax.PhantomAdjoint(), ANDERSON, 500),
        "NeumannPhantom": Way(deqjax.NeumannPhantomAdjoint(), ANDERSON, 500),
        "JacobianFree": Way(deqjax.JacobianFreeAdjoint(), ANDERSON, 500),
        "Broyden (SHINE)": Way(deqjax.BroydenAdjoint(), deqjax.Broyden(**TIGHT), 500),
        "RecursiveCheckpoint": Way(deqjax.RecursiveCheckpointAdjoint(), picard, steps),
        "Reversible, exact": Way(
            deqjax.ReversibleAdjoint(), deqjax.Reversible(**fixed, beta=0.8), steps
        ),
    }


def solution(way: Way | None, fn: Callable) -> Callable[[Any, Any], Any]:
    """`(z0, args) -> z`, differentiably; None: jaxopt's Anderson with its implicit_diff."""

    def solve(z0, args):
        if way is None:
            # The same for each entry: its test is of the 2-norm of all, and absolute.
            tol = TIGHT["atol"] * z0.size**0.5
            return JAXOPT.AndersonAcceleration(fn, maxiter=500, tol=tol).run(z0, args)[0]
        options = {"max_steps": way.max_steps, "adjoint": way.adjoint}
        return deqjax.fixed_point(fn, way.solver, z0, args, **options).value

    return solve


def gradient(way: Way | None, fn: Callable) -> Callable[..., Any]:
    """`(z0, args, cotangent) -> d_args`."""
    loss = lambda args, z0, cotangent: jnp.sum(solution(way, fn)(z0, args) * cotangent)
    return lambda z0, args, cotangent: jax.grad(loss)(args, z0, cotangent)


def forward(way: Way | None) -> str:
    """A name for the solve of `way`, which ways may share."""
    return "solve, jaxopt" if way is None else f"solve, {type(way.solver).__name__}"


class Case(NamedTuple):
    """A block with its exact gradient, float64."""

    family: str
    rho: float | None
    cell: Cell
    truth: Any


def linear_cases(rhos: Sequence[float], n: int) -> list[Case]:
    """The linear family in float32, with dense float64 gradients."""
    found = []
    for rho in rhos:
        p = linear(rho, n=n)
        cotangent = np.random.default_rng(1).standard_normal(n)
        a, _ = p.args
        y = np.linalg.solve(np.eye(n) - a.T, cotangent)
        q = p.astype(jnp.float32)
        cell = Cell("linear", p.fn, q.z0, q.args, jnp.asarray(cotangent, jnp.float32))
        found.append(Case("linear", rho, cell, (np.outer(y, p.solution), y)))
    return found


def block_cases(cells: Sequence[Cell]) -> list[Case]:
    return [Case(cell.name, None, cell, exact(cell)) for cell in cells]


def compare(cases: Sequence[Case], steps: int, rounds: int) -> list[Row]:
    """Gradient error, temporary bytes and seconds, one row per way and case.

    The cases of one family have one shape: a way is compiled once for all of them. `backward` is
    the time of solve and gradient less that of the solve alone, round by round.
    """
    all_ways: dict[str, Way | None] = {**ways(steps)}
    if JAXOPT is not None:
        all_ways[JAXOPT_ROW] = None
    programs: dict[tuple[str, str], Any] = {}

    def call(family: str, name: str, fn: Callable, *inputs: Any) -> ft.partial:
        if (family, name) not in programs:
            programs[family, name] = compiled(fn, *inputs)
        return ft.partial(programs[family, name], *inputs)

    rows: list[Row] = []
    for case in tqdm(cases, desc="cases"):
        cell, calls, mine = case.cell, {}, []
        inputs = (cell.z0, cell.args, cell.cotangent)
        for name, way in all_ways.items():
            run = calls[name] = call(case.family, name, gradient(way, cell.fn), *inputs)
            alone = forward(way)
            calls[alone] = call(case.family, alone, solution(way, cell.fn), *inputs[:2])
            row = {"problem": case.family, "rho": case.rho, "method": name, "size": cell.z0.size}
            mine.append(row | {"bytes": temporary_bytes(run), "error": error(run(), case.truth)})
        seconds = interleaved(calls, rounds)
        for row in mine:
            both, alone = seconds[row["method"]], seconds[forward(all_ways[row["method"]])]
            row["seconds"] = statistics.median(both)
            row["backward"] = statistics.median(a - b for a, b in zip(both, alone, strict=True))
        rows += mine
    return rows


def backward_memory(sizes: Sequence[int]) -> list[Row]:
    """Temporary bytes of the implicit backward pass alone, default settings, by state size.

    f is `tanh(a roll(z) + x)`, of as many parameters as entries, so that what is kept is of z.
    """
    fn = lambda z, args: jnp.tanh(args[0] * jnp.roll(z, 1) + args[1])
    rows = []
    for n in sizes:
        z = jax.ShapeDtypeStruct((n,), jnp.float32)
        backward = lambda z, args, g: deqjax.implicit_vjp(fn, z, args, g)[0][1]
        rows.append({"size": n, "bytes": temporary_bytes(compiled(backward, z, (z, z), z))})
    return rows


def guarantee(rhos: Sequence[float], n: int) -> list[Row]:
    """The default backward pass at z*, rounded, against the dense gradient in A and b."""
    tol = 10 * float(jnp.finfo(jnp.float32).eps)
    rows = []
    for case in linear_cases(rhos, n):
        rho, cell = case.rho or 0.0, case.cell
        solution = jnp.asarray(linear(rho, n=n).solution, cell.z0.dtype)
        (_, grads), stats = deqjax.implicit_vjp(cell.fn, solution, cell.args, cell.cotangent)
        row = {"rho": rho, "bound": 10 * tol / (1 - rho), "steps": int(stats["num_steps"])}
        row["nan"] = bool(np.isnan(grads[1]).any())
        rows.append(row | {"error": error(grads, case.truth)})
    return rows

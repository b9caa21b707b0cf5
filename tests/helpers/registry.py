"""The solvers and adjoints that are tested alike: a new one is one line here."""

from collections.abc import Callable
from typing import NamedTuple

import lineax
import optimistix
import pytest

import deqjax

# Those that need rho(J) < 1, or eigenvalues with a real part below 1.
CONTRACTIVE = {"picard", "damped", "reversible", "reversible-exact", "their-picard", "best-picard"}


krylov = lambda tol: lineax.GMRES(tol / 10, tol / 10)
theirs = lambda tol: optimistix.FixedPointIteration(tol, tol)
SOLVERS = {
    "picard": lambda tol: deqjax.FixedPointIteration(tol, tol),
    "damped": lambda tol: deqjax.FixedPointIteration(tol, tol, damp=0.2),
    "anderson": lambda tol: deqjax.Anderson(tol, tol, depth=10),
    "anderson-mixed": lambda tol: deqjax.Anderson(tol, tol, depth=10, mixing=0.7),
    "broyden": lambda tol: deqjax.Broyden(tol, tol),
    "broyden-search": lambda tol: deqjax.Broyden(tol, tol, line_search=True),
    "reversible": lambda tol: deqjax.Reversible(tol, tol, beta=0.8, exact=False),
    "reversible-exact": lambda tol: deqjax.Reversible(tol, tol, beta=0.75),
    "their-picard": theirs,
    "newton": lambda tol: optimistix.Newton(tol, tol),
    "newton-krylov": lambda tol: optimistix.Newton(tol, tol, linear_solver=krylov(tol)),
    "chord": lambda tol: optimistix.Chord(tol, tol),
    "levenberg-marquardt": lambda tol: optimistix.LevenbergMarquardt(tol, tol),
    "dogleg": lambda tol: optimistix.Dogleg(tol, tol),
    "best-picard": lambda tol: optimistix.BestSoFarFixedPoint(theirs(tol)),
    "best-newton": lambda tol: optimistix.BestSoFarRootFinder(optimistix.Newton(tol, tol)),
}


def slow(*values, **how):
    """Parameters of a further case of one kind."""
    return pytest.param(*values, marks=pytest.mark.slow, **how)


def cases(table, *more):
    """Parameters named as in `table`, of which `more` are slow."""
    assert set(more) <= set(table), more
    return [(slow if k in more else pytest.param)(v, id=k) for k, v in dict(table).items()]


def names(table, *more):
    """The names in `table` as parameters, of which `more` are slow."""
    return cases({name: name for name in table}, *more)


# Ours that return the best iterate when steps run out.
BEST = ("picard", "anderson", "broyden", "broyden-search")
CERTIFIED = {"positive-concave": deqjax.PositiveConcaveSolver, "bracketing": deqjax.Bracketing}


class Way(NamedTuple):
    """A solver by its name, an adjoint, and the gradient that it promises of a dense problem."""

    solver: str
    adjoint: Callable
    promised: Callable


implicit = lambda d: d.implicit()
ADJOINTS = {
    "implicit": Way("anderson", lambda tol: deqjax.ImplicitAdjoint(tol=tol), implicit),
    "gmres": Way("anderson", lambda tol: deqjax.ImplicitAdjoint(lineax.GMRES(tol, tol)), implicit),
    "checkpointed": Way("picard", lambda _: deqjax.RecursiveCheckpointAdjoint(), implicit),
    "reversible": Way("reversible", lambda _: deqjax.ReversibleAdjoint(), implicit),
    "phantom": Way("anderson", lambda _: deqjax.PhantomAdjoint(), lambda d: d.phantom(5, 0.5)),
    "neumann": Way(
        "anderson", lambda _: deqjax.NeumannPhantomAdjoint(), lambda d: d.phantom(5, 0.5)
    ),
    "jacobian-free": Way(
        "anderson", lambda _: deqjax.JacobianFreeAdjoint(), lambda d: d.phantom(1, 0.0)
    ),
    "shine": Way("broyden", lambda tol: deqjax.BroydenAdjoint(tol=tol), implicit),
}

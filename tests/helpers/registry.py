"""The solvers of the conformance suite: a new one is one line here."""

import lineax
import optimistix

import deqjax

# What needs rho(J) < 1, or an eigenvalue below 1 in the real part.
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

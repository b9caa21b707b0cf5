"""The result of a solve, and how it is judged."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Bool, PyTree

from ._step import measured
from ._tree import as_real, is_traced, max_abs, per_problem, quotient, two_norm, widen

RESULTS = optimistix.RESULTS


# The codes of `deqjax.fixed_point`; Optimistix and Lineax have more.
_CODES = ("successful", "nonlinear_max_steps_reached", "nonfinite", "nonlinear_divergence")


class Solution(optimistix.Solution):
    """The result of `deqjax.fixed_point`: an `optimistix.Solution` that prints in words."""

    def __repr__(self) -> str:
        value = eqx.tree_pformat(self.value, struct_as_array=True)
        if any(map(is_traced, jax.tree.leaves((self.result, self.stats)))):
            return f"Solution(value={value}, traced)"
        words = [f"{name}={span(self.stats[name])}" for name in ("num_steps", "residual")]
        return f"Solution(value={value}, {', '.join([counted(self.result), *words])})"


def counted(result: RESULTS) -> str:
    """The code of one problem, or how many of several problems have each, as text."""
    counts = {name: np.sum(result == getattr(RESULTS, name)) for name in _CODES}
    size = np.size(result == RESULTS.successful)
    counts["another result"] = size - sum(counts.values())
    one = np.ndim(result == RESULTS.successful) == 0
    return ", ".join(name if one else f"{n} {name}" for name, n in counts.items() if n)


def span(x: Array) -> str:
    """The number as text, or the least and the largest of several, and how many are NaN."""
    values = np.asarray(x, float)
    bad = np.sum(np.isnan(values))
    ends = (np.nanmin(values), np.nanmax(values)) if bad < values.size else ()
    words = " to ".join(dict.fromkeys(f"{end:.3g}" for end in ends))
    if not words:
        return "nan" if bad else "none"
    return f"{words}, {bad} nan" if bad else words


def too_large(tree: PyTree) -> Bool[Array, ""]:
    """Whether an entry is NaN or so large that a squared norm would overflow: the divergence test.

    The bound, sqrt(largest float), is where ||f(z) - z||_2 stops being representable.
    """
    size = max_abs(tree)
    return jnp.logical_not(size <= jnp.sqrt(jnp.finfo(size.dtype).max))


def result_code(
    z: PyTree,
    fz: PyTree,
    complete: Bool[Array, ""],
    in_range: Bool[Array, ""],
) -> RESULTS:
    """The result code of one problem; without a numerical failure, `complete` decides."""
    # The last finite iterate of a divergent sequence may have no finite f.
    finite = jnp.isfinite(max_abs((z, fz))) | (too_large(z) & jnp.isfinite(max_abs(z)))
    diverged = too_large((z, fz)) | ~in_range
    code = RESULTS.where(complete, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
    code = RESULTS.where(diverged, RESULTS.nonlinear_divergence, code)
    return RESULTS.where(finite, code, RESULTS.nonfinite)


def raise_unsuccessful(sol: Solution) -> Solution:
    """`sol`, with a run-time error naming the first problem's failure, if there is one."""
    failed = jnp.ravel(sol.result != RESULTS.successful)
    first = jnp.argmax(failed)
    code = jax.tree.map(lambda x: jnp.ravel(x)[first], sol.result)
    return code.error_if(sol, jnp.any(failed))


def relative_residual(z: PyTree, fz: PyTree) -> Array:
    """`||f(z) - z||_2 / ||f(z)||_2` of one problem, in float32 or wider; 0 for 0 / 0."""
    z, fz = as_real((z, fz))
    scale = jax.lax.stop_gradient(max_abs(fz))
    # Squares of numbers below 1e-19 vanish in float32; the ratio does not depend on the scale.
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    unit = lambda x: widen(x) / scale.astype(widen(x).dtype)
    fz = jax.tree.map(unit, fz)
    gap = two_norm(jax.tree.map(lambda fz, z: fz - unit(z), fz, z))
    return quotient(gap, two_norm(fz))


def completed(
    solver: Any, z: PyTree, fz: PyTree, loop: Any, budget: Any, requested: Array
) -> Bool[Array, "..."]:
    """Whether each problem met its tolerance, or took the requested steps.

    `loop` is a `LoopResult`, `budget` a `Budget`.
    """
    small = loop.outcome | (measured(solver, z, fz, budget.rank) < 1)
    # Zero tolerances, traced or not, mean a fixed number of steps.
    untested = (solver.rtol == 0) & (solver.atol == 0)
    return jnp.where(untested, loop.num_steps == requested, small)


def outcome(
    z: PyTree, fz: PyTree, loop: Any, complete: Array, in_range: Array, budget: Any
) -> tuple[RESULTS, dict[str, Array]]:
    """The result of each problem, and the stats that every solve has."""

    def report(z, fz, complete, overflow):
        code = result_code(z, fz, complete, in_range & ~overflow)
        return code, relative_residual(z, fz)

    overflow = loop.state.overflow
    result, size = per_problem(report, budget.rank)(z, fz, complete, overflow)
    stats = {
        "num_steps": loop.num_steps,
        "num_fn_evals": loop.num_steps + 1,
        "residual": size,
        "max_steps": jnp.asarray(budget.max_steps, jnp.int32),
        "overflow": overflow,
    }
    return result, stats

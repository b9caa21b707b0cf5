"""Did a solve converge, how fast, to what, and what to do if it did not."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_int
from .._fixed_point import fixed_point
from .._problem import convert, point, precision_of
from .._solution import RESULTS, counted, relative_residual, span
from .._tree import is_traced, per_problem, quotient, stop_gradient, widen
from ..solvers import AbstractSolver
from ._jacobian import SpectralRadius, draw, spectral_radius
from ._residuals import residuals


class Diagnosis(NamedTuple):
    """The result of `deqjax.diagnose`; one entry per problem. It prints in words."""

    result: RESULTS
    num_steps: Int[Array, "..."]
    residual: Float[Array, "..."]
    rate: Float[Array, "..."]
    spectral_radius: SpectralRadius
    agreeing: Float[Array, "..."]
    elsewhere: Float[Array, "..."]
    distance: Float[Array, "..."]
    floor: Float[Array, "..."]
    starts: int
    max_steps: int

    def __repr__(self) -> str:
        if any(map(is_traced, jax.tree.leaves(self))):
            return "Diagnosis(traced)"
        lines = {
            "result": counted(self.result),
            "steps": f"{span(self.num_steps)} (at most {self.max_steps})",
            "residual": f"{span(self.residual)} (rounding alone: {span(self.floor)})",
            "factor per step": span(self.rate),
            "spectral radius of f": span(self.spectral_radius.value),
        }
        if np.any(self.spectral_radius.residual > 0.1):
            lines["spectral radius of f"] += " (uncertain)"
        if self.starts and not np.all(np.isnan(self.agreeing)):
            lines["other starts"] = f"{self.starts}: share that ends here {span(self.agreeing)}, "
            lines["other starts"] += f"elsewhere {span(self.elsewhere)}"
            lines["distance of ends"] = span(self.distance)
        return "\n".join([f"{k:<22}{v}" for k, v in lines.items()] + self.advice())

    def advice(self) -> list[str]:
        """The sentences that the numbers call for; none if all is well."""
        ended = lambda name: np.asarray(self.result == getattr(RESULTS, name))
        rate, radius, residual = map(
            np.asarray, (self.rate, self.spectral_radius.value, self.residual)
        )
        short = ended("nonlinear_max_steps_reached")
        rounding = short & (residual <= 10 * self.floor)
        falls = rate < 1
        cases = [
            (
                ended("nonfinite"),
                "f is not finite at an iterate: look for a division, a logarithm, a weight or an "
                "input that is not finite.",
            ),
            (
                ended("nonlinear_divergence"),
                "The iterates grow without bound: damp the solver, or bound f (nn.SpectralNorm, "
                "nn.GroupNorm, a cell with a theorem).",
            ),
            (
                rounding,
                "The residual is as small as rounding lets it be, and the tolerance is smaller: "
                "raise rtol and atol, or use float64.",
            ),
            (
                short & ~rounding & falls,
                "The residual falls, but slowly: allow more steps, or use deqjax.Anderson(). If "
                "the factor is near 1, there may be no fixed point.",
            ),
            (
                short & ~rounding & ~falls,
                "The residual does not fall: use deqjax.Anderson() or deqjax.Broyden(), or damp. "
                "There may be no fixed point.",
            ),
            (
                ended("successful") & (radius > 1),
                "Plain steps of f lead away from this point: deqjax.ImplicitAdjoint() has its "
                "gradient; undamped phantom gradients and a Neumann series do not.",
            ),
            (
                ended("successful") & (np.asarray(self.elsewhere) > 0),
                "There are several fixed points: the output depends on z0.",
            ),
        ]
        # Of a batch, how many of its problems.
        of = lambda holds: f"{np.sum(holds)} of {holds.size}: " if holds.size > 1 else ""
        return [f"-> {of(holds)}{sentence}" for holds, sentence in cases if np.any(holds)]


def diagnose(
    fn: Callable[[PyTree, PyTree], PyTree],
    solver: AbstractSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    key: PRNGKeyArray,
    starts: int = 4,
    max_steps: int = 256,
    batched: bool = False,
) -> Diagnosis:
    """Whether a solve converges, how fast, and whether other starts lead to the same point.

        print(deqjax.diagnose(fn, deqjax.Anderson(), z0, args, key=jax.random.key(0)))

    **Arguments:**

    - `fn`, `z0`, `args`, `max_steps`, `batched`: as in `deqjax.fixed_point`.
    - `solver`: a deqjax solver.
    - `key`: for the other starts, and for `deqjax.spectral_radius`.
    - `starts`: how many other starts to try, an int of at least 0: normal numbers with the root
        mean square of the solution.

    **Returns:** a `Diagnosis`, with one entry per problem:

    - `result`, `num_steps`, `residual`: those of the solve.
    - `rate`: the factor per step by which the residual falls, in the mean over the second half of
        the steps before it meets rounding (`10 floor`); NaN if there are fewer than two.
    - `spectral_radius`: of `df/dz` at the solution, a `deqjax.SpectralRadius`.
    - `agreeing`, `elsewhere`: the shares of the other starts that converge to the same point, and
        to another; the rest do not converge. `distance`: the largest distance of such an end,
        relative to the 2-norm of the solution. Ends are the same if they are no further apart than
        their residuals allow where f contracts by the larger of `rate` and the spectral radius, at
        most 0.999, within a factor of 10. NaN if the solve itself does not succeed.
    - `floor`: the relative rounding of the state, below which no residual is likely to fall: the
        unit of the narrowest leaf of z, or the spacing of an exact `deqjax.Reversible`.

    Under `jax.jit` it is arrays. Printed, it says what to do.

    **Cost:** `(starts + 2) max_steps` evaluations of f at most, and 50 JVPs; the memory of one
    solve, as starts are tried one after another. Nothing is differentiated.

    **When not to use it:** in a training step: log `sol.stats` there.

    **Raises:** `ValueError` as `deqjax.residuals` and `deqjax.spectral_radius`.
    """
    starts = check_int("diagnose", "starts", starts, "pass a Python number.", 0)
    fn, solver, z0, args = stop_gradient((fn, solver, point(z0, batched), args))
    options = {"batched": batched, "max_steps": max_steps}
    sizes = residuals(fn, solver, z0, args, steps=max_steps, batched=batched)
    sol = fixed_point(fn, solver, z0, args, **options)
    start_key, radius_key = jax.random.split(key)
    radius = spectral_radius(fn, sol.value, args, key=radius_key, batched=batched)
    rank = int(batched)
    floor = _floor(fn, solver, z0, args, sol.value, rank).astype(sizes.dtype)
    rate = _rate(sizes, 10 * floor)
    contraction = jnp.fmax(rate, radius.value)

    def other(key):
        """The distance of another start's end, whether it is the same point, and whether not."""
        noise = draw(jax.random.normal, key, sol.value, rank)
        start = per_problem(_start, rank)(noise, sol.value)
        end = fixed_point(fn, solver, start, args, **options)
        distance = per_problem(relative_residual, rank)(end.value, sol.value)
        slack = 10 * (end.stats["residual"] + sol.stats["residual"] + floor)
        same = distance <= slack / (1 - jnp.minimum(contraction, 0.999))
        ended = end.result == RESULTS.successful
        return jnp.where(ended, distance, 0), ended & same, ended & ~same

    ends = (jnp.zeros((0, *rate.shape)),) * 3
    if starts:
        ends = jax.lax.map(other, jax.random.split(start_key, starts))
    reached = lambda x: jnp.where(sol.result == RESULTS.successful, x, jnp.nan)
    share = lambda x: reached(jnp.sum(x, 0, dtype=rate.dtype) / max(starts, 1))
    return Diagnosis(
        sol.result,
        sol.stats["num_steps"],
        sol.stats["residual"],
        rate,
        radius,
        share(ends[1]),
        share(ends[2]),
        reached(jnp.max(ends[0], 0, initial=0)),
        floor,
        starts,
        max_steps,
    )


def _floor(fn, solver, z0, args, value, rank: int) -> Float[Array, "..."]:
    """The rounding of the dtype or, if that is coarser, of the solver's own state."""
    with precision_of(solver):
        fn, z0, args, _ = convert(fn, z0, args, solver)
    solver = solver.prepared(fn, z0, args, rank)
    between = jax.tree.map(lambda x: x * 1.3, value)  # the value itself is on the solver's grid
    rounded = per_problem(lambda solver, z: solver.start(z), rank)(solver, between)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(value))
    return jnp.fmax(per_problem(relative_residual, rank)(rounded, between), eps)


def _rate(sizes: Float[Array, "k ..."], floor: Array) -> Float[Array, "..."]:
    """exp of the slope of log residual over the second half of the steps before the floor."""
    k = jnp.arange(len(sizes)).reshape(-1, *[1] * (sizes.ndim - 1))
    k = jnp.broadcast_to(k, sizes.shape)
    above = jnp.cumprod(sizes > floor[None], 0)  # NaN is not above
    last = jnp.sum(above, 0)
    used = (above == 1) & (k >= (last // 2)[None])
    weight = used.astype(sizes.dtype)
    count = jnp.sum(weight, 0)
    mean = lambda x: quotient(jnp.sum(jnp.where(used, x, 0), 0), count)
    logs, steps = jnp.log(jnp.where(used, sizes, 1)), k.astype(sizes.dtype)
    away = steps - mean(steps)[None]
    slope = quotient(jnp.sum(weight * away * logs, 0), jnp.sum(weight * away**2, 0))
    return jnp.where(count > 1, jnp.exp(slope), jnp.nan)


def _start(noise: PyTree, value: PyTree) -> PyTree:
    """Noise of the size of the value, leaf by leaf, of one problem."""

    def leaf(noise, x):
        size = jnp.sqrt(jnp.mean(jnp.abs(widen(x)) ** 2))
        return jnp.where(size > 0, size, 1).astype(noise.real.dtype) * noise

    return jax.tree.map(leaf, noise, value)

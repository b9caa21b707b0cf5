"""A solve that also returns intermediate iterates, for a loss on the path."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from .._checks import is_int
from .._fixed_point import solve
from .._problem import OptimistixSolver, check_state, check_steps, problems
from .._solution import Solution
from ..adjoints import AbstractAdjoint, ImplicitAdjoint, RecursiveCheckpointAdjoint


def fixed_point_path(
    fn: Callable[..., Any],
    solver: OptimistixSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    indices: Sequence[int],
    has_aux: bool = False,
    batched: bool = False,
    indexed: bool = False,
    max_steps: int = 256,
    steps: int | Int[Array, "..."] | None = None,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),
    path_adjoint: AbstractAdjoint = RecursiveCheckpointAdjoint(),
) -> tuple[Solution, ...]:
    """Solves `z = f(z, args)` and also returns intermediate solutions: fixed-point correction.

    One `deqjax.fixed_point` per segment, each from the end of the last one:

        z[0] -> z[i1] -> z[i2] -> ... -> z[max_steps]

    A loss on each solution makes the iteration approach the answer early:

        sols = deqjax.fixed_point_path(fn, solver, z0, args, indices=(4, 8), max_steps=30)
        weights = (0.25, 0.5, 1.0)
        loss = sum(w * task(sol.value) for w, sol in zip(weights, sols, strict=True))

    **Arguments:**

    - `fn`, `solver`, `z0`, `args`, `has_aux`, `batched`, `indexed`, `max_steps`, `steps`: as in
        `deqjax.fixed_point`; `max_steps`, `steps` and the step number count all segments together.
        With `indexed` the last segment needs an adjoint of the steps taken as well.
    - `indices`: the steps after which a solution is returned, increasing ints from 1 to
        `max_steps - 1`.
    - `adjoint`: the adjoint of the last segment.
    - `path_adjoint`: the adjoint of the others. `deqjax.ImplicitAdjoint` does not suit them: they
        do not end at a fixed point. The `last` of an adjoint counts the steps of a segment.

    **Returns:** one `Solution` per index, and the final one. Each is that of its segment:
    `"num_steps"` counts the segment's own steps, and `result` says whether the tolerance was met
    by its end; before the last segment, `nonlinear_max_steps_reached` is no failure. A segment that
    starts where the tolerance is met takes no step.

    **The gradient** is that of the composition of the segments, each differentiated by its adjoint;
    nothing is cut between them. An adjoint of the steps taken passes the cotangent of a segment
    through z0 to the segments before it: with only such adjoints the gradient is that of one
    unrolled solve. `deqjax.ImplicitAdjoint` passes none: with the defaults the final solution has
    the gradient of the fixed point, and z0 only that of the path's losses.

    **Cost:** that of `deqjax.fixed_point` per segment: all steps, and one more evaluation of f for
    each segment whose residual, result or aux is used. Each segment is a loop to compile.

    **When not to use it:** with a solver that remembers earlier iterates (`deqjax.Reversible`) if
    you need the iterates of the undivided solve: the memory starts anew in each segment.

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point`, and for indices that are not
    increasing ints from 1 to `max_steps - 1`.

    Reference: Bai, Geng, Savani, Kolter, Deep equilibrium optical flow estimation, CVPR 2022, arXiv
    2204.08442, the section on fixed-point correction.
    """
    z, max_steps = check_state(z0, batched, max_steps)
    ends = (0, *_check_indices(indices, max_steps), max_steps)
    if steps is not None:
        steps = check_steps(steps, max_steps, problems(z, int(batched)))
    before, sols = 0 if indexed else None, []
    for start, end in itertools.pairwise(ends):
        last = end == max_steps
        # The last segment gets what a traced budget asks beyond the ceiling, and reports it.
        left = None if steps is None else jnp.clip(steps - start, 0, None if last else end - start)
        sol = solve(
            fn,
            solver,
            z,
            args,
            has_aux=has_aux,
            batched=batched,
            max_steps=end - start,
            steps=left,
            adjoint=adjoint if last else path_adjoint,
            best=last,  # other segments end at the last iterate, from which the next continues
            before=before,
        )
        sols.append(sol)
        before = before if before is None else before + sol.stats["num_steps"]
        z = sol.value
    return tuple(sols)


def _check_indices(indices: Any, max_steps: int) -> tuple[int, ...]:
    if not isinstance(indices, Sequence) or not all(is_int(i, -math.inf) for i in indices):
        raise ValueError(
            f"fixed_point_path expects indices to be a sequence of ints, got {indices!r}; "
            f"pass for instance indices=(4, 8)."
        )
    if any(a >= b for a, b in itertools.pairwise((0, *indices, max_steps))):
        raise ValueError(
            f"fixed_point_path expects increasing indices from 1 to max_steps - 1 = "
            f"{max_steps - 1}, got {tuple(indices)}; sort them, and leave out max_steps, whose "
            f"solution is always returned."
        )
    return tuple(map(int, indices))

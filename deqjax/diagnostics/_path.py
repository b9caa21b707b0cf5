"""A solve that also returns iterates on the way, so that a loss can ask for progress."""

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
    fn: Callable[[PyTree, PyTree], Any],
    solver: OptimistixSolver,
    z0: PyTree,
    args: PyTree = None,
    *,
    indices: Sequence[int],
    has_aux: bool = False,
    batched: bool = False,
    max_steps: int = 256,
    steps: int | Int[Array, "..."] | None = None,
    adjoint: AbstractAdjoint = ImplicitAdjoint(),
    path_adjoint: AbstractAdjoint = RecursiveCheckpointAdjoint(),
) -> tuple[Solution, ...]:
    """Solves `z = f(z, args)` and returns the solutions on the way too: fixed-point correction.

    One `deqjax.fixed_point` a segment, each from where the last one ended:

        z[0] -> z[i1] -> z[i2] -> ... -> z[max_steps]

    A loss on each of them makes the iteration approach the answer early:

        sols = deqjax.fixed_point_path(fn, solver, z0, args, indices=(4, 8), max_steps=30)
        weights = (0.25, 0.5, 1.0)
        loss = sum(w * task(sol.value) for w, sol in zip(weights, sols, strict=True))

    **Arguments:**

    - `fn`, `solver`, `z0`, `args`, `has_aux`, `batched`, `max_steps`, `steps`: as in
        `deqjax.fixed_point`; `max_steps` and `steps` count all segments together.
    - `indices`: after how many steps, increasing ints from 1 to `max_steps - 1`.
    - `adjoint`: how the last segment is differentiated.
    - `path_adjoint`: how the others are. `deqjax.ImplicitAdjoint` does not suit them: they are not
        at a fixed point.

    **Returns:** one `Solution` an index, and the final one. Each is that of its segment:
    `"num_steps"` counts the segment's own steps, and `result` says whether the tolerance was met
    by its end, `nonlinear_max_steps_reached` on the way being no failure. A segment that starts
    where the tolerance is met takes no step.

    **The gradient** is that of the composition of the segments, each as its adjoint has it; nothing
    is cut between them. An adjoint of the steps taken hands the cotangent of a segment on to the
    segments before it, through z0, so that with such adjoints throughout the gradient is that of
    one unrolled solve. `deqjax.ImplicitAdjoint` hands on none: by the defaults the final solution
    gets the gradient of the fixed point, and z0 that of the path's losses alone.

    **Cost:** that of `deqjax.fixed_point` a segment; together their steps, and one evaluation of f
    more for each whose residual, result or aux is used. Each segment is a loop to compile.

    **When not to use it:** with a solver that remembers earlier iterates (`deqjax.Reversible`) if
    the iterates of the undivided solve are wanted: the memory starts anew in each segment.

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point`, and for indices that are not
    increasing ints from 1 to `max_steps - 1`.

    Reference: Bai, Geng, Savani, Kolter, Deep equilibrium optical flow estimation, CVPR 2022, arXiv
    2204.08442, the section on fixed-point correction.
    """
    z, max_steps = check_state(z0, batched, max_steps)
    ends = (0, *_check_indices(indices, max_steps), max_steps)
    if steps is not None:
        steps = check_steps(steps, max_steps, problems(z, int(batched)))
    sols = []
    for start, end in itertools.pairwise(ends):
        last = end == max_steps
        # What a traced budget asks beyond the ceiling stays with the last segment, which says so.
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
            best=last,  # on the way the iteration is to go on where it is
        )
        sols.append(sol)
        z = sol.value
    return tuple(sols)


def _check_indices(indices: Any, max_steps: int) -> tuple[int, ...]:
    if not isinstance(indices, Sequence) or not all(is_int(i, -math.inf) for i in indices):
        raise ValueError(
            f"fixed_point_path expects indices to be a sequence of ints, got {indices!r}; "
            f"for instance indices=(4, 8)."
        )
    if any(a >= b for a, b in itertools.pairwise((0, *indices, max_steps))):
        raise ValueError(
            f"fixed_point_path expects increasing indices from 1 to max_steps - 1 = "
            f"{max_steps - 1}, got {tuple(indices)}; the solution at max_steps comes by itself."
        )
    return tuple(map(int, indices))

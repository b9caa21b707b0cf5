"""Validates a problem once, when it is traced; an error says: expected, got, what to do."""

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Int, PyTree

from ._checks import check_int, float_state
from ._traced import Traced, trace
from ._tree import Axes, is_traced, mesh_axes, vary

OptimistixSolver = (
    optimistix.AbstractFixedPointSolver
    | optimistix.AbstractRootFinder
    | optimistix.AbstractLeastSquaresSolver
    | optimistix.AbstractMinimiser
)


class Budget(eqx.Module):
    """The limits on a solve's steps, the number of problem axes, and the tape of the loop."""

    max_steps: int = eqx.field(static=True)
    # Steps allowed, one number or one per problem, from 0 to max_steps.
    limit: Int[Array, "..."]
    rank: int = eqx.field(static=True)  # the number of leading state axes that enumerate problems
    fixed: bool = eqx.field(static=True)  # both tolerances are zero: take exactly `limit` steps
    best: bool = eqx.field(static=True, default=True)  # return the best iterate, if the solver can
    tape: Any = None  # a deqjax._step.AbstractTape
    # Whether f takes the step number: the last of its arrays is the number of steps before z0.
    indexed: bool = eqx.field(static=True, default=False)
    # Whether another loop goes on from the end, so that every memory has to be kept as it is.
    resumed: bool = eqx.field(static=True, default=False)

    @property
    def uniform(self) -> bool:
        """Whether every problem takes every step of the loop, so that none is frozen."""
        return self.fixed and self.limit.ndim == 0

    def at(self, arrays: list[Array], count: Int[Array, "..."]) -> list[Array]:
        """The arrays of f after `count` steps."""
        return [*arrays[:-1], arrays[-1] + count] if self.indexed else arrays


def convert(
    fn: Callable,
    z0: PyTree,
    args: PyTree,
    *others: PyTree,
    has_aux: bool = False,
    step: Int[Array, "..."] | None = None,
) -> tuple[Traced, PyTree, list[Array], Axes]:
    """Traces `fn` as `(z, args) -> (z', aux)` and checks its output.

    Returns the traced function, z0, the arrays of args, and the mesh axes over which any of these,
    or of the `others`, varies. The first three then vary over all of them. With a `step`, `fn`
    takes it too, and it is the last of the arrays.
    """
    args = (args,) if step is None else (args, step)

    def call(z, args):
        out = fn(z, *args)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                f"With has_aux=True fixed_point expects fn to return a pair (z', aux), got "
                f"{type(out).__name__}; return a pair, or leave has_aux out."
            )
        fz, aux = out if has_aux else (out, None)
        return jax.tree.map(jnp.asarray, fz), aux

    traced = trace(call, z0, args)
    axes = mesh_axes(traced, z0, args, *others)
    if axes:  # After this, only arrays that f closes over may be constant over a mesh axis.
        fn, z0, args = vary((fn, z0, args), axes)
        traced = trace(call, z0, args)
    check_output(traced.out_struct[0], z0)
    return traced, z0, jax.tree.leaves(eqx.filter(args, eqx.is_array)), axes


def precision_of(solver: Any) -> contextlib.AbstractContextManager:
    """The context in which f is traced: the solver's matrix precision, if it sets one."""
    if solver.precision is None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision(solver.precision)


def check_output(got: PyTree, z0: PyTree) -> None:
    """Raises `ValueError` unless `got` has the structure, shapes and dtypes of `z0`."""
    show = lambda tree: eqx.tree_pformat(tree, struct_as_array=True)
    like = jax.eval_shape(lambda: z0)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    if jax.tree.structure(got) != jax.tree.structure(like) or not all(
        map(same, jax.tree.leaves(got), jax.tree.leaves(like))
    ):
        raise ValueError(
            f"deqjax expects fn to return the structure, shapes and dtypes of z0, {show(like)}, "
            f"got {show(got)}; cast or reshape its output, start from another z0, or pass "
            f"has_aux=True if the output is a pair (z', aux)."
        )


def check_batch(z0: PyTree) -> None:
    """Raises `ValueError` unless axis 0 of every leaf is a batch of the same length."""
    shapes = [x.shape for x in jax.tree.leaves(z0)]
    if any(len(s) == 0 for s in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"batched=True expects every leaf of z0 to have a batch of the same length on axis 0, "
            f"got the shapes {shapes}; add or align that axis, or use batched=False."
        )


def point(z: PyTree, batched: bool) -> PyTree:
    """`z` as strongly typed float arrays; with `batched`, axis 0 of each is the batch."""
    z = float_state(z)
    if batched:
        check_batch(z)
    return z


def point_like(z: PyTree, x: Array, batched: bool) -> Array:
    """`z` as one array with the shape and dtype of x, the injected input of the cell."""
    z = point(z, batched)
    if not isinstance(z, jax.Array) or (z.shape, z.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"The layer expects z to be one array like the injected x, {x.dtype} of shape "
            f"{x.shape}, got "
            f"{eqx.tree_pformat(jax.eval_shape(lambda: z), struct_as_array=True)}; pass sol.value "
            f"of a solve for this x, with batched=True if it is a batch."
        )
    return z


def check_state(z0: PyTree, batched: bool, max_steps: Any) -> tuple[PyTree, int]:
    """`z0` as arrays (with `batched`, axis 0 is the batch), and `max_steps` as an int."""
    z0 = point(z0, batched)
    instead = "pass a smaller, traced budget as steps=..."
    return z0, check_int("fixed_point", "max_steps", max_steps, instead)


def check_steps(steps: Any, max_steps: int, shape: tuple[int, ...]) -> Int[Array, "..."]:
    """The requested number of steps as an int32 array of shape `()` or `shape`."""
    known = not is_traced(steps)
    steps = np.asarray(max_steps if steps is None else steps) if known else steps
    if not jnp.issubdtype(steps.dtype, jnp.integer) or steps.shape not in {(), shape}:
        allowed = " or ".join(map(str, {(): None, shape: None}))
        raise ValueError(
            f"fixed_point expects steps to be an integer array of shape {allowed}, got "
            f"{steps.dtype} of shape {steps.shape}; pass one budget, or, with batched=True, one "
            f"per problem."
        )
    if known and not np.all((steps >= 0) & (steps <= max_steps)):
        raise ValueError(
            f"fixed_point expects 0 <= steps <= max_steps={max_steps}, got steps={steps}; "
            f"pass such a budget, or raise max_steps, which is the ceiling."
        )
    return jnp.asarray(steps, jnp.int32)


def check_optimistix(solver: Any, batched: bool, indexed: bool, steps: Any) -> None:
    """Raises `ValueError` for anything but an Optimistix solver, and for options that need ours."""
    if not isinstance(solver, OptimistixSolver):
        raise ValueError(
            f"fixed_point expects a deqjax or an Optimistix solver, got {solver!r}; "
            f"pass an instance, for instance deqjax.FixedPointIteration()."
        )
    name = type(solver).__name__
    if batched or indexed or steps is not None:
        raise ValueError(
            f"fixed_point with batched=True, indexed=True or steps=... expects a deqjax solver, "
            f"got the Optimistix solver {name}; use jax.vmap for a batch, max_steps as the "
            f"ceiling, and deqjax.FixedPointIteration() for an f that depends on the step."
        )


def check_unmapped(solver: Any, *inputs: PyTree) -> None:
    """Raises `ValueError` in `jax.shard_map`, where Optimistix's loops have carry-type errors."""
    axes = mesh_axes(*inputs)
    if axes:
        raise ValueError(
            f"The Optimistix solver {type(solver).__name__} expects to run outside jax.shard_map, "
            f"got inputs that vary over the mesh axes {sorted(map(str, axes))}; use a deqjax "
            f"solver there."
        )


def steps_before(name: str, solver: Any, before: Any, z0: PyTree, rank: int) -> Int[Array, "..."]:
    """The number of steps that each problem's z0 has had, `before`, as an int32 array."""
    if solver.needs_same_f:
        raise ValueError(
            f"{name} with indexed=True expects a solver whose f may change from step to step, got "
            f"{type(solver).__name__}, which needs the same f at each step; use "
            f"deqjax.FixedPointIteration() or deqjax.Reversible()."
        )
    return jnp.broadcast_to(jnp.asarray(before, jnp.int32), problems(z0, rank))


def problems(z: PyTree, rank: int) -> tuple[int, ...]:
    """The shape of an array with one entry per problem: the first `rank` axes of `z`."""
    return jax.tree.leaves(z)[0].shape[:rank]


def prepare(
    solver: Any,
    z0: PyTree,
    batched: bool,
    max_steps: int,
    steps: int | Int[Array, "..."] | None,
) -> tuple[Any, Budget, Int[Array, "..."]]:
    """The solver with its tolerances as arrays, its budget, and the requested steps."""
    solver.check()
    known_zero = lambda x: not is_traced(x) and float(x) == 0
    fixed = known_zero(solver.rtol) and known_zero(solver.atol)
    # Tolerances are arrays, so that another value does not recompile.
    tolerances = [jnp.asarray(x, jnp.result_type(float)) for x in (solver.rtol, solver.atol)]
    solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, tolerances)
    if batched:  # arrays of one problem, a beta per channel, get the batch axis; scalars are shared
        shape = problems(z0, 1)
        each = lambda x: jnp.broadcast_to(x, shape + x.shape)
        solver = jax.tree.map(lambda x: each(x) if eqx.is_array(x) and x.ndim else x, solver)
    requested = check_steps(steps, max_steps, problems(z0, int(batched)))
    budget = Budget(max_steps, jnp.clip(requested, 0, max_steps), int(batched), fixed)
    return solver, budget, requested

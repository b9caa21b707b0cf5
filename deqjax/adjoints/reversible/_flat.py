"""A solve in a form to which `jax.vmap` can add a batch axis without copying shared arrays."""

import dataclasses
import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from ..._problem import Budget
from ..._step import AbstractTape, evaluate

Arrays = list[Array]


class Flat(eqx.Module):
    """The solve of `z = f(arrays, z)`, with every array that f depends on in one list.

    There are two forms of f: `f` is iterated, `own_f` is differentiated. Under
    `jax.vmap(jax.grad(...))`, `own_f` has a copy per example of arrays that `f` shares between
    examples. Their bits may differ: matrix products of other shapes round differently.
    """

    f: Callable[[Arrays, PyTree], PyTree] = eqx.field(static=True)
    arrays: Arrays
    solver: Any
    z0: PyTree
    budget: Budget
    tape: AbstractTape
    own_f: Callable[[Arrays, PyTree], PyTree] = eqx.field(static=True)
    to_own: Callable[[Arrays], Arrays] = eqx.field(static=True)
    # For each array of `own_f` and each problem axis, whether it has an entry per problem.
    per_problem: tuple[tuple[bool, ...], ...] = eqx.field(static=True)

    def inputs(self, while_loop: Callable) -> tuple:
        """The inputs of `iterate`."""
        fn = lambda z, arrays: (self.f(arrays, z), None)
        budget = dataclasses.replace(self.budget, tape=self.tape)
        return fn, self.solver, self.z0, self.arrays, budget, while_loop

    def mapped(self, size: int, batched: Any, own: Sequence[bool]) -> "Flat":
        """The batch of solves under `jax.vmap`, as one solve with one more batch axis.

        `batched` says which leaves have that axis, in front. Arrays without it stay shared between
        examples, and so do their cotangents, except those of `own` arrays.
        """
        spread = ft.partial(with_axis, size)
        arrays, mapped = self.arrays, list(batched.arrays)
        if self.budget.indexed:  # each example counts its own steps
            arrays = [*arrays[:-1], spread(arrays[-1], mapped[-1])]
            mapped[-1] = True
        in_axes = [0 if b else None for b in mapped]
        own_axes = [0 if b or o else None for b, o in zip(mapped, own, strict=True)]
        copied = [a != b for a, b in zip(in_axes, own_axes, strict=True)]

        # Not a closure over self, whose tracers it would keep.
        inner = jax.vmap(self.to_own, (in_axes,), in_axes, axis_size=size)

        def to_own(arrays):
            return [spread(x, not c) for x, c in zip(inner(arrays), copied, strict=True)]

        return Flat(
            jax.vmap(self.f, (in_axes, 0)),
            arrays,
            spread(self.solver, batched.solver),
            spread(self.z0, batched.z0),
            _with_problems(size, self.budget, batched.budget.limit),
            self.tape,
            jax.vmap(self.own_f, (own_axes, 0)),
            to_own,
            tuple((a == 0, *x) for a, x in zip(own_axes, self.per_problem, strict=True)),
        )


def _with_problems(size: int, budget: Budget, batched: bool) -> Budget:
    """The budget of a batch of solves; `batched` says whether each has a limit of its own."""
    rank, limit = budget.rank + 1, budget.limit
    if limit.ndim or batched:  # else one for all problems
        limit = with_axis(size, limit, batched)
        # Its axes are the leading problem axes: axes of length 1 make it line up with the others.
        limit = limit.reshape(limit.shape + (1,) * (rank - limit.ndim))
    return dataclasses.replace(budget, limit=limit, rank=rank)


def flatten(
    fn: Callable, args: PyTree, solver: Any, z0: PyTree, budget: Budget, tape: AbstractTape
) -> Flat:
    """The solve of `z = fn(z, args)[0]`; `fn` is a pytree of all arrays that it closes over."""
    dynamic, static = eqx.partition((fn, args), eqx.is_array)
    arrays, treedef = jax.tree.flatten(dynamic)

    def f(arrays, z):
        fn, args = eqx.combine(jax.tree.unflatten(treedef, arrays), static)
        return evaluate(fn, z, args)[0]

    shared = ((False,) * budget.rank,) * len(arrays)
    return Flat(f, arrays, solver, z0, budget, tape, f, lambda arrays: arrays, shared)


def with_axis(size: int, tree: PyTree, batched: PyTree) -> PyTree:
    """`tree` with the batch axis in front of each array; the `batched` ones have it already."""

    def leaf(x, batched):
        return jnp.broadcast_to(x, (size, *x.shape)) if eqx.is_array(x) and not batched else x

    return jax.tree.map(leaf, tree, batched)


def batchable(call: Callable) -> Callable:
    """`call(flat, own, record, gz)`, for which `jax.vmap` is the same call of the mapped solve.

    Otherwise, the loop inside would carry one copy per example of arrays that examples share, and
    mask f by conditions that differ between examples.
    """

    def wrapped(flat: Flat, own: Sequence[bool], record: Any = None, gz: PyTree = None) -> Any:
        dynamic, static = eqx.partition((flat, record, gz), eqx.is_array)
        leaves, treedef = jax.tree.flatten(dynamic)
        rebuild = lambda leaves: eqx.combine(jax.tree.unflatten(treedef, leaves), static)

        @custom_vmap
        def primal(*leaves):
            flat, record, gz = rebuild(leaves)
            return call(flat, own, record, gz)

        # Under `jax.vmap`: the same call, of the mapped solve.
        @primal.def_vmap
        def _(size, batched, *leaves):
            flat, record, gz = rebuild(leaves)
            b_flat, b_record, b_gz = jax.tree.unflatten(treedef, batched)
            gz = with_axis(size, gz, b_gz)
            if any(jax.tree.leaves((b_flat, b_record))):
                record = with_axis(size, record, b_record)
                out = wrapped(flat.mapped(size, b_flat, own), own, record, gz)
            else:  # several cotangents of one solve
                out = jax.vmap(lambda gz: call(flat, own, record, gz))(gz)
            return out, jax.tree.map(lambda _: True, out)

        return primal(*leaves)

    return wrapped

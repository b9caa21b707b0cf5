"""Pytree arithmetic, norms with a safe gradient at zero, mesh axes, and derivative rules."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool, Float, Inexact, PyTree, Shaped

Axes = frozenset[Any]


def scale(a: Any, x: PyTree) -> PyTree:
    """`a x` leaf by leaf, in the dtype of `x`.

    `a` is a number, an array that broadcasts against each leaf, or a pytree prefix of `x` of these.
    """
    return jax.tree.map(lambda a, x: aligned(a, x) * x, jax.tree.broadcast(a, x), x)


def aligned(a: Any, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """`a` in the dtype of `x`, with as many axes if it is no number."""
    a = jnp.asarray(a, x.dtype)
    return a.reshape((1,) * (x.ndim - a.ndim) + a.shape) if a.ndim else a


def add(x: PyTree, y: PyTree) -> PyTree:
    """`x + y` leaf by leaf, in the dtype of `x`."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), x, y)


def lincomb(a: Any, x: PyTree, b: Any, y: PyTree) -> PyTree:
    """`a x + b y` leaf by leaf, in the dtype of `x`; `a` and `b` are as in `scale`."""
    return add(scale(a, x), scale(b, y))


def as_real(tree: PyTree) -> PyTree:
    """`tree` as a vector over the reals: each complex leaf as the pair of its parts.

    An f that takes a conjugate, a modulus or a real part is linear over the reals alone, and so is
    its derivative. Code that combines or solves works on this view, with real coefficients, and is
    then right for every f; a tree of real leaves stays as it is.
    """
    return jax.tree.map(lambda x: (jnp.real(x), jnp.imag(x)) if jnp.iscomplexobj(x) else x, tree)


def from_real(tree: PyTree, like: PyTree) -> PyTree:
    """The inverse of `as_real`; the complex leaves are those of `like`."""
    leaf = lambda like, x: jax.lax.complex(*x) if jnp.iscomplexobj(like) else x
    return jax.tree.map(leaf, like, tree)


def conjugate(tree: PyTree) -> PyTree:
    """The complex conjugate.

    JAX pairs a cotangent g with a tangent t as `Re(g t)`: the inner product of conj(g) with t.
    """
    return jax.tree.map(jnp.conj, tree)


def dot(x: PyTree, y: PyTree) -> Inexact[Array, ""]:
    """The inner product over the reals in float32 or wider; for complex leaves `Re <x, y>`."""
    terms = jax.tree.map(lambda x, y: jnp.sum(widen(x) * widen(y)), as_real(x), as_real(y))
    return _join(jnp.sum, jax.tree.leaves(terms))


def select(mask: Bool[Array, "..."], new: PyTree, old: PyTree) -> PyTree:
    """`new` where `mask`, `old` elsewhere; `mask` lines up with the leading axes of each leaf."""

    def leaf(n, o):
        return jnp.where(mask.reshape(mask.shape + (1,) * (n.ndim - mask.ndim)), n, o)

    return jax.tree.map(leaf, new, old)


def widen(x: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """`x` in float32 or wider, so that an error is never measured in half precision."""
    return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def cast(tree: PyTree, like: PyTree) -> PyTree:
    """`tree` leaf by leaf in the dtypes of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def unify(tree: PyTree) -> PyTree:
    """All leaves in the widest of their dtypes; JAX's strict promotion does not do this."""
    dtype = np.result_type(*(x.dtype for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def flat(tree: PyTree, rank: int) -> Float[Array, "*b n"]:
    """All entries of each problem on one axis, in float32 or wider."""
    leaves = unify([widen(x) for x in jax.tree.leaves(tree)])
    return jnp.concatenate([x.reshape(*x.shape[:rank], -1) for x in leaves], -1)


def unflat(vector: Float[Array, "*b n"], like: PyTree) -> PyTree:
    """`vector` in the structure, shapes and dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    ends = list(itertools.accumulate(math.prod(x.shape[vector.ndim - 1 :]) for x in leaves))
    parts = jnp.split(vector, ends[:-1], -1)
    back = [p.reshape(x.shape).astype(x.dtype) for p, x in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, back)


def _join(combine: Callable, scalars: list[Array]) -> Array:
    return combine(jnp.stack(unify(scalars)))


def max_abs(tree: PyTree) -> Inexact[Array, ""]:
    """The largest magnitude in `tree`, float32 or wider; NaN if any entry is; 0 for no entries."""
    return _join(jnp.max, [jnp.max(jnp.abs(widen(x)), initial=0) for x in jax.tree.leaves(tree)])


def two_norm(tree: PyTree) -> Inexact[Array, ""]:
    """Euclidean norm of all of `tree`, float32 or wider, with derivative 0 at 0."""
    leaves = jax.tree.leaves(as_real(tree))
    total = _join(jnp.sum, [jnp.sum(jnp.square(widen(x))) for x in leaves])
    # sqrt has an infinite derivative at 0, and 0 * inf = NaN; the inner where keeps it away.
    return jnp.where(total == 0, 0, jnp.sqrt(jnp.where(total == 0, 1, total)))


def quotient(a: Inexact[Array, "*s"], b: Inexact[Array, "*s"]) -> Inexact[Array, "*s"]:
    """`a / b` that never divides by 0: 0 where a is 0 too, infinite where b alone is."""
    # The unused branch of `where` divides as well, and debuggers report a division by 0.
    divided = a / jnp.where(b == 0, 1, b)
    return jnp.where((b == 0) & (a != 0), jnp.inf, divided)


def per_problem(fn: Callable, rank: int) -> Callable:
    """Maps `fn` of one problem over `rank` leading axes of every array, except scalars."""
    for _ in range(rank):
        fn = eqx.filter_vmap(fn, in_axes=lambda x: 0 if eqx.is_array(x) and x.ndim else None)
    return fn


def is_traced(x: Any) -> bool:
    """Whether the value of `x` is unknown until run time."""
    return isinstance(x, jax.core.Tracer)


def opaque(tree: PyTree) -> PyTree:
    """Hides the values of the arrays in `tree` from XLA's compiler, even those of constants."""
    # One barrier per array: a common one gives all of them tangents, and needs equal mesh axes.
    hide = lambda x: jax.lax.optimization_barrier(x) if eqx.is_array(x) else x
    return jax.tree.map(hide, tree)


def mesh_axes(*trees: PyTree) -> Axes:
    """The `jax.shard_map` mesh axes over which some leaf varies; empty outside `jax.shard_map`."""
    avals = [jax.typeof(x) for x in jax.tree.leaves(eqx.filter(trees, eqx.is_array))]
    return frozenset().union(*(x.mat.varying if hasattr(x, "mat") else x.vma for x in avals))


def vary(tree: PyTree, axes: Axes) -> PyTree:
    """Marks every array of `tree` as varying over `axes`.

    Loop carries must have one type throughout: inside `jax.shard_map` a constant initial value is
    "invariant" while f's output varies. Differentiating this cast gives the sum over devices.
    """

    def leaf(x: Shaped[Array, "..."]):
        missing = tuple(sorted(axes - mesh_axes(x), key=str))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(lambda x: leaf(x) if eqx.is_array(x) else x, tree) if axes else tree


def stop_gradient(tree: PyTree) -> PyTree:
    """`jax.lax.stop_gradient` on the inexact arrays of any pytree."""
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def strong(tree: PyTree) -> PyTree:
    """`tree` as strongly typed arrays."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), tree)


def attach(out: PyTree, inputs: PyTree, tangent: Callable[[PyTree, PyTree, PyTree], PyTree]):
    """`out`, with the derivative `tangent(out, inputs, tangents of inputs)` and no other one.

    Tangents are None where they are zero; those returned have the types of `out`, mesh axes too.
    JAX forgets the rule of a `jax.custom_jvp` function in partial evaluation, for instance of
    `jax.checkpoint` inside a scan, where only the second derivative shows it. A primitive keeps
    its rule.
    """
    values, rest = eqx.partition(out, eqx.is_inexact_array)
    values, out_tree = jax.tree.flatten(values)
    arrays, static = eqx.partition((rest, inputs, tangent), eqx.is_array)
    others, in_tree = jax.tree.flatten(arrays)

    def rule(values, others, moved):
        rest, inputs, tangent = eqx.combine(in_tree.unflatten(others), static)
        out = eqx.combine(out_tree.unflatten(values), rest)
        return out_tree.flatten_up_to(tangent(out, inputs, in_tree.unflatten(moved)[1]))

    values = _attach_p.bind(*values, *others, rule=rule, count=len(values))
    return eqx.combine(out_tree.unflatten(values), rest)


def straight_through(exact: PyTree, real: PyTree) -> PyTree:
    """`exact` with the derivative of `real`: a straight-through estimator for rounding."""
    return attach(exact, real, lambda out, real, tangent: tangent)


def _first(*operands, rule, count):
    del rule
    return list(operands[:count])


def _attach_jvp(operands, tangents, *, rule, count):
    out = _attach_p.bind(*operands, rule=rule, count=count)
    others = list(operands[count:])
    moved = [None if isinstance(t, ad.Zero) else t for t in tangents[count:]]
    t_out = [None] * count if all(t is None for t in moved) else rule(out, others, moved)
    zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
    return out, [zero(x) if t is None else t for x, t in zip(out, t_out, strict=True)]


def _attach_batch(axis, operands, places, *, rule, count):
    if all(a is None for a in places):
        return _attach_p.bind(*operands, rule=rule, count=count), [None] * count
    front = [
        x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, places, strict=True)
    ]
    # The tangent of each value may depend on what is mapped, so that all of them are.
    for i in range(count):
        if places[i] is None:
            front[i] = jnp.broadcast_to(front[i], (axis.size, *front[i].shape))
    axes = [None if a is None else 0 for a in places[count:]]
    names = {"axis_name": axis.name, "spmd_axis_name": axis.spmd_name}
    mapped = jax.vmap(rule, in_axes=(0, axes, axes), axis_size=axis.size, **names)
    return _attach_p.bind(*front, rule=mapped, count=count), [0] * count


_attach_p = Primitive("deqjax_attach")
_attach_p.multiple_results = True
_attach_p.def_impl(_first)
_attach_p.def_abstract_eval(_first)
ad.primitive_jvps[_attach_p] = _attach_jvp
batching.fancy_primitive_batchers[_attach_p] = _attach_batch
mlir.register_lowering(_attach_p, mlir.lower_fun(_first, multiple_results=True))

"""The derivative of the steps of the reversible iteration, as one linear operation.

It is a primitive in order to have its own transpose: the backward sweep, which needs the last two
states and not the ones between. Under `jax.vmap` it is again one such operation, of the mapped
solve, so that an array that examples share has one cotangent; `jax.custom_vjp` would make one per
example.
"""

import functools as ft
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

from ..._iterate import checkpointed_while, last_steps, lax_while
from ..._tree import attach, mesh_axes, stop_gradient, vary
from ...solvers import Reversible
from ._flat import Flat, with_axis
from ._sweep import Cotangents, Record, judged, sweep


def steps(flat: Flat, diff: Cotangents, num_steps: Any, while_loop: Callable) -> PyTree:
    """`s[n]` by the real recurrence, as a function of `diff`: the function to differentiate."""
    arrays = [x if new is None else new
              for x, new in zip(flat.to_own(flat.arrays), diff.arrays, strict=True)]  # fmt: skip
    beta = flat.solver.relaxation if diff.beta is None else diff.beta
    solver = Reversible(0.0, 0.0, beta=beta, exact=False)
    fn = lambda z, arrays: (flat.own_f(arrays, z), None)
    inputs = (fn, solver, diff.z0, arrays, flat.budget, while_loop)
    return last_steps(inputs, num_steps, flat.tape.last)[0]


def chosen(flat: Flat, own: Sequence[bool]) -> Cotangents:
    """The quantities that are differentiated."""
    arrays = [x if o else None for x, o in zip(flat.to_own(flat.arrays), own, strict=True)]
    return Cotangents(arrays, flat.z0, flat.solver.learned)


def linear(flat: Flat, record: Record, tangents: Cotangents, on_failure: str) -> PyTree:
    """The tangent of `s[n]` from those of arrays, z0 and beta; its transpose is `backward`."""
    return eqxi.filter_primitive_bind(_linear_p, flat, record, tangents, on_failure)


def backward(flat: Flat, own: Sequence[bool], record: Record, gz: PyTree) -> tuple[Cotangents, Any]:
    """`sweep`, with its own derivative rule."""
    out = sweep(stop_gradient(flat), own, stop_gradient(record), stop_gradient(gz))
    return attach(out, (flat, own, record, gz), _tangent_of_sweep)


def _tangent_of_sweep(out: PyTree, inputs: PyTree, t_inputs: PyTree) -> PyTree:
    flat, own, record, gz = inputs
    t_flat, _, _, t_gz = t_inputs

    # The states depend on the perturbed values too: differentiate the recurrence from its start,
    # by checkpoints, since reversal would amplify the rounding of the states' tangents.
    moving, still = eqx.partition(flat, eqx.is_inexact_array)

    def vjp(moving, gz):
        flat = eqx.combine(moving, still)
        run = lambda diff: steps(flat, diff, record.num_steps, checkpointed_while)
        return jax.vjp(run, chosen(flat, own))[1](gz)[0]

    _, t_out = jax.jvp(vjp, (moving, gz), (_zeros(moving, t_flat), _zeros(gz, t_gz)))
    return t_out, jax.tree.map(lambda _: None, out[1])


def tangents_of(flat: Flat, t_flat: Flat) -> Cotangents:
    """The tangents in `t_flat`: None for arrays without one, zeros for z0 and beta."""
    diff = chosen(flat, [t is not None for t in t_flat.arrays])
    t_beta = None if diff.beta is None else t_flat.solver.beta
    return _zeros(diff, Cotangents(t_flat.arrays, t_flat.z0, t_beta))


def _zeros(tree: PyTree, tangents: PyTree) -> PyTree:
    is_none = lambda x: x is None
    zero = lambda x, t: None if x is None else jnp.zeros_like(x) if t is None else t
    return jax.tree.map(zero, tree, tangents, is_leaf=is_none)


def _impl(flat, record, tangents, on_failure, while_loop=lax_while):
    del on_failure
    own = [t is not None for t in tangents.arrays]
    run = lambda diff: steps(flat, diff, record.num_steps, while_loop)
    _, t_z = jax.jvp(run, (chosen(flat, own),), (tangents,))
    return vary(t_z, mesh_axes(record))


def _abstract(flat, record, tangents, on_failure):
    del tangents, on_failure
    like = lambda state, x: state.update(dtype=x.dtype, weak_type=False)
    return jax.tree.map(like, record.pair[1], flat.z0)


def _jvp(primals, tangents):
    flat, record, t, on_failure = primals
    t_flat, _, t_t, _ = tangents
    out = linear(flat, record, t, on_failure)
    t_t = _zeros(t, t_t)
    if not jax.tree.leaves(t_flat):
        return out, linear(flat, record, t_t, on_failure)
    moving, still = eqx.partition(flat, eqx.is_inexact_array)
    both = lambda m, t: _impl(eqx.combine(m, still), record, t, on_failure, checkpointed_while)
    return out, jax.jvp(both, (moving, t), (_zeros(moving, t_flat), t_t))[1]


def _transpose(inputs, gz):
    flat, record, tangents, on_failure = inputs
    own = [t is not None for t in tangents.arrays]
    out, found = backward(flat, own, record, gz)
    out = judged(flat, out, found, gz, on_failure)
    asked = lambda t, g: g if ad.is_undefined_primal(t) else None
    out = jax.tree.map(asked, tangents, out, is_leaf=ad.is_undefined_primal)
    nothing = jax.tree.map(lambda _: None, (flat, record))
    return *nothing, out, None


def _batch(inputs, axes):
    leaves, treedef = jax.tree.flatten(inputs)
    places = list(zip(leaves, treedef.flatten_up_to(axes), strict=True))
    size = next(x.shape[a] for x, a in places if a is not None)
    front = [x if a is None else jnp.moveaxis(x, a, 0) for x, a in places]
    flat, record, t, on_failure = jax.tree.unflatten(treedef, front)
    b_flat, b_record, b_t, _ = jax.tree.unflatten(treedef, [a is not None for _, a in places])
    # An array with a tangent per example needs a copy per example, and the reverse.
    own = [
        t is not None and (b or c)
        for t, b, c in zip(t.arrays, b_flat.arrays, b_t.arrays, strict=True)
    ]
    spread = ft.partial(with_axis, size)
    arrays = [spread(t, b) if o else t for t, b, o in zip(t.arrays, b_t.arrays, own, strict=True)]
    t = Cotangents(arrays, spread(t.z0, b_t.z0), spread(t.beta, b_t.beta))
    out = linear(flat.mapped(size, b_flat, own), spread(record, b_record), t, on_failure)
    return out, jax.tree.map(lambda _: 0, out)


_linear_p = Primitive("deqjax_reversible")
_linear_p.multiple_results = True
_linear_p.def_impl(eqxi.filter_primitive_def(_impl))
_linear_p.def_abstract_eval(eqxi.filter_primitive_def(_abstract))
ad.primitive_jvps[_linear_p] = eqxi.filter_primitive_jvp(_jvp)
ad.primitive_transposes[_linear_p] = eqxi.filter_primitive_transpose(
    _transpose, materialise_zeros=True
)
batching.primitive_batchers[_linear_p] = eqxi.filter_primitive_batching(_batch)
mlir.register_lowering(
    _linear_p, mlir.lower_fun(eqxi.filter_primitive_def(_impl), multiple_results=True)
)

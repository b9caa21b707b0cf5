"""A function of arrays, traced as it is now, with every array that it reads as an argument.

Two traced functions are equal if and only if all their equations, parameters, literals and abstract
values are. A function that cannot be compared is equal only to itself.
"""

import contextlib
import functools as ft
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import Sharding
from jaxtyping import Array, PyTree

from ._bilinear import replaced
from ._compare import Fleeting, alone, jaxpr_key, static_fields, static_key


class Body:
    """The jaxpr of a function of a list of arrays, and the structure of its output."""

    def __init__(self, jaxpr: Jaxpr, out_tree: Any, out_static: PyTree):
        self.jaxpr, self.out_tree, self.out_static = jaxpr, out_tree, out_static

    @ft.cached_property
    def key(self) -> Hashable:
        """The value that equality compares; None for a body that is equal only to itself."""
        static, treedef = jax.tree.flatten(self.out_static)
        try:
            static = tuple(map(static_key, (*static, *static_fields(self.out_static))))
            return jaxpr_key(self.jaxpr, ()), self.out_tree, treedef, static
        except Fleeting:
            return None

    @ft.cached_property
    def _hash(self) -> int:
        return id(self) if self.key is None else hash(self.key)

    @ft.cached_property
    def multiplies(self) -> bool:
        """Whether it has products, outside of loops, for which `_bilinear.py` has a better form."""
        return _multiplies(self.jaxpr)

    @ft.cached_property
    def replaced(self) -> Callable[[Any], Any]:
        """Maps an equation that multiplies to its better form, or to None if there is none."""
        # One form per called function, so that JAX lowers a function once even if called often.
        calls = {}

        def form(eqn):
            body = _nested(eqn)
            if body in calls:
                return calls[body]
            if body is None or not _multiplies(body.jaxpr):
                return _in_place(eqn, replaced(eqn))
            call = lambda *inputs: _evaluated(body.jaxpr, body.consts, inputs, form)
            call.__name__ = eqn.params["name"]
            return calls.setdefault(body, jax.jit(call))

        return form

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Body) and self.key is not None and self.key == other.key


class Traced(eqx.Module):
    """A function as it was when traced; a call ignores the static parts of its inputs."""

    consts: list[Array]
    body: Body = eqx.field(static=True)

    def __call__(self, *inputs: PyTree) -> PyTree:
        arrays = jax.tree.leaves(eqx.filter(inputs, eqx.is_array))
        jaxpr = self.body.jaxpr
        if self.body.multiplies:
            out = _evaluated(jaxpr, self.consts, arrays, self.body.replaced)
        else:
            out = jax.core.eval_jaxpr(jaxpr, self.consts, *arrays)
        return eqx.combine(jax.tree.unflatten(self.body.out_tree, out), self.body.out_static)

    @property
    def out_struct(self) -> PyTree:
        """The structure, shapes and dtypes of the output."""
        avals: list[Any] = [v.aval for v in self.body.jaxpr.outvars]
        structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        return eqx.combine(jax.tree.unflatten(self.body.out_tree, structs), self.body.out_static)


def trace(fn: Callable, *inputs: PyTree) -> Traced:
    """Traces `fn` as it is now, for inputs like `inputs`."""
    arrays, static = eqx.partition(inputs, eqx.is_array)
    leaves, treedef = jax.tree.flatten(arrays)
    form = []

    def flat(*leaves):
        out = fn(*eqx.combine(jax.tree.unflatten(treedef, leaves), static))
        out, rest = eqx.partition(out, eqx.is_array)
        out, out_tree = jax.tree.flatten(out)
        form.append((out_tree, rest))
        return out

    closed = jax.make_jaxpr(flat)(*leaves)
    if _holds(closed.jaxpr):
        inlined = lambda *leaves: _evaluated(closed.jaxpr, closed.consts, leaves, _opened)
        closed = jax.make_jaxpr(inlined)(*leaves)
    return Traced(closed.consts, Body(closed.jaxpr, *form[0]))


def _nested(eqn: Any) -> ClosedJaxpr | None:
    """The function that a nested `jax.jit` calls; None for another equation, or with shardings."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    places = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
    return None if any(isinstance(s, Sharding) for s in places) else eqn.params["jaxpr"]


def _bodies(jaxpr: Jaxpr) -> list[ClosedJaxpr]:
    return [body for eqn in jaxpr.eqns if (body := _nested(eqn)) is not None]


def _holds(jaxpr: Jaxpr) -> bool:
    """Whether a nested `jax.jit` closes over arrays, which its program would keep."""
    return any(body.consts or _holds(body.jaxpr) for body in _bodies(jaxpr))


def _opened(eqn: Any) -> Callable | None:
    """The inlined form of a nested `jax.jit` that closes over arrays; None for another equation."""
    body = _nested(eqn)
    if body is None or not (body.consts or _holds(body.jaxpr)):
        return None
    return lambda *inputs: _evaluated(body.jaxpr, body.consts, inputs, _opened)


def _multiplies(jaxpr: Jaxpr) -> bool:
    """Whether `jaxpr`, or a nested `jax.jit` in it, has products to replace."""
    return any(map(replaced, jaxpr.eqns)) or any(_multiplies(b.jaxpr) for b in _bodies(jaxpr))


def _in_place(eqn: Any, product: Callable | None) -> Callable | None:
    """`product` with the equation's name and context, for instance its memory."""
    if product is None:
        return None

    def call(*inputs):
        name = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(name) if name else contextlib.nullcontext():
            return [product(*inputs)]

    return call


def _evaluated(
    jaxpr: Jaxpr, consts: Any, inputs: Any, other: Callable[[Any], Callable | None]
) -> list[Array]:
    """Evaluates `jaxpr`, using the `other` form of each equation that has one."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else values[v]
    for eqn in jaxpr.eqns:
        form = other(eqn) or alone(jaxpr, eqn)
        values |= dict(zip(eqn.outvars, form(*map(read, eqn.invars)), strict=True))
    return [read(v) for v in jaxpr.outvars]

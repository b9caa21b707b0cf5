"""A hashable form of a jaxpr and of its static inputs, by which programs are compared.

The form has every equation, parameter, literal and abstract value. An object that cannot be
compared, or would keep more alive than the user does, raises `Fleeting`.
"""

import dataclasses
import dis
import functools as ft
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from ._tree import is_traced

# An array inside the program with more entries is not compared: a program would keep it.
_LARGEST = 1024
# A derivative rule may call its own function; the same rule is traced at most this many times.
_DEEPEST = 2
# The libraries whose functions, objects and modules read nothing that changes.
_LIBRARIES = frozenset(
    "builtins collections deqjax equinox jax jaxlib lineax math ml_dtypes numpy optimistix "
    "paramax".split()
)


class Fleeting(Exception):
    """Raised for an object that cannot be compared or may not be kept: no program is looked up."""


def alone(jaxpr: Jaxpr, eqn: Any) -> Callable:
    """One equation of `jaxpr` as a function of its inputs; inputs for literals are ignored."""
    names = [None if isinstance(v, Literal) else v for v in eqn.invars]
    unique: Any = list(dict.fromkeys(v for v in names if v is not None))
    one = jaxpr.replace(constvars=[], invars=unique, outvars=eqn.outvars, eqns=[eqn])

    def call(*inputs):
        values = dict(zip(names, inputs, strict=True))
        return jax.core.eval_jaxpr(one, (), *(values[v] for v in unique))

    return call


def jaxpr_key(jaxpr: Jaxpr, rules: tuple) -> Hashable:
    """The compared form of `jaxpr`; `rules` are the derivative rules that it is a part of."""
    names = {v: i for i, v in enumerate((*jaxpr.constvars, *jaxpr.invars))}

    def name(v):
        if isinstance(v, Literal):
            aval: Any = v.aval
            return _value(np.asarray(v.val, aval.dtype)), aval
        return names[v]

    lines = []
    for eqn in jaxpr.eqns:
        inputs = tuple(map(name, eqn.invars))
        for v in eqn.outvars:
            names[v] = len(names)
        outputs = tuple(v.aval for v in eqn.outvars)
        ruled = eqn.primitive.name in _RULES
        params = _rule(jaxpr, eqn, rules) if ruled else _param(eqn.params, rules)
        lines.append((eqn.primitive, inputs, outputs, params, _context(eqn)))
    avals = tuple(v.aval for v in (*jaxpr.constvars, *jaxpr.invars))
    return len(jaxpr.constvars), avals, tuple(lines), tuple(map(name, jaxpr.outvars))


def _context(eqn: Any) -> Hashable:
    """The settings under which an equation was traced, for instance the mesh."""
    names = [s for s in getattr(type(eqn.ctx), "__slots__", ()) if not s.startswith("_")]
    return tuple(static_key(getattr(eqn.ctx, s, None)) for s in names) or static_key(eqn.ctx)


def _param(x: Any, rules: tuple) -> Hashable:
    if isinstance(x, ClosedJaxpr):
        return "closed", jaxpr_key(x.jaxpr, rules), tuple(map(_value, x.consts))
    if isinstance(x, Jaxpr):
        return "open", jaxpr_key(x, rules)
    return static_key(x, lambda y: _param(y, rules))


def _rule(jaxpr: Jaxpr, eqn: Any, rules: tuple) -> Hashable:
    """The compared form of a call with a derivative rule, whose parameters are new functions."""
    kept = {k: v for k, v in eqn.params.items() if isinstance(v, bool | int | ClosedJaxpr | Jaxpr)}
    this = _param(kept, rules)
    # A rule may call its own function, which has the same rule; the one of `jax.nn.relu` does.
    if rules.count(this) == _DEEPEST:
        return "again", rules.index(this)
    # A program would keep the arrays that the function or its rule closes over. A rule that sees
    # which tangents are zero may differ for each set of zeros.
    closes = eqn.params.get("num_consts", 0) or eqn.params.get("symbolic_zeros", True)
    if closes or len(rules) > 2 * _DEEPEST:
        raise Fleeting
    inputs, outputs = ([v.aval for v in vs] for vs in (eqn.invars, eqn.outvars))
    rule, f = _RULES[eqn.primitive.name], alone(jaxpr, eqn)
    seeds = [a for a in (inputs if rule is _pushed else outputs) if _moves(a)]
    like = lambda avals: [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    try:
        derivative = jax.make_jaxpr(ft.partial(rule, f))(like(inputs), like(seeds))
    except Exception as error:  # the rule raises; the function may never be differentiated
        raise Fleeting from error
    return this, jaxpr_key(derivative.jaxpr, (*rules, this)), tuple(map(_value, derivative.consts))


def _moves(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _seeded(xs: list, seeds: list) -> list:
    """`seeds` for those of `xs` that have a tangent, float0 zeros for the others."""
    left = iter(seeds)
    return [next(left) if _moves(x) else np.zeros(x.shape, jax.dtypes.float0) for x in xs]


def _pushed(f: Callable, primals: list, tangents: list) -> PyTree:
    out, moved = jax.jvp(f, primals, _seeded(primals, tangents))
    return out, [t for x, t in zip(out, moved, strict=True) if _moves(x)]


def _pulled(f: Callable, primals: list, cotangents: list) -> PyTree:
    out, pull = jax.vjp(f, *primals)
    back = pull(_seeded(out, cotangents))
    return out, [g for x, g in zip(primals, back, strict=True) if _moves(x)]


_RULES = {"custom_jvp_call": _pushed, "custom_vjp_call": _pulled}


def _value(x: Any) -> Hashable:
    if is_traced(x) or x.size > _LARGEST or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise Fleeting
    x = np.asarray(x)
    return "value", x.dtype, x.shape, x.tobytes()


def static_key(x: Any, part: Callable | None = None) -> Hashable:
    """The compared form of an object that is not an array of the inputs, `part` by part."""
    part = part or static_key
    if isinstance(x, tuple | list):
        return type(x), *map(part, x)
    if isinstance(x, dict):
        return dict, *((k, part(x[k])) for k in sorted(x))
    if isinstance(x, float | complex):
        return type(x), repr(x)  # 0.0 is not -0.0, and NaN is NaN
    if eqx.is_array(x):
        return _value(x)
    if isinstance(x, types.FunctionType):
        return _function(x, 0)
    origin = x if isinstance(x, type | types.ModuleType) else type(x)
    if not isinstance(x, Hashable) or _changes(x) or not _of_library(origin):
        raise Fleeting
    classes: Any = type(x).__mro__
    slots = [s for c in classes for s in getattr(c, "__slots__", ())]
    parts = (*getattr(x, "__dict__", {}).values(), *(getattr(x, s, None) for s in slots))
    # A callback, for instance, would be kept, together with what it reads.
    if not isinstance(x, type) and any(map(_changes, parts)):
        raise Fleeting
    return type(x), x


def static_fields(x: Any) -> Iterator[Any]:
    """Yields the static fields of all modules in a tree; JAX compares them by `==`."""
    if isinstance(x, eqx.Module):
        if callable(x) and not _of_library(type(x)):
            raise Fleeting
        for field in dataclasses.fields(x):
            value = getattr(x, field.name, None)
            static = field.metadata.get("static", False)
            yield from [value] if static else static_fields(value)
    elif isinstance(x, list | tuple):
        for y in x:
            yield from static_fields(y)
    elif isinstance(x, dict):
        yield from static_fields([*x.values()])
    elif isinstance(x, ft.partial):
        raise Fleeting


def _changes(x: Any) -> bool:
    """Whether `x` may be called and then read something that has changed."""
    if isinstance(x, types.FunctionType):
        return not _of_library(x) or "<locals>" in x.__qualname__
    if isinstance(x, types.MethodType | ft.partial):
        return True
    return callable(x) and not isinstance(x, type) and not _of_library(type(x))


def _of_library(x: Any) -> bool:
    """Whether `x` is a library's module, or a function or class in one."""
    if isinstance(x, types.FunctionType):  # its __module__ may be copied from another function
        name = x.__globals__.get("__name__", "")
    else:
        name = x.__name__ if isinstance(x, types.ModuleType) else x.__module__
    return name.partition(".")[0] in _LIBRARIES


def _function(fn: types.FunctionType, depth: int) -> Hashable:
    """The code of a function that reads only its arguments, libraries, and other such functions."""
    if not _changes(fn):
        return fn
    if fn.__closure__ or depth > 4:
        raise Fleeting
    reads, codes = [], [fn.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        if any(i.opname == "IMPORT_NAME" for i in dis.get_instructions(code)):
            raise Fleeting
        for name in code.co_names:
            x = fn.__globals__.get(name)
            if isinstance(x, types.FunctionType):
                reads.append((name, _function(x, depth + 1)))
            elif x is None or (isinstance(x, types.ModuleType) and _of_library(x)):
                reads.append((name, x))
            else:
                raise Fleeting
    defaults = static_key([fn.__defaults__, fn.__kwdefaults__])
    return fn.__code__, defaults, tuple(reads)

"""What two programs are compared by: a hashable form of a jaxpr, and of what is beside it.

Every equation, parameter, literal and abstract value is in it. What cannot be compared, or would
keep more alive than the user does, raises `Fleeting`.
"""

import functools as ft
import types
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from ._tree import is_traced

# Entries of an array inside the program above which it is not compared: a program would keep it.
_LARGEST = 1024
# A derivative rule may call its own function; its rule is looked into so many times.
_DEEPEST = 2
# Whose functions and objects read nothing that changes.
_LIBRARIES = ("jax", "jaxlib", "equinox", "lineax", "optimistix", "deqjax")


class Fleeting(Exception):
    """Raised for what cannot be compared, or may not be kept: no program with it is looked up."""


def alone(jaxpr: Jaxpr, eqn: Any) -> Callable:
    """One equation of `jaxpr` as a function of its inputs, of which literals are ignored."""
    names = [None if isinstance(v, Literal) else v for v in eqn.invars]
    unique: Any = list(dict.fromkeys(v for v in names if v is not None))
    one = jaxpr.replace(constvars=[], invars=unique, outvars=eqn.outvars, eqns=[eqn])

    def call(*inputs):
        values = dict(zip(names, inputs, strict=True))
        return jax.core.eval_jaxpr(one, (), *(values[v] for v in unique))

    return call


def jaxpr_key(jaxpr: Jaxpr, rules: tuple) -> Hashable:
    """All of `jaxpr`, within the derivative `rules` of calls of which it is a part."""
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
    """The settings under which an equation was traced, the mesh for instance."""
    names = [s for s in type(eqn.ctx).__slots__ if not s.startswith("_")]
    return tuple(static_key(getattr(eqn.ctx, s, None)) for s in names)


def _param(x: Any, rules: tuple) -> Hashable:
    if isinstance(x, ClosedJaxpr):
        return "closed", jaxpr_key(x.jaxpr, rules), tuple(map(_value, x.consts))
    if isinstance(x, Jaxpr):
        return "open", jaxpr_key(x, rules)
    if isinstance(x, tuple | list):
        return type(x), *(_param(y, rules) for y in x)
    if isinstance(x, dict):
        return dict, *((k, _param(x[k], rules)) for k in sorted(x))
    return static_key(x)


def _rule(jaxpr: Jaxpr, eqn: Any, rules: tuple) -> Hashable:
    """What a call does that has a derivative rule: its parameters are functions, new every time."""
    kept = {k: v for k, v in eqn.params.items() if isinstance(v, bool | int | ClosedJaxpr | Jaxpr)}
    this = _param(kept, rules)
    # A rule may call its own function (that of `jax.nn.relu` does), which has the same rule.
    if rules.count(this) == _DEEPEST:
        return "again", rules.index(this)
    # Arrays of the function or of its rule would be kept by both.
    if eqn.params["num_consts"] or eqn.params["symbolic_zeros"] or len(rules) > 2 * _DEEPEST:
        raise Fleeting
    inputs = [v.aval for v in eqn.invars]
    like = lambda avals: [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals if _moves(a)]
    rule = _RULES[eqn.primitive.name]
    seeds = inputs if rule is _pushed else [v.aval for v in eqn.outvars]
    still = [None if _moves(a) else np.zeros(a.shape, a.dtype) for a in inputs]

    def f(*moving):
        left = iter(moving)
        return alone(jaxpr, eqn)(*(next(left) if x is None else x for x in still))

    derivative = jax.make_jaxpr(ft.partial(rule, f))(like(inputs), like(seeds))
    return this, jaxpr_key(derivative.jaxpr, (*rules, this)), tuple(map(_value, derivative.consts))


def _moves(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _pushed(f: Callable, primals: list, tangents: list) -> PyTree:
    return jax.jvp(f, tuple(primals), tuple(tangents))


def _pulled(f: Callable, primals: list, cotangents: list) -> PyTree:
    out, pull = jax.vjp(f, *primals)
    left = iter(cotangents)
    zero = lambda x: np.zeros(x.shape, jax.dtypes.float0)
    return out, pull([next(left) if _moves(x) else zero(x) for x in out])


_RULES = {"custom_jvp_call": _pushed, "custom_vjp_call": _pulled}


def _value(x: Any) -> Hashable:
    if is_traced(x) or x.size > _LARGEST or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        raise Fleeting
    x = np.asarray(x)
    return "value", x.dtype, x.shape, x.tobytes()


def static_key(x: Any) -> Hashable:
    """What is compared of something that is no array of the inputs; raises `Fleeting`."""
    if isinstance(x, float | complex):
        return type(x), repr(x)  # 0.0 is not -0.0, and NaN is NaN
    if eqx.is_array(x):
        return _value(x)
    if isinstance(x, types.FunctionType):
        return _function(x, 0)
    slots = [s for c in type(x).__mro__ for s in getattr(c, "__slots__", ())]
    parts = (*getattr(x, "__dict__", {}).values(), *(getattr(x, s, None) for s in slots))
    own = type(x).__module__.partition(".")[0] in _LIBRARIES
    changes = callable(x) and not isinstance(x, type) and not own
    changes |= any("<locals>" in getattr(y, "__qualname__", "") for y in parts)  # a new callback
    if changes or not isinstance(x, Hashable) or isinstance(x, types.MethodType | ft.partial):
        raise Fleeting
    return type(x), x


def _function(fn: types.FunctionType, depth: int) -> Hashable:
    """The code of a function that reads nothing but its arguments, modules, and such functions."""
    if fn.__module__.partition(".")[0] in _LIBRARIES and "<locals>" not in fn.__qualname__:
        return fn
    if fn.__closure__ or depth > 4:
        raise Fleeting
    reads = []
    codes = [fn.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        for name in code.co_names:
            x = fn.__globals__.get(name)
            if isinstance(x, types.FunctionType):
                reads.append((name, _function(x, depth + 1)))
            elif x is None or isinstance(x, types.ModuleType):
                reads.append((name, x))
            else:
                raise Fleeting
    defaults = _param([fn.__defaults__, fn.__kwdefaults__], ())
    return fn.__code__, defaults, tuple(reads)

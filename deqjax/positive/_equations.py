"""Parts of every walk over a jaxpr: its equations, and the error for those that are refused."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import PyTree

from .._step import evaluate

SWITCHES = frozenset("and eq ge gt is_finite le lt ne not or xor".split())
# Operations whose bodies see entries or parts of arrays, or references to them.
_OTHER_BODIES = frozenset("pallas_call reduce reduce_window shard_map xla_pmap".split())


class Scan(NamedTuple):
    """The parts of a scan; their numbers are no longer among its parameters in JAX 0.12."""

    body: ClosedJaxpr
    num_consts: int
    num_carry: int


def trace(fn: Callable, z: PyTree, args: PyTree) -> ClosedJaxpr:
    """Traces f to a jaxpr of z alone; `fn` is as `convert` returns it."""
    return jax.make_jaxpr(lambda z: evaluate(fn, z, args)[0])(z)


def body(eqn: Any) -> ClosedJaxpr | None:
    """The jaxpr of a call, such as `jax.jit` or a function with its own derivative rule."""
    bodies = [p for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if len(bodies) != 1 or eqn.primitive.name in _OTHER_BODIES:
        return None
    found = bodies[0] if isinstance(bodies[0], ClosedJaxpr) else ClosedJaxpr(bodies[0], ())
    return found if len(found.jaxpr.invars) == len(eqn.invars) else None


def everything(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """Yields `jaxpr` and the jaxprs in its equations, at every depth."""
    is_body = lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
    yield jaxpr
    for eqn in jaxpr.eqns:
        for x in filter(is_body, jax.tree.leaves([*eqn.params.values()], is_leaf=is_body)):
            yield from everything(x.jaxpr if isinstance(x, ClosedJaxpr) else x)


def calls(jaxpr: Jaxpr, name: str) -> bool:
    """Whether an operation whose name begins with `name` is anywhere in `jaxpr`."""
    return any(e.primitive.name.startswith(name) for j in everything(jaxpr) for e in j.eqns)


def scan_parts(eqn: Any) -> Scan:
    """Finds the parts of a scan by ranks: rows have one axis less in the body."""
    inside = eqn.params["jaxpr"]
    same = lambda outer, inner: len(outer.aval.shape) == len(inner.aval.shape)
    whole = sum(map(same, eqn.invars, inside.jaxpr.invars))
    carry = sum(map(same, eqn.outvars, inside.jaxpr.outvars))
    return Scan(inside, whole - carry, carry)


def constants(eqn: Any) -> list[float]:
    """The scalars that are written into an equation."""
    return [float(v.val) for v in eqn.invars if isinstance(v, Literal) and jnp.ndim(v.val) == 0]


def is_softplus(eqn: Any) -> bool:
    """Whether this is JAX's own softplus, by its body; there, differences do not cancel."""
    if eqn.params.get("name") != "softplus" or len(eqn.invars) != 1:
        return False
    aval = eqn.invars[0].aval
    own = jax.make_jaxpr(jax.nn.softplus)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return str(own.jaxpr.eqns[0].params.get("jaxpr")) == str(eqn.params.get("jaxpr"))


def terms(eqn: Any) -> int | None:
    """The length of the sums that an operation forms; None if it forms none."""
    # Products, then sums.
    shapes = [v.aval.shape for v in eqn.invars]
    match eqn.primitive.name:
        case "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            return math.prod(shapes[0][i] for i in contracted)
        case "conv_general_dilated":
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            return math.prod(shapes[1]) // shapes[1][features]
        case "deqjax_conv2d":
            return math.prod(shapes[1][:3])
        case "deqjax_conv2d_image":
            return math.prod(shapes[1]) // shapes[1][2]
        case "deqjax_dense":
            return shapes[1][0]
        case "reduce_sum":
            return math.prod(shapes[0][i] for i in eqn.params["axes"])
        case "cumsum":
            return shapes[0][eqn.params["axis"]]
        case "reduce_window_sum":
            return math.prod(eqn.params["window_dimensions"])
        case _:
            return None


def refusal(name: str, kind: str, what: str) -> ValueError:
    """The error for an operation about which nothing is known, or that cancels."""
    return ValueError(
        f"{name} expects fn to consist of sums, products, quotients and functions of "
        f"nonnegative numbers whose rounding it can count, got {kind!r}, which {what}; use "
        f"another form (jnp.log1p, jax.nn.sigmoid, -jnp.expm1(-u)), or, if you know that the "
        f"relative error of fn is about that of one sum, pass fan_in=the number of terms of its "
        f"longest sum."
    )

"""Bilinear operations as primitives, and a matrix product that stays a product of two matrices.

`jax.custom_vjp` has no forward mode, and under `jax.vmap` with a shared weight it makes one weight
cotangent per example. `jax.custom_derivatives.linear_call` cannot be batched. A primitive has
forward mode and batching, and its own lowering on a CPU. The product is

    y = x w,    dx = dy w^T,    dw = x^T dy

With an ordinary product under `jax.vmap`, or an x of three axes, the cotangent of the weight
contracts two axes, batch and position; on a CPU the backward pass of an attention block then takes
one and a half times as long. Here the leading axes become rows. The product is formed in the dtype
of x, whatever the dtype of w, and the cotangent of w has the dtype of w: parameters in float32,
products in bfloat16, the cotangents of many evaluations summed in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, PartitionSpec as P
from jaxtyping import Array, DTypeLike, Float

from ._tree import mesh_axes, vary

_STATIC = ("out", "precision", "size", "stride")
_STOCK = {}


def primitive(name: str, ours: Callable, stock: Callable, shape: Callable) -> Primitive:
    """The primitive that computes `stock(a, b, **params)`, on a CPU by `ours`.

    The result has the shape `shape(a, b, **params)`, and the dtype of the parameter `out`, or of
    the operands if there is no such parameter.
    """
    made = Primitive(name)
    bound = lambda a, b, **params: made.bind(a, b, **params)
    made.def_impl(jax.jit(bound, static_argnames=_STATIC))

    def abstract(a, b, **params):
        # `update` keeps the mesh axes; in `bind` both operands vary over the same ones.
        to = shape(a, b, **params)
        sharding = a.sharding.update(spec=P(*[None] * len(to)))
        dtype = params.get("out", a.dtype)
        return a.update(shape=to, dtype=dtype, weak_type=False, sharding=sharding)

    made.def_abstract_eval(abstract)
    mlir.register_lowering(made, mlir.lower_fun(stock, multiple_results=False))
    mlir.register_lowering(made, mlir.lower_fun(ours, multiple_results=False), platform="cpu")
    _STOCK[made] = stock
    return made


def bind(primitive: Primitive, a: Array, b: Array, **params: Any) -> Array:
    """Applies the primitive to two arrays, also inside `jax.shard_map`."""
    # Shardings that are part of a type are left to JAX's own rules.
    if any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in (a, b)):
        return _STOCK[primitive](a, b, **params)
    axes = mesh_axes(a, b)
    return primitive.bind(vary(a, axes), vary(b, axes), **params)


def default_precision() -> Any:
    """The current matrix precision; lowering happens outside of the context that sets it."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def asks_highest(precision: Any) -> bool:
    """Whether `precision` uses both operands of a product unrounded, on every platform."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(str(p).lower().rpartition(".")[2] in ("highest", "float32") for p in both)


def dense(
    x: Float[Array, "... i"], w: Float[Array, "i o"], out: DTypeLike | None = None
) -> Float[Array, "... o"]:
    """Computes `x w` in the dtype of x; sums and returns it in `out` (default: the dtype of x).

    The cotangent is cast to the dtype of x before its products are formed.
    """
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"The product expects x of shape (..., {w.shape[0]}) for a weight of shape {w.shape}, "
            f"got {x.shape}; pass x as (..., in) and the weight as (in, out)."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"The product expects x of a floating-point dtype, got {x.dtype}; cast x, for instance "
            f"to {w.dtype}."
        )
    out = jnp.dtype(x.dtype if out is None else out)
    return bind(dense_p, x, w, out=out, precision=default_precision())


def replaced(eqn: Any) -> Any:
    """A function that computes a jaxpr's equation by `dense_p`; None if it is no such product."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return None
    avals: Any = [v.aval for v in eqn.invars]
    (left, right), shared = eqn.params["dimension_numbers"]
    # A product with several dtypes is left alone: its cotangent is summed in the wider one.
    dtypes = {a.dtype for a in (*avals, eqn.outvars[0].aval)}
    floats = all(jnp.issubdtype(d, jnp.floating) for d in dtypes)
    plain = floats and len(dtypes) == 1 and not any(shared)
    precision = eqn.params["precision"]
    same = precision is None or (isinstance(precision, tuple) and len({*precision}) == 1)
    if not (plain and same and len(left) == 1):
        return None
    dims = [a.ndim for a in avals]
    params = {"out": eqn.outvars[0].aval.dtype, "precision": precision}
    of = lambda x, w, axis: bind(dense_p, x, w.T if axis else w, **params)
    if dims[1] == 2 <= dims[0] and left[0] == dims[0] - 1:
        return lambda a, b: of(a, b, right[0])
    if dims[0] == 2 < dims[1] and right[0] == dims[1] - 1:
        return lambda a, b: jnp.moveaxis(of(b, a, left[0] == 1), -1, 0)
    return None


def _rows(x):
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _stock(x, w, *, out, precision):
    return jnp.matmul(x, w.astype(x.dtype), precision=precision, preferred_element_type=out)


def _flat(x, w, **params):
    return _stock(_rows(x), w, **params).reshape(*x.shape[:-1], w.shape[1])


def _stock_right(x, g, *, out, precision):
    lead = tuple(range(x.ndim - 1))
    wide = out if jnp.finfo(out).bits >= 32 else jnp.float32
    options = {"precision": precision, "preferred_element_type": wide}
    return lax.dot_general(x, g.astype(x.dtype), ((lead, lead), ((), ())), **options).astype(out)


def _flat_right(x, g, **params):
    return _stock_right(_rows(x), _rows(g), **params)


dense_p = primitive("deqjax_dense", _flat, _stock, lambda x, w, **_: (*x.shape[:-1], w.shape[1]))
right_p = primitive(
    "deqjax_dense_right", _flat_right, _stock_right, lambda x, g, **_: (x.shape[-1], g.shape[-1])
)


def _left_cotangent(g, x, w, *, out, precision):
    del out
    dtype = x.aval.dtype
    return bind(dense_p, g.astype(dtype), w.T, out=dtype, precision=precision)


def _right_cotangent(g, x, w, *, out, precision):
    del out
    return bind(right_p, x, g, out=w.aval.dtype, precision=precision)


ad.defbilinear(dense_p, _left_cotangent, _right_cotangent)
ad.defbilinear(
    right_p,
    lambda w, x, g, *, out, **p: bind(dense_p, g.astype(x.aval.dtype), w.T, out=x.aval.dtype, **p),
    lambda w, x, g, *, out, **p: bind(dense_p, x, w, out=g.aval.dtype, **p),
)


def _batch(args, dims, **params):
    x, w = args
    if dims[1] is None:
        return bind(dense_p, jnp.moveaxis(x, dims[0], 0), w, **params), 0
    return jax.vmap(partial(_stock, **params), dims)(x, w), 0


batching.primitive_batchers[dense_p] = _batch
batching.primitive_batchers[right_p] = lambda args, dims, **params: (
    jax.vmap(partial(_stock_right, **params), dims)(*args),
    0,
)

"""Bilinear operations as primitives, with a lowering of their own on a CPU.

`jax.custom_vjp` has no forward mode and, under `jax.vmap` with a shared weight, makes one cotangent
of it per example; `jax.custom_derivatives.linear_call` cannot be batched.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, PartitionSpec as P
from jaxtyping import Array

from ._tree import mesh_axes, vary

_STATIC = ("out", "precision", "size", "stride")
_STOCK = {}


def primitive(name: str, ours: Callable, stock: Callable, shape: Callable) -> Primitive:
    """`stock(a, b, **params)`, or `ours` on a CPU; `shape` tells the shape of the result.

    The dtype of the result is the parameter `out`, if there is one, or that of the operands.
    """
    made = Primitive(name)
    bound = lambda a, b, **params: made.bind(a, b, **params)
    made.def_impl(jax.jit(bound, static_argnames=_STATIC))

    def abstract(a, b, **params):
        # `update` keeps the mesh axes over which both vary, see `bind`.
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
    """The operation of two arrays, inside a `jax.shard_map` too."""
    # Shardings that are part of a type are for JAX's own rules to follow.
    if any(AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types for x in (a, b)):
        return _STOCK[primitive](a, b, **params)
    axes = mesh_axes(a, b)
    return primitive.bind(vary(a, axes), vary(b, axes), **params)


def default_precision() -> Any:
    """That of matrix products as set now; lowering happens outside of the context that sets it."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def asks_highest(precision: Any) -> bool:
    """Whether both operands of a product are taken as they are, on whatever platform."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(str(p).lower().rpartition(".")[2] in ("highest", "float32") for p in both)

"""A matrix product that stays one product of two matrices, mapped or differentiated.

    y = x w,    dx = dy w^T,    dw = x^T dy

`jax.vmap` of an ordinary product gives a weight cotangent that contracts two axes, batch and
position; on a CPU the backward pass of an attention block then takes one and a half times as long.
Here a batch axis is merged into the rows. The product is formed in the dtype of x, whatever that of
w, and the cotangent of w in that of w: parameters in float32, products in bfloat16, the cotangents
of many evaluations summed in float32. It is a primitive for the reasons given in `nn/_base.py`.
"""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ._tree import mesh_axes, vary


def dense(
    x: Float[Array, "... i"], w: Float[Array, "i o"], out: DTypeLike | None = None
) -> Float[Array, "... o"]:
    """`x w` in the dtype of x, summed and returned in that of `out` (default: that of x)."""
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"The product expected x of shape (..., {w.shape[0]}) for a weight of shape {w.shape}, "
            f"got {x.shape}. The weight has (in, out)."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"The product expected x of a floating-point dtype, in which it is formed, got "
            f"{x.dtype}. Cast x, for instance to {w.dtype}."
        )
    axes = mesh_axes(x, w)
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = jnp.dtype(x.dtype if out is None else out)
    y = dense_p.bind(vary(rows, axes), vary(w, axes), out=out, precision=precision)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _forward(x, w, *, out, precision):
    return jnp.matmul(x, w.astype(x.dtype), precision=precision, preferred_element_type=out)


def _abstract(x, w, *, out, precision):
    del precision
    # `update` keeps the mesh axes x varies over; `dense` gave w the same ones.
    return x.update(shape=(x.shape[0], w.shape[1]), dtype=out, weak_type=False)


def _left_cotangent(g, x, w, *, out, precision):
    del out
    with jax.default_matmul_precision(precision):
        return dense(g.astype(x.aval.dtype), w.T)


def _right_cotangent(g, x, w, *, out, precision):
    del out
    g, out = g.astype(x.dtype), w.aval.dtype
    wide = out if jnp.finfo(out).bits >= 32 else jnp.float32
    product = jnp.matmul(x.T, g, precision=precision, preferred_element_type=wide)
    return product.astype(out)


def _batch(args, dims, *, out, precision):
    x, w = args
    if dims[1] is not None:
        forward = partial(_forward, out=out, precision=precision)
        return jax.vmap(forward, dims)(x, w), 0
    x = jnp.moveaxis(x, dims[0], 0)
    with jax.default_matmul_precision(precision):
        return dense(x, w, out), 0


dense_p = Primitive("deqjax_dense")
dense_p.def_impl(jax.jit(_forward, static_argnames=("out", "precision")))
dense_p.def_abstract_eval(_abstract)
ad.defbilinear(dense_p, _left_cotangent, _right_cotangent)
batching.primitive_batchers[dense_p] = _batch
mlir.register_lowering(dense_p, mlir.lower_fun(_forward, multiple_results=False))


class Linear(eqx.Module):
    """`y = x W + b`, W of shape (in, out), in the dtype of x; fast in loops and under `jax.vmap`.

    Parameters in float32 and x in bfloat16 is mixed precision: the product is taken in bfloat16,
    the cotangent of W in float32. W starts normal, of standard deviation scale / sqrt(in_size); b
    at zero.

    **Arguments:**

    - `in_size`, `out_size`: lengths of the last axis before and after.
    - `scale`: of the initial W.
    - `use_bias`: whether there is a b.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial W.

    **Call:** `x` of shape (..., in_size), any float dtype. Returns (..., out_size) in that dtype.

    **Cost:** in_size * out_size products a row, twice that backwards. `jax.vmap` merges the
    examples into one product.

    **When not to use it:** one weight per example (right, but a batch of products):
    `equinox.nn.Linear`.

    **Raises:** `ValueError` for x of another length, or of integers.
    """

    weight: Float[Array, "i o"]
    bias: Float[Array, " o"] | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        scale: float = 1.0,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        weight = jax.random.normal(key, (in_size, out_size), dtype)
        self.weight = weight * (scale / math.sqrt(in_size))
        self.bias = jnp.zeros(out_size, dtype) if use_bias else None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Apply the layer along the last axis."""
        y = dense(x, self.weight)
        if self.bias is None:
            return y
        return y + self.bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._bilinear import dense


class Linear(eqx.Module):
    """`y = x W + b`, W of shape (in, out), in the dtype of x; fast in loops and under `jax.vmap`.

    Parameters in float32 and x in bfloat16 give mixed precision: the product is in bfloat16, the
    cotangent of W in float32. The initial W is normal, of standard deviation
    scale / sqrt(in_size); the initial b is zero.

    **Arguments:**

    - `in_size`, `out_size`: lengths of the last axis before and after.
    - `scale`: of the initial W.
    - `use_bias`: whether there is a b.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for the initial W.

    **Call:** `x` of shape (..., in_size), any float dtype. Returns (..., out_size) in that dtype.

    **Cost:** in_size * out_size products per row, twice that backwards. `jax.vmap` merges the
    examples into one product.

    **When not to use it:** for one weight per example (correct, but a batch of products): use
    `equinox.nn.Linear`. The policies of `jax.checkpoint` that save products do not know this one;
    `policy=lambda p, *_, **__: p.name.startswith("deqjax_")` does.

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
        """Applies the layer along the last axis."""
        y = dense(x, self.weight)
        if self.bias is None:
            return y
        return y + self.bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))

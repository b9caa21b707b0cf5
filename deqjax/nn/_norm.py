"""Group normalisation with the channels last."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from .._tree import widen


class GroupNorm(eqx.Module):
    """Group normalisation of one channels-last example.

        y = weight (x - mean) / sqrt(var + eps) + bias

    with mean and (biased) variance over all leading axes and the channels of one group; weight and
    bias per channel. The layer sees one example at a time, so that it may be part of a cell.

    **Arguments:**

    - `groups`: number of groups of consecutive channels; divides `channels`.
    - `channels`: length of the last axis.
    - `eps`: added to the variance.
    - `dtype`: of weight (ones) and bias (zeros); default: JAX's default float.

    **Call:** `x` of shape (..., channels), any float dtype. Returns the same shape and dtype; all
    values in between, including statistics, are float32 or wider.

    **When not to use it:** for channels first (use `equinox.nn.GroupNorm`).

    **Raises:** `ValueError` if `groups` does not divide `channels`, or x has other channels.

    Reference: Wu and He, Group normalization, ECCV 2018, arXiv 1803.08494, equations 1, 2 and 7.
    """

    # `equinox.nn.GroupNorm` is channels-first: two transposes of the state at every evaluation.

    weight: Float[Array, " c"]
    bias: Float[Array, " c"]
    groups: int = eqx.field(static=True)
    eps: float = eqx.field(static=True)

    def __init__(
        self, groups: int, channels: int, eps: float = 1e-5, dtype: DTypeLike | None = None
    ):
        if groups < 1 or channels % groups != 0:
            raise ValueError(
                f"GroupNorm expects groups to divide channels, got {groups} groups of {channels} "
                "channels; choose a divisor."
            )
        self.weight = jnp.ones(channels, dtype)
        self.bias = jnp.zeros(channels, dtype)
        self.groups = groups
        self.eps = eps

    def __call__(self, x: Float[Array, "*space c"]) -> Float[Array, "*space c"]:
        """Normalises one example."""
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(
                f"GroupNorm expects {self.weight.size} channels on the last axis, got shape "
                f"{x.shape}; move the channels last."
            )
        y = widen(x)
        y = y - self._group_mean(y)
        y = y * lax.rsqrt(self._group_mean(jnp.square(y)) + self.eps)
        weight, bias = (p.astype(y.dtype).reshape(1, -1) for p in (self.weight, self.bias))
        y = weight * y.reshape(-1, x.shape[-1]) + bias
        return y.reshape(x.shape).astype(x.dtype)

    def _group_mean(self, y):
        # Over space first, which leaves one number per channel: reducing over a group's channels
        # too, inside the large array, takes XLA's CPU code five times as long.
        mean = jnp.mean(y, tuple(range(y.ndim - 1)), keepdims=True)
        groups = jnp.mean(mean.reshape(self.groups, -1), 1)
        return jnp.repeat(groups, self.weight.size // self.groups).reshape(mean.shape)

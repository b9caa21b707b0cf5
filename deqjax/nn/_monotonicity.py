"""Bounds around the fixed point of `relu(W z + x)` if the symmetric part of I - W is positive.

z* is the zero of the operator `z -> (I - W) z - x + dg(z)`, with g the indicator of z >= 0. The
operator is strongly monotone by m. For every z >= 0 and every element r of its value at z,

    m ||z - z*||^2 <= <r - 0, z - z*>,        hence        ||z - z*||_2 <= ||r||_2 / m,

and, with `q = z - W z - x`, the least r is q where z > 0 and `min(q, 0)` where z = 0. An evaluation
of `relu(W z + x)` on that ball brings most entries closer, and proves zeros to be zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, Float

from .._problem import point_like
from .._program import run
from .._tree import stop_gradient, widen
from ..positive import Enclosure
from ..positive._bracket import Bracket, consistent, relative_error


def certify(weight: Any, z: Any, x: Float[Array, "*b n"], batched: bool) -> Enclosure:
    """The `Enclosure` of z*, for a z near it.

    `weight.margin` is m, and the weight unwraps to `(1 - m) I - A^T A + (B - B^T)`, rounded.
    """
    margin = getattr(weight, "margin", None)
    if margin is None:
        raise ValueError(
            f"certify expects a weight with a margin, by which I - W is strongly monotone, got "
            f"{type(weight).__name__}; use the weight of an nn.MonotoneLinear, not yet unwrapped."
        )
    z = point_like(z, x, batched)
    with jax.default_matmul_precision("highest"):
        w, z, x = stop_gradient((paramax.unwrap(weight), z, x))
        return run(_certify, w, z, x, margin, batched)


def _certify(w, z, x, margin: float, batched: bool) -> Enclosure:
    one = lambda z, x: _enclose(z, x, w, margin)
    return (jax.vmap(one) if batched else one)(z, x)


def _enclose(z, x, w, margin: float) -> Enclosure:
    least = _least_margin(w, margin)
    z, x, w = map(widen, (z, x, w))
    info, n = jnp.finfo(z.dtype), len(z)
    gamma = _gamma(n + 8, float(info.eps) / 2)
    # Where a step of projected gradients would end at 0, z = 0 gives the smaller r.
    point = jax.nn.relu(z)
    point = jnp.where(point > point - w @ point - x, point, 0)
    image = w @ point + x
    q = point - image
    # Sums with signs: |error| <= gamma (|z| + |W| |z| + |x|) in any order (Higham, Accuracy and
    # stability of numerical algorithms, 2nd ed., 2002, equation 3.5), and products that vanish. The
    # factors 1.01 leave room for the rounding of the bounds themselves.
    size = point + jnp.abs(w) @ point + jnp.abs(x)
    rounding = 1.01 * gamma * size + 2 * n * float(info.tiny)
    residual = jnp.where(point > 0, jnp.abs(q), jnp.maximum(-q, 0)) + rounding
    radius = 1.01 * _norm(residual) / least + 4 * float(info.eps) * point
    reach = 1.01 * _norm(w) * (1.01 * _norm(residual) / least) + rounding
    lower = jnp.maximum(jax.nn.relu(point - radius), jax.nn.relu(image - reach))
    upper = jnp.minimum(point + radius, jax.nn.relu(image + reach))
    bracket = Bracket(lower, upper)
    known = jnp.all(jnp.isfinite(z)) & jnp.all(jnp.isfinite(w)) & jnp.all(jnp.isfinite(radius))
    holds = known & (least > 0) & (gamma < 2.0**-8) & consistent(bracket)
    proved = lambda value, otherwise: jnp.where(holds, value, jnp.asarray(otherwise, z.dtype))
    error = proved(relative_error(z, bracket), jnp.inf)
    nothing = jnp.zeros_like(error), jnp.full_like(error, jnp.inf)
    steps = jnp.zeros(error.shape, jnp.int32)
    return Enclosure(proved(lower, 0), proved(upper, jnp.inf), error, nothing, steps, holds)


def _least_margin(w: Float[Array, "n n"], margin: float) -> Float[Array, ""]:
    # |W^ - W| <= gamma (|1 - m| I + a a^T + |W^|) with a_i = ||A e_i||, by Cauchy and Schwarz, and
    # a_i^2 = 1 - m - W_ii; m may lose as much as W^ moves in the 2-norm.
    gamma, wide = _gamma(len(w) + 8, float(jnp.finfo(w.dtype).eps) / 2), widen(w)
    if gamma >= 2.0**-8:
        return jnp.zeros((), wide.dtype)
    shift, diagonal = abs(1 - margin), jnp.diagonal(wide)
    squares = jax.nn.relu(1 - margin - diagonal) + gamma * (shift + jnp.abs(diagonal))
    moved = gamma * (shift + jnp.sum(squares) + _norm(wide.reshape(-1)))
    return margin * (1 - 4 * float(jnp.finfo(wide.dtype).eps)) - 1.02 * moved


def _gamma(n: int, unit: float) -> float:
    return n * unit / (1 - n * unit) if n * unit < 1 else float("inf")


def _norm(v: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    # Scaled, since a square that vanishes would be lost.
    scale = jnp.max(jnp.abs(v), -1, keepdims=True)
    unit = v / jnp.where(scale > 0, scale, 1)
    return scale[..., 0] * jnp.sqrt(jnp.sum(unit * unit, -1))

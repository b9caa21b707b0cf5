"""Rigorous bounds around the fixed point of a positive concave f, for the result of any solver."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._checks import check_real
from .._problem import convert, point
from .._program import run
from .._solution import span
from .._step import evaluate
from .._tree import Axes, flat, is_traced, stop_gradient, unflat
from ._bracket import Bracket, Slack, relative_error
from ._candidates import Candidates
from ._enclosure import enclose
from ._rounding import rounding

# In eps, ten times the largest u |s'(u) - sigma'(u)| of XLA's derivatives s' on a CPU where sigma
# saturates: over 2e6 points 30.3 in float32 and 138.5 in float64 (tanh; all others: below 19). The
# factor is ten because the error is relative to a weight, which is at least a tenth of z.
_SATURATED = {32: 310, 64: 1400}


class Enclosure(NamedTuple):
    """The result of `deqjax.certify`; all but the two ends have one entry per problem."""

    lower: PyTree
    upper: PyTree
    relative_error: Float[Array, "..."]
    spectral_radius: tuple[Float[Array, "..."], Float[Array, "..."]]
    steps: Int[Array, "..."]
    holds: Bool[Array, "..."]

    def __repr__(self) -> str:
        state = eqx.tree_pformat(self.lower, struct_as_array=True)
        if any(map(is_traced, jax.tree.leaves(tuple(self)))):
            return f"Enclosure({state}, traced)"
        count = f"holds for {jnp.sum(self.holds)} of {self.holds.size}"
        one = "holds" if self.holds.all() else "no proof"
        rho = span(jnp.stack(self.spectral_radius))
        return (
            f"Enclosure({state}, {count if self.holds.ndim else one}, relative_error="
            f"{span(self.relative_error)}, spectral_radius={rho})"
        )


def certify(
    fn: Callable[[PyTree, PyTree], PyTree],
    z: PyTree,
    args: PyTree = None,
    *,
    batched: bool = False,
    fan_in: int | None = None,
) -> Enclosure:
    """Encloses the fixed point near z of a positive concave f, and the spectral radius there.

        f(u) <= u  implies  z* <= f(u),        f(l) >= l  implies  z* >= f(l)

    The candidates u and l come from products with J = df/dz at z, which prove nothing. With
    `r = f(z) - z`, any weight v > 0 with `J v < v`, and
    `d = r + J r + ... + J^(k-1) r`,

        u = z + d + t v,    t = max_i (J^k r)_i / (v - J v)_i,

    which is exact as far as f is linear; l is analogous. The proof is one evaluation of f at each
    point: every entry has to hold by more than rounding can move it. The evaluation also moves both
    ends closer. If it fails, t is doubled, then the whole step, twice; in the last try l is 0.

    **Arguments:**

    - `fn`, `args`, `batched`: as in `deqjax.fixed_point`; the problems must be independent. `fn`
        has to be positive, and monotone and scalable on z >= 0 (a positive concave f is); if not,
        nothing here holds. `deqjax.positive.check_hypotheses` looks for a counterexample. For a
        layer use `nn.DEQ.certify`, which injects x as the layer does.
    - `z`: a pytree of float arrays, at least 0, the output of any solver.
    - `fan_in`: the number of terms of the longest sum in fn, if the rounding of fn is that of one
        such sum, an addition and one function. `None` counts the roundings in the jaxpr of fn. The
        signs of arrays are checked in both cases; with `fan_in` you vouch for subtractions.

    **Returns:** an `Enclosure` with

    - `lower`, `upper`: `lower <= z* <= upper` in every entry. Without an upper point, upper is
        infinite; without a lower point, lower is f(0) less its rounding. Both have the structure of
        z, in float32 or wider.
    - `relative_error`: a bound on `max_i |z_i - z*_i| / z*_i`.
    - `spectral_radius`: Collatz and Wielandt's bounds `(low, high)` on that of J at z*,
        `min_i (J(u) v)_i / v_i` and `max_i (J(l) v)_i / v_i`. They hold if the partial derivatives
        of f decrease in every argument, as for `sigma(W z + x)` with a concave sigma; this is not
        so for every concave f (Cobb-Douglas functions). They are widened by the rounding of the
        sums, and by 310 eps (float64: 1400) for the rounding of saturated derivatives.
    - `steps`: the number of products with J at z.
    - `holds`: whether an upper point was found, the ends do not contradict each other, and **every
        array in fn that is combined with a value that depends on z is nonnegative**: summand,
        factor, divisor (above 0), kernel, bound of a minimum, selected entries, whether the array
        is an argument, closed over or computed in fn. With a negative array sums may cancel, and
        rounding is not counted: the only bounds are 0 and infinity, whatever z is. A scalar that is
        written into fn may be negative. Batched, an array counts for the problems that it belongs
        to. It counts for all if it has no batch axis, or an axis that cannot be followed to axis 0
        of the result (a reversed or gathered batch).

    The enclosed fixed point is that of f in exact arithmetic, with the parameters as stored; inputs
    that fn computes without z are taken as computed. Rounding is counted for numbers in the normal
    range of their dtype. An end is not proved if an entry of f is below 2^40 times the smallest
    normal number of float32 (1e-26); a smaller value inside f that f multiplies by as much again is
    not detected. Functions were measured only on a CPU. If f compares a computed value with a
    number other than 0, it should select that value (`where(u > 1, 1, u)`), or a function of it: f
    is assumed to be continuous there.

    **Cost:** three evaluations of f, up to nine if an end has to be tried again; 1 to 11 JVPs, 3 on
    ordinary problems; and two more JVPs if `spectral_radius` is used. Four copies of z besides
    those of f. Every product in f uses the highest matrix precision. A minimum over each array that
    z meets in f; values that f computes without z are computed once more.

    **When not to use it:** in half precision, where sums of a hundred terms have no certain digit;
    in a loss (nothing here has a gradient).

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point` for fn and z, and, without a
    `fan_in`, for an fn whose rounding cannot be counted.

    Reference: Yates, IEEE JSAC 13 (1995), lemmas 1 and 2, for the two implications; Berman and
    Plemmons, Nonnegative matrices in the mathematical sciences, 1994, theorem 2.1.11, for the
    spectral radius.
    """
    check_real("certify", z, "pass the real and imaginary parts as z, since bounds need an order.")
    with jax.default_matmul_precision("highest"):
        fn, z, args, axes = convert(fn, *stop_gradient((point(z, batched), args)))
        return run(_certify, stop_gradient(fn), z, args, fan_in, int(batched), axes)


def _certify(fn, z, args, fan_in, rank: int, axes: Axes) -> Enclosure:
    slack = rounding(fn, z, args, fan_in, "certify", rank=rank)

    def f(x):
        return flat(evaluate(fn, unflat(x, z), args)[0], rank)

    at = flat(z, rank)
    bracket, holds, found = enclose(f, at, z, slack, axes)
    error = jnp.where(holds, relative_error(at, bracket), jnp.inf)
    radius = _radius(f, found, bracket, slack)
    lower, upper = (_wide(x, z) for x in bracket)
    return Enclosure(lower, upper, error, radius, found.steps, holds)


def _radius(f: Callable, found: Candidates, bracket: Bracket, slack: Slack):
    """Collatz and Wielandt's bounds, with J(upper) <= J(z*) <= J(lower)."""
    at = lambda x, v: jax.jvp(f, (x,), (v,))[1]
    known = jnp.all(jnp.isfinite(bracket.upper), -1)
    upper = jnp.where(known[..., None], bracket.upper, 1)
    v, w = found.weight, found.product
    ratio = lambda x, v: x / jnp.where(v > 0, v, 1)
    high = jnp.max(ratio(at(bracket.lower, v), v), -1)
    high = jnp.where(jnp.all(v > 0, -1) & ~jnp.isnan(high), high, jnp.inf)
    # For the lower bound the vector may have zeros, which are left out, but may not be zero.
    low = jnp.min(jnp.where(w > 0, ratio(at(upper, w), w), jnp.inf), -1)
    low = jnp.where(known & jnp.isfinite(low), low, 0)
    info = jnp.finfo(v.dtype)
    eps = _SATURATED[info.bits] * float(info.eps)
    low = jnp.maximum(low * (1 - jnp.minimum(slack, 1)) - eps, 0)
    return low, jnp.where(jnp.isinf(slack), jnp.inf, high * (1 + slack) + eps)


def _wide(x: Float[Array, "*b n"], like: PyTree) -> PyTree:
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, x.dtype), like)
    return unflat(x, wide)

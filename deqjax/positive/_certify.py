"""Rigorous bounds around the fixed point of a positive concave f, whatever solver came near it."""

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

# In eps, ten times u |s'(u) - sigma'(u)| of XLA's derivatives s' on a CPU where sigma saturates:
# the largest over 2e6 points is 30.3 in float32 and 138.5 in float64 (tanh; all others: below 19).
# Ten, since it enters relative to a weight, which is a tenth of z at least.
_SATURATED = {32: 310, 64: 1400}


class Enclosure(NamedTuple):
    """The proof of `deqjax.certify`; one entry per problem in all but the two ends."""

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
    """Encloses the fixed point of a positive concave f, near which z is, and its contraction.

        f(u) <= u  implies  z* <= f(u),        f(l) >= l  implies  z* >= f(l)

    The candidates u and l come from products with J = df/dz at z, and prove nothing. With
    `r = f(z) - z`, any weight v > 0 with `J v < v`, and
    `d = r + J r + ... + J^(k-1) r`,

        u = z + d + t v,    t = max_i (J^k r)_i / (v - J v)_i,

    which is exact as far as f is linear; l likewise. What proves is one evaluation of f at each,
    in which every entry has to hold by more than rounding can move it; it also brings both ends
    closer. Where it fails t is doubled, then the whole is, twice, and then l is 0.

    **Arguments:**

    - `fn`, `args`, `batched`: as in `deqjax.fixed_point`; problems do not see each other. `fn` has
        to be positive, and monotone and scalable on z >= 0 (a positive concave f is), or nothing
        here holds: `deqjax.positive.check_hypotheses` looks for a counterexample. Of a layer:
        `nn.DEQ.certify`, which makes of x what its cell sees.
    - `z`: a pytree of float arrays, at least 0, the output of any solver.
    - `fan_in`: the number of terms of the longest sum in fn, if its rounding is that of one such
        sum, an addition and one function. `None` counts the roundings in the jaxpr of fn. Of
        arrays the signs are looked at either way; what is subtracted is then your word.

    **Returns:** an `Enclosure` with

    - `lower`, `upper`: `lower <= z* <= upper` in every entry; if no upper point was found, upper
        is infinite, and if no lower one was, lower is f(0) less its rounding. In the structure of
        z, float32 or wider.
    - `relative_error`: a bound of `max_i |z_i - z*_i| / z*_i`.
    - `spectral_radius`: `(low, high)` around that of J at z*, of Collatz and Wielandt,
        `min_i (J(u) v)_i / v_i` and `max_i (J(l) v)_i / v_i`. For an f whose partial derivatives
        fall in every argument, as those of `sigma(W z + x)` do for a concave sigma; not of every
        concave f (Cobb and Douglas's). It is widened by the rounding of the sums, and by 310 eps
        (float64: 1400) for that of saturated derivatives.
    - `steps`: products with J at z.
    - `holds`: whether an upper point was found, the ends do not contradict each other, and **every
        array that what depends on z meets in fn is nonnegative**: summand, factor, divisor (above
        0), kernel, bound of a minimum, what a selection takes, whether it is an argument, closed
        over or computed in fn. A negative one can make sums cancel, and then no rounding is
        counted: no bound but 0 and infinity, whatever z is. A scalar that is written into fn may be
        negative. Batched, an array counts for the problems that it belongs to; one without a
        batch axis, or that cannot be followed to axis 0 of the result (a batch reversed, or
        gathered), counts for all.

    What is enclosed is the fixed point of f in exact arithmetic, of the parameters as they are
    stored; inputs that fn computes without z are taken as they come. Rounding is counted for
    numbers in the normal range of their dtype: an end is not proved where an entry of f is below
    2^40 times the smallest normal number of float32 (1e-26), and where f multiplies what is smaller
    by as much again inside, nothing here sees it. Functions were measured on a CPU alone. Where f
    compares what it has computed with a number other than 0, what decides should be what is
    selected (`where(u > 1, 1, u)`), or a function of it: f is taken to be continuous there.

    **Cost:** three evaluations of f, up to nine where an end has to be tried again; 1 to 11 JVPs,
    3 on ordinary problems; and two JVPs more if `spectral_radius` is used. Four copies of z beside
    those of f. Every product in f is asked for at the highest matrix precision. A minimum over
    each array that z meets in f; what f computes without z is computed once more.

    **When not to use it:** in half precision, where sums of a hundred terms have no digit that
    is certain; in a loss (nothing here has a gradient).

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point` for fn and z, and for an fn whose
    rounding cannot be counted if there is no `fan_in`.

    Reference: Yates, IEEE JSAC 13 (1995), lemmas 1 and 2, for the two implications; Berman and
    Plemmons, Nonnegative matrices in the mathematical sciences, 1994, theorem 2.1.11, for the
    spectral radius.
    """
    check_real("certify", z, "bounds need an order. Certify the real and imaginary parts as z.")
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
    # For a lower bound v may have zeros, which are left out, but not be zero.
    low = jnp.min(jnp.where(w > 0, ratio(at(upper, w), w), jnp.inf), -1)
    low = jnp.where(known & jnp.isfinite(low), low, 0)
    info = jnp.finfo(v.dtype)
    eps = _SATURATED[info.bits] * float(info.eps)
    low = jnp.maximum(low * (1 - jnp.minimum(slack, 1)) - eps, 0)
    return low, jnp.where(jnp.isinf(slack), jnp.inf, high * (1 + slack) + eps)


def _wide(x: Float[Array, "*b n"], like: PyTree) -> PyTree:
    wide = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, x.dtype), like)
    return unflat(x, wide)

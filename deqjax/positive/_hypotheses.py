"""A numerical test of the hypotheses of the theorem, on one example of a cell."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import paramax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import check_int, check_real, float_state
from .._problem import convert
from .._program import run
from .._tree import cast, quotient, unify, widen
from ._sampling import limit, sample

# The powers of 4 among which the size of the largest fixed point is searched.
_POWERS = range(-64, 32)
# A search that doubles reaches a scale of 1e8 in 27 steps; the other steps turn it to the Perron
# vector.
_SEARCH_STEPS = 200
_SEARCH_SCALE = 1e8
# A violation counts above so many allowances for rounding. One allowance is for sums of terms of
# the size of f; an f that amplifies rounding, such as (W z^p)^(1/p) by 1 / p, needs more.
_BAND = 10.0


class Finding(NamedTuple):
    """The finding on one hypothesis.

    - `holds`: whether no counterexample was seen: no violation above 10 (for `exists`: whether an
        example was seen).
    - `violation`: the worst one, in units of the rounding of a well-conditioned f; 0 if there is
        none, infinite for a wrong sign or a value that is not finite. A clear counterexample is
        usually in the hundreds. From 1 to 10 it may be the rounding of an f that amplifies
        rounding, or a slight counterexample.
    - `witness`: the z of the worst violation, with the structure of z.
    """

    holds: Bool[Array, ""]
    violation: Float[Array, ""]
    witness: PyTree


class Hypotheses(NamedTuple):
    """The result of `deqjax.positive.check_hypotheses`, one `Finding` per hypothesis."""

    positive: Finding
    monotone: Finding
    concave: Finding
    scalable: Finding
    exists: Finding

    @property
    def holds(self) -> Bool[Array, ""]:
        """Whether all five hypotheses hold, as far as was seen."""
        return jnp.all(jnp.stack([finding.holds for finding in self]), axis=0)


def check_hypotheses(
    cell: Callable[[PyTree, PyTree], PyTree],
    x: PyTree,
    *,
    key: PRNGKeyArray,
    z: PyTree = None,
    samples: int = 128,
) -> Hypotheses:
    """Tests the hypotheses by which `z = f(z) = cell(z, x)` has exactly one solution.

        positive   f(0) > 0, f(z) > 0                            every component
        monotone   J(z) v >= 0, and f(z) <= f(z + v)             v >= 0
        concave    f((1-t) a + t b) >= (1-t) f(a) + t f(b), and slopes that fall from a to b
        scalable   f(a z) <= a f(z)                              a > 1
        exists     some u with f(u) <= u: Picard iteration for 2 f ends where f(u) = u / 2, or grows
                   along the direction in which f is least

    at random z >= 0, dense and sparse: half have a size from 1e-4 to 1e4 times that of f(0), half a
    size up to 1e4 times that of the largest fixed point. Positive and concave imply monotone and
    scalable. A positive, monotone and scalable f (with <, which rounding hides) is a standard
    interference map: its fixed point is unique, though f need not be concave.

    **A failure of one of the first four is a counterexample, up to rounding**: at `witness` the
    values and, in hypotheses with two tests, the derivatives violate it by more than 10 times the
    rounding of a well-conditioned f. If f amplifies rounding still more, a `violation` of tens may
    be rounding too: test again in float64, where a true one scores 5e8 times as much.
    **Passing is evidence, not proof.** For `exists` it is the reverse: passing means that a u was
    found, and failing proves nothing.

    **Arguments:**

    - `cell`: `cell(z, x) -> z'` on one example, as for `nn.DEQ`; paramax parametrisations are
        unwrapped, and `cell.inject`, if there is one, is applied to x.
    - `x`: one example, before `inject`. The hypotheses can hold for one x and fail for the next.
    - `key`: for the random points.
    - `z`: any z, for its structure, shapes and dtypes; by default like the injected x.
    - `samples`: the number of points, of pairs of points, and of directions.

    **Returns:** `Hypotheses`, arrays of shape `()`; `.holds` says whether all of them hold.

    **Cost:** per sample 2 evaluations and 7 JVPs, all samples at once, and 297 more evaluations.

    **When not to use it:** in half precision, where rounding hides all but gross violations and an
    f that cancels (1 - exp(-u) of a small u) is itself not positive; in a training step; for
    `nn.PositiveConcaveLinear` and similar cells, which satisfy the hypotheses by construction.

    **Raises:** `ValueError` when traced if cell cannot be called, its output differs from z in
    structure, shape or dtype, z is not of floats, or `samples < 1`.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029; Yates, IEEE JSAC 13 (1995), for scalable and monotone.
    """
    if not callable(cell):
        raise ValueError(
            f"check_hypotheses expects a cell(z, x), got {cell!r}; pass the cell of an nn.DEQ, "
            f"not its parameters."
        )
    check_int("check_hypotheses", "samples", samples, "pass the number of points to draw.")
    unwrapped: Any = paramax.unwrap(cell)
    if hasattr(unwrapped, "inject"):
        x = unwrapped.inject(x)
    z = float_state(x if z is None else z)
    check_real("check_hypotheses", z, "pass the real and imaginary parts as z.")
    with jax.default_matmul_precision("highest"):
        fn, z, x, _ = convert(unwrapped, z, x)
        return run(_check, fn, z, x, key, int(samples))


def _check(fn, like, x, key, samples: int) -> Hypotheses:
    flat, unravel = ravel_pytree(unify(like))
    back = lambda v: cast(unravel(v), like)
    n, dtype = flat.size, flat.dtype
    f = lambda v: ravel_pytree(unify(fn(back(v), x)[0]))[0].astype(dtype)
    # A sum of n terms has an error of about sqrt(n) roundings of itself, at worst n; 8 for sigma.
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(like))
    rounding = 2 * (8 + math.sqrt(n)) * eps

    b, top = _scales(f, flat)
    largest = jnp.max(b)
    size = jnp.where(largest > 0, jnp.maximum(b, 1e-3 * largest), 1)
    above = jnp.maximum(jnp.log10(jnp.maximum(top / jnp.max(widen(size)), 1)), 0)
    draw = lambda key: sample(f, b, size, above, rounding, key)
    found, points = jax.vmap(draw)(jax.random.split(key, samples))
    excess, u = _search(f, size)
    worst = jnp.argmax(found, axis=0)
    violation = jnp.max(found, axis=0)
    seen = lambda i: Finding(violation[i] <= _BAND, violation[i], back(points[worst[i], i]))
    exists = Finding(excess <= 0, excess / rounding, back(u))
    return Hypotheses(seen(0), seen(1), seen(2), seen(3), exists)


def _scales(f, like) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    # f(0), and about the largest entry of any fixed point. If f is monotone and z a fixed point
    # with largest entry s, then the largest entry of f(t 1) is at least s for every t >= s, hence
    # at least t / 4 at the first power of 4 from s on. The size of f(0) says nothing about it: the
    # three fixed points of sigmoid(60 z - 30) are 1e-13, 1/2 and 1.
    powers = 4.0 ** jnp.asarray(_POWERS, widen(like).dtype)
    powers = jnp.where(powers < limit(like.dtype), powers, 0)
    entries = jnp.concatenate([jnp.zeros_like(powers[:1]), powers]).astype(like.dtype)
    b, *_ = values = jax.vmap(lambda t: f(jnp.full_like(like, t)))(entries)
    reached = jnp.max(widen(values), axis=1)[1:] >= powers / 4
    return b, jnp.max(jnp.where(reached, powers, 0))


def _search(f, size) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    # If Picard iteration for 2 f converges, then f(u) = u / 2. If f is asymptotically A u + ..., it
    # grows along A's Perron vector p, and f(t p) <= t p for some t if and only if rho(A) < 1.
    top = jnp.minimum(_SEARCH_SCALE * jnp.max(widen(size)), limit(size.dtype)).astype(size.dtype)

    def step(_, carry):
        u, best, witness = carry
        fu = f(u)
        excess = jnp.max(quotient(widen(fu), widen(u))) - 1
        ok = jnp.all((u > 0) & jnp.isfinite(u) & jnp.isfinite(fu)) & (excess < best)
        best, witness = jnp.where(ok, excess, best), jnp.where(ok, u, witness)
        grown = 2 * jnp.maximum(fu, 0)
        return grown * jnp.minimum(1, quotient(top, jnp.max(grown))), best, witness

    start = size, jnp.asarray(jnp.inf, widen(size).dtype), size
    _, excess, u = jax.lax.fori_loop(0, _SEARCH_STEPS, step, start)
    return excess, u

"""The Jacobian of `f` at a point: its size, and how fast it contracts in the long run."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._checks import check_int
from .._problem import convert, point
from .._program import run
from .._step import evaluate
from .._tree import (
    Axes,
    as_real,
    cast,
    dot,
    from_real,
    max_abs,
    per_problem,
    stop_gradient,
    two_norm,
    vary,
    widen,
)

_NUMBER = "pass a Python number, not a traced one."


class SpectralRadius(NamedTuple):
    """The result of `deqjax.spectral_radius`; one entry per problem."""

    value: Float[Array, "..."]
    residual: Float[Array, "..."]


def jacobian_frobenius(
    fn: Callable[[PyTree, PyTree], PyTree],
    z: PyTree,
    args: PyTree = None,
    *,
    key: PRNGKeyArray,
    samples: int = 1,
    batched: bool = False,
) -> Float[Array, "..."]:
    """An unbiased estimate of the *squared* Frobenius norm of `J = df/dz`, for a loss.

        ||J||_F^2 = tr(J J^T) = E ||v^T J||_2^2,     v of independent random signs

    This norm bounds the squared spectral radius. At the solution of a solve,

        sol = deqjax.fixed_point(fn, solver, z0, args)
        penalty = deqjax.jacobian_frobenius(fn, sol.value, args, key=key) / sol.value.size
        loss = task(sol.value) + 0.5 * penalty

    **Arguments:**

    - `fn`, `args`, `batched`: as in `deqjax.fixed_point`; the problems must be independent.
    - `z`: the point, a pytree of float arrays. Pass `jax.lax.stop_gradient(z)` if the penalty must
        not move the solution. If some arrays are complex, J is that of real and imaginary parts:
        for a holomorphic f it has twice the squared norm of the complex J.
    - `key`: for v; use another one in each training step. Problem i of a batch draws from
        `jax.random.fold_in(key, i)`, for any batch size.
    - `samples`: the number of v to average over. The variance falls as 1 / samples; over a batch
        and over training steps one is enough.

    **Returns:** an array, float32 or wider, of shape `()` or, batched, `(batch,)`. Differentiable
    in the arrays of fn, in args and in z.

    **Cost:** one evaluation of f and `samples` VJPs at once; about twice that again for the
    gradient. Only VJPs are used, so that an f with a `jax.custom_vjp` works.

    **When not to use it:** as a test of convergence: the norm bounds the rate from above by a
    factor of up to sqrt(n). Use `deqjax.spectral_radius`.

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point` for fn and z, and for
    `samples < 1`.

    Reference: Bai, Koltun, Kolter, Stabilizing equilibrium models by Jacobian regularization, ICML
    2021, arXiv 2106.14342, section 4, there with normal v and one sample; Hutchinson, Commun. Stat.
    Simul. 19 (1990), for the signs.
    """
    check_int("jacobian_frobenius", "samples", samples, _NUMBER, 1)
    fn, z, args, axes = convert(fn, point(z, batched), args, key)
    return run(_frobenius, fn, z, args, key, int(samples), int(batched), axes)


def _frobenius(fn, z, args, key, samples: int, rank: int, axes: Axes):
    f, z = _over_reals(fn, z, args)
    _, vjp = jax.vjp(f, z)

    def sample(key):
        # Signs, not normals: with A = J J^T the variance of v^T A v is 2 (||A||_F^2 - sum A_ii^2),
        # for normals 2 ||A||_F^2, the larger of the two; and signs are exact in half precision.
        v = draw(jax.random.rademacher, key, z, rank)
        (product,) = vjp(vary(v, axes))
        return per_problem(lambda x: dot(x, x), rank)(product)

    return jnp.mean(jax.vmap(sample)(jax.random.split(key, samples)), axis=0)


def spectral_radius(
    fn: Callable[[PyTree, PyTree], PyTree],
    z: PyTree,
    args: PyTree = None,
    *,
    key: PRNGKeyArray,
    batched: bool = False,
    max_steps: int = 50,
) -> SpectralRadius:
    """The largest modulus of an eigenvalue of `J = df/dz`: Picard's factor per step near z*.

    Power iteration, then a two-term recurrence fitted to the last three vectors. A dominant complex
    pair, or a pair of opposite signs, satisfies the recurrence; a ratio of two would not settle:

        J^2 v ~ a J v + b v  (least squares),      value = max |root of l^2 - a l - b|

    **Arguments:**

    - `fn`, `args`, `batched`: as in `deqjax.fixed_point`; the problems must be independent.
    - `z`: the point, a pytree of float arrays, real or complex: J is that of their parts.
    - `key`: for the first v; drawn as in `deqjax.jacobian_frobenius`.
    - `max_steps`: products with J, an int of at least 2.

    **Returns:** `SpectralRadius(value, residual)`, float32 or wider, of shape `()` or, batched,
    `(batch,)`. `residual` is `||J^2 v - a J v - b v|| / ||J^2 v||`, a backward error: the value
    belongs to a J changed by about this fraction. A residual of 0.1 or more says that more than two
    eigenvalues still compete, and the value is no better than that. An ill-conditioned eigenvalue,
    for instance a double one, has a larger error than its residual. `J = 0` gives 0 and 0; a J that
    is not finite gives NaN. Neither is differentiated: their gradients are zero.

    **Cost:** one linearisation of f, and `max_steps` JVPs, one at a time in memory. With
    eigenvalues l1, l2, l3, ... by falling modulus the error falls as |l3 / l1|^max_steps.

    **When not to use it:** in a loss (use `deqjax.jacobian_frobenius`); for an f that has a
    `jax.custom_vjp` and hence no JVP.

    **Raises:** `ValueError` when traced, as `deqjax.fixed_point` for fn and z, and for
    `max_steps < 2`; JAX's `TypeError` for a `jax.custom_vjp`.

    Reference: Wilkinson, The algebraic eigenvalue problem, Oxford 1965, chapter 9, on complex
    conjugate eigenvalues, for the fit; Bai, Koltun, Kolter, 2021 (see `deqjax.jacobian_frobenius`)
    for the diagnostic.
    """
    check_int("spectral_radius", "max_steps", max_steps, _NUMBER, 2)
    fn, z, args, axes = convert(fn, point(z, batched), args, key)
    return run(_radius, fn, z, args, key, int(max_steps), int(batched), axes)


def _radius(fn, z, args, key, max_steps: int, rank: int, axes: Axes):
    fn, z, args = stop_gradient((fn, z, args))
    f, z = _over_reals(fn, z, args)
    _, product = jax.linearize(f, z)
    unit = per_problem(_unit, rank)
    v, _ = unit(vary(draw(jax.random.normal, key, z, rank), axes))
    v = jax.lax.fori_loop(0, max_steps - 2, lambda _, v: unit(product(v))[0], v)
    u, s = unit(product(v))
    w, t = unit(product(u))
    return per_problem(_fit, rank)(v, u, w, s, t)


def _over_reals(fn: Callable, z: PyTree, args: PyTree) -> tuple[Callable, PyTree]:
    """f as a function of real numbers: of real and imaginary parts, for complex leaves."""
    return lambda x: as_real(evaluate(fn, from_real(x, z), args)[0]), as_real(z)


def _fit(v: PyTree, u: PyTree, w: PyTree, s: Array, t: Array) -> SpectralRadius:
    """Fits the recurrence to `J v = s u` and `J u = t w`, for unit vectors or zero."""
    # In the orthogonal directions u and q = v - g u:  w ~ alpha u + beta q.
    g, alpha = _ratio(dot(u, v), dot(u, u)), _ratio(dot(u, w), dot(u, u))
    q = jax.tree.map(lambda v, u: widen(v) - g.astype(widen(v).dtype) * widen(u), v, u)
    # Once v is an eigenvector, q and beta are rounding. At ||q|| = sqrt(eps) the errors of leaving
    # q out, ||q||, and of keeping q, eps / ||q||, are equal.
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(v))
    beta = jnp.where(dot(q, q) > eps, _ratio(dot(q, w), dot(q, q)), 0)
    # With the roots l = t mu, so that no square of a small l is lost:  mu^2 = a mu + b.
    a, b = alpha - beta * g, beta * _ratio(s, t)
    square = a * a + 4 * b
    pair = jnp.sqrt(jnp.maximum(-b, 0))
    real = (jnp.abs(a) + jnp.sqrt(jnp.maximum(square, 0))) / 2
    value = t * jnp.where(square < 0, pair, real)

    def gap(w, u, q):
        return widen(w) - alpha.astype(q.dtype) * widen(u) - beta.astype(q.dtype) * q

    return SpectralRadius(value, two_norm(jax.tree.map(gap, w, u, q)))


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def _unit(x: PyTree) -> tuple[PyTree, Array]:
    """`x / ||x||_2` in the dtypes of `x`, and that norm; zeros for zero."""
    size = max_abs(x)  # Squares of numbers below 1e-19 vanish in float32.
    scaled = jax.tree.map(lambda x: _ratio(widen(x), size.astype(widen(x).dtype)), x)
    norm = two_norm(scaled)
    unit = jax.tree.map(lambda x: _ratio(x, norm.astype(x.dtype)), scaled)
    return cast(unit, x), size * norm


def draw(sampler: Callable, key: PRNGKeyArray, z: PyTree, rank: int) -> PyTree:
    """Random entries like `z`; those of a problem do not depend on the number of others."""
    leaves, treedef = jax.tree.flatten(z)

    def one(key):
        keys = jax.random.split(key, len(leaves))
        draw = [sampler(k, x.shape[rank:], x.dtype) for k, x in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(treedef, draw)

    if rank == 0:
        return one(key)
    problem = jnp.arange(leaves[0].shape[0])
    return jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(problem)

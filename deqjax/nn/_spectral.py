"""Spectral normalisation, with its power iteration outside the solve."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._tree import mesh_axes, two_norm, vary, widen

Vector = paramax.NonTrainable[Array] | Float[Array, " n"]

# A GPU or TPU would round the entries of w to fewer digits.
_product = partial(jnp.matmul, precision="highest")
# From a random start the estimate is too low by at most a factor of log(n) / steps or so even
# without a gap between the singular values (Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl.
# 13 (1992)): within the 5 % that the default bound leaves below 1, and usually far closer.
_FIRST_STEPS = 200


class SpectralNorm(paramax.AbstractUnwrappable[Array]):
    """A weight whose largest singular value is at most `bound`, as a `paramax` parametrisation.

        W min(1, bound / sigma),     sigma = |u^T W v|

    W is unchanged while it is small enough. u and v, its leading singular vectors, are stored.
    `nn.power_step` improves them once per training step, outside the solve, which sees one constant
    weight (`nn.DEQ` unwraps its cell once per solve):

        cell = eqx.tree_at(lambda c: c.weight, cell, SpectralNorm(cell.weight, key=key))
        ...
        model = nn.power_step(eqx.apply_updates(model, updates))

    The gradient flows through W, also in sigma, but not through u and v, whose gradients are zero.
    u and v are `paramax.NonTrainable`; keep them out of weight decay and the optimiser with

        is_leaf = lambda x: isinstance(x, paramax.NonTrainable)
        trained, rest = eqx.partition(model, eqx.is_inexact_array, is_leaf=is_leaf)

    **Arguments:**

    - `weight`: of shape (out, in); or a kernel of shape (h, w, i, o), taken as the matrix of shape
        (h w i, o), whose norm bounds the map of one patch. A pixel lies in h w patches, hence the
        convolution of an image has at most sqrt(h w) times that norm: for a contraction take
        `bound < 1 / sqrt(h w)`. The weight may itself be a paramax parametrisation.
    - `bound`: above 0; below 1 for a linear map that contracts.
    - `key`: for the start of the first power iteration.

    **Cost:** one product W v per solve and one rank-one term in W's cotangent; two products per
    `power_step`; 400 at the start.

    **When not to use it:** if you need an exact bound at each step: sigma lags behind W by one
    power step, and is a lower bound.

    **Raises:** `ValueError` for a weight of other than 2 or 4 axes, or `bound` not above 0.

    Reference: Miyato, Kataoka, Koyama, Yoshida, Spectral normalization for generative adversarial
    networks, ICLR 2018, arXiv 1802.05957, equation 8 and algorithm 1; with min as in Gouk et al.,
    Regularisation of neural networks by enforcing Lipschitz continuity, Mach. Learn. 110 (2021).
    """

    weight: Array | paramax.AbstractUnwrappable[Array]
    u: Vector
    v: Vector
    bound: float = eqx.field(static=True)

    def __init__(
        self,
        weight: Array | paramax.AbstractUnwrappable[Array],
        bound: float = 0.95,
        *,
        key: PRNGKeyArray,
    ):
        w = paramax.unwrap(weight)
        if w.ndim not in (2, 4) or not bound > 0:
            raise ValueError(
                f"SpectralNorm expects a weight of shape (out, in) or (h, w, i, o) and a bound "
                f"above 0, got shape {w.shape} and bound {bound}; reshape it, or leave bound out."
            )
        w = jax.lax.stop_gradient(_matrix(w))
        start = jax.random.normal(key, w.shape[:1], w.dtype)
        first = vary((start / two_norm(start), jnp.zeros(w.shape[1], w.dtype)), mesh_axes(w, start))
        u, v = jax.lax.fori_loop(0, _FIRST_STEPS, lambda _, uv: _power(w, *uv), first)
        self.weight = weight
        self.u, self.v = paramax.NonTrainable(u), paramax.NonTrainable(v)
        self.bound = bound

    def unwrap(self) -> Array:
        """The normalised weight, in the dtype of the weight."""
        weight, u, v = paramax.unwrap((self.weight, self.u, self.v))
        sigma = jnp.abs(_product(u, _product(_matrix(weight), v)))
        # The maximum neither divides by the sigma of a zero weight nor changes a sign.
        return weight * (self.bound / jnp.maximum(sigma, self.bound)).astype(weight.dtype)


def power_step(tree: PyTree) -> PyTree:
    """Takes one power iteration of the vectors of each `nn.SpectralNorm` in `tree`.

        v <- W^T u / ||W^T u||,     u <- W v / ||W v||

    Call it once per training step, after the update. It also restores the lengths of u and v after
    weight decay. It is not differentiated. With a zero weight u and v stay as they are.

    **Arguments:**

    - `tree`: any pytree, for instance a model.

    **Returns:** the same structure, with new u and v.

    **Cost:** two products with each weight.

    Reference: Miyato et al., 2018 (see `nn.SpectralNorm`), algorithm 1.
    """

    def step(x):
        if not isinstance(x, SpectralNorm):
            return x
        w = jax.lax.stop_gradient(_matrix(paramax.unwrap(x.weight)))
        uv = map(paramax.NonTrainable, _power(w, *paramax.unwrap((x.u, x.v))))
        return eqx.tree_at(lambda x: (x.u, x.v), x, tuple(uv))

    return jax.tree.map(step, tree, is_leaf=lambda x: isinstance(x, SpectralNorm))


def _matrix(weight: Array) -> Array:
    return widen(weight.reshape(-1, weight.shape[-1]))


def _power(w: Array, u: Array, v: Array) -> tuple[Array, Array]:
    def unit(new, old):
        # A vector of zeros would stay zero for ever.
        norm = two_norm(new)
        return jnp.where(norm == 0, old, new / jnp.where(norm == 0, 1, norm))

    v = unit(_product(u, w), v)
    return unit(_product(w, v), u), v

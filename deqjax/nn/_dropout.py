"""Dropout whose mask stays the same throughout a solve."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ._base import AbstractMask, masks_of


class VariationalDropout(AbstractMask):
    """Dropout with a stored mask, not drawn at each call: `f` stays one function of z.

        y = m z / (1 - p),     m ~ Bernoulli(1 - p)

    With a new mask at each evaluation there would be no fixed point to find. `nn.DEQ` draws the
    masks of its cell once per solve if it is given a `key`.

    **Arguments:**

    - `shape`: of the mask. It has as many axes as z, each as long as in z, or of length 1 to share
        the mask: (1, d) keeps or drops a feature at all places of a (length, d) sequence.
    - `p`: the probability of a zero, in [0, 1).
    - `mask`: leave it out; `None` is the identity, for inference.

    **Call:** `z` of any float dtype. Returns the same shape and dtype; exactly z with no mask, or
    with `p = 0`.

    **Cost:** one product; a mask of one byte per entry, per example.

    **When not to use it:** outside a solve, where a new mask per call works (use
    `equinox.nn.Dropout`); on the state itself of a cell that hardly contracts, as dropout scales
    the Jacobian by up to 1 / (1 - p).

    **Raises:** `ValueError` for p outside [0, 1), or a z that the mask's shape does not fit.

    Reference: Gal and Ghahramani, A theoretically grounded application of dropout in recurrent
    neural networks, NeurIPS 2016, arXiv 1512.05287, section 4; in an equilibrium: Bai, Kolter,
    Koltun, Deep equilibrium models, NeurIPS 2019, arXiv 1909.01377.
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    p: float = eqx.field(static=True, default=0.5)
    mask: Bool[Array, "..."] | None = None

    def __check_init__(self):
        if not 0 <= self.p < 1:
            raise ValueError(
                f"VariationalDropout expects p in [0, 1), got {self.p}; pass the probability of "
                "dropping an entry (the others are divided by 1 - p)."
            )

    def draw(self, key: PRNGKeyArray) -> "VariationalDropout":
        """The layer with a mask drawn from `key`, or with none if `p = 0`."""
        # With a Python float as probability, JAX would draw in float64 where that is enabled.
        keep = jnp.asarray(1 - self.p, jnp.float32)
        mask = None if self.p == 0 else jax.random.bernoulli(key, keep, self.shape)
        return VariationalDropout(self.shape, self.p, mask)

    def __call__(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Drops entries of one example."""
        if len(self.shape) != z.ndim or any(
            m not in (1, n) for m, n in zip(self.shape, z.shape, strict=True)
        ):
            raise ValueError(
                f"VariationalDropout expects a state that its mask of shape {self.shape} fits, "
                f"got {z.shape}; give the mask the shape of one example, with 1 on the axes that "
                "share it."
            )
        if self.mask is None:
            return z
        return jnp.where(self.mask, z / (1 - self.p), 0)


def draw_masks(tree: PyTree, *, key: PRNGKeyArray) -> PyTree:
    """`tree` with a new mask in each of its `nn.VariationalDropout`.

    `nn.DEQ` does this for its cell. Use it to evaluate a cell with the masks of a solve:
    `deq(x, key=key)` solves for `draw_masks(deq.cell, key=key)`.

    **Arguments:**

    - `tree`: any pytree of modules.
    - `key`: mask i, in the order of the tree's leaves, is drawn from `jax.random.fold_in(key, i)`.

    **Returns:** a tree of the same structure, except for the masks.
    """
    return eqx.combine(masks_of(tree, key), tree)

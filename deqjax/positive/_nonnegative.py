"""Weights that stay nonnegative because a projection follows every update."""

import equinox as eqx
import jax
import optax
import paramax
from equinox import AbstractVar
from jaxtyping import Array, Float, PyTree

Weight = paramax.AbstractUnwrappable[Array] | Float[Array, "..."]


class AbstractNonnegative(eqx.Module):
    """A cell whose theorem needs `weight >= 0`; `positive.project` looks for its instances.

    The weight is a paramax parametrisation that is nonnegative by construction, or an array that
    `project` keeps nonnegative. Derive your own cell from this class for `project` to find it.
    """

    weight: AbstractVar[Weight]


def project(model: PyTree) -> PyTree:
    """Moves the plain weights of the positive cells in `model` to the nearest nonnegative ones.

        W <- max(W, 0)

    For the cells with `nonnegative=None`, after each update:

        model = positive.project(eqx.apply_updates(model, updates))

    **Arguments:**

    - `model`: any pytree, also one from `eqx.partition` or `eqx.filter`, such as the tree of
        parameters.

    **Returns:** the same structure. Parametrised weights, and everything that is not a weight of a
    `positive.AbstractNonnegative`, are the same objects.

    **Cost:** one elementwise operation.

    **When not to use it:** on parametrised weights, which need no projection. A projected entry can
    stay at exactly 0 while its gradient is positive; a squared entry at 0 stays there for ever.

    Reference: `optax.projections.projection_non_negative`.
    """

    inner = lambda x: isinstance(x, AbstractNonnegative) and x is not model
    out = jax.tree.map(lambda x: project(x) if inner(x) else x, model, is_leaf=inner)
    if isinstance(out, AbstractNonnegative) and eqx.is_inexact_array(out.weight):
        weight = optax.projections.projection_non_negative(out.weight)
        out = eqx.tree_at(lambda cell: cell.weight, out, weight)
    return out

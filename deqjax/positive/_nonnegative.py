"""Weights that stay nonnegative because every update is followed by a projection."""

import equinox as eqx
import jax
import optax
import paramax
from equinox import AbstractVar
from jaxtyping import Array, Float, PyTree

Weight = paramax.AbstractUnwrappable[Array] | Float[Array, "..."]


class AbstractNonnegative(eqx.Module):
    """A cell whose theorem asks for `weight >= 0`; `positive.project` looks for its instances.

    The weight is a paramax parametrisation that is nonnegative by construction, or an array that
    `project` keeps so. A cell of your own takes part by inheriting from this.
    """

    weight: AbstractVar[Weight]


def project(model: PyTree) -> PyTree:
    """`model` with the plain weights of its positive cells moved to the nearest nonnegative ones.

        W <- max(W, 0)

    For the cells with `nonnegative=None`, after each update:

        model = positive.project(eqx.apply_updates(model, updates))

    **Arguments:**

    - `model`: any pytree; or what `eqx.partition` or `eqx.filter` makes of one, such as the tree of
        parameters.

    **Returns:** the same structure. Parametrised weights, and all that is no weight of a
    `positive.AbstractNonnegative`, are the same objects.

    **Cost:** one elementwise operation.

    **When not to use it:** on weights that are parametrised, which need no projection. A projected
    entry can stay at exactly 0 for as long as its gradient is positive; a squared one, at 0, stays
    there for good.

    Reference: `optax.projections.projection_non_negative`.
    """

    inner = lambda x: isinstance(x, AbstractNonnegative) and x is not model
    out = jax.tree.map(lambda x: project(x) if inner(x) else x, model, is_leaf=inner)
    if isinstance(out, AbstractNonnegative) and eqx.is_inexact_array(out.weight):
        weight = optax.projections.projection_non_negative(out.weight)
        out = eqx.tree_at(lambda cell: cell.weight, out, weight)
    return out

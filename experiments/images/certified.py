"""Certificates of a positive concave network: of its fixed points and of its predictions.

A stage of `deqjax.models.PositiveConcaveNet` at rest is

    x = BN(A y),    z = the fixed point of z = f(z, inject(x)),    y' = BN(P z)

with A affine, BN an affine map of each component and P a pooling. Given y in a box [l, u], y' is in
the box that comes out when each of these is pushed through it:

    A    centre c and radius r become A c and |A| r
    BN   monotone in each component, up or down: the images of the ends, ordered again
    P    monotone: the images of the ends
    z*   nondecreasing in x, since W >= 0 and both activation and inject are nondecreasing: from
         the lower end of an enclosure at inject(x_l) to the upper end of one at inject(x_u)

and the image, a point, is the first box. The class p wins over the whole of the last box if, with
the rows w_j of the head, the minimum over y of (w_p - w_j) y + b_p - b_j is positive for all other
j. Differences before the minimum, not after, keep what the rows have in common out of it.

`deqjax.certify` encloses the fixed point rigorously, its own rounding included. The rounding of the
layers outside the solves (lift, batch norm, pooling, head) is not bounded here: a prediction whose
margin is of its order, some 1e-6 of the logits, is certified as if they were exact.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax
from jaxtyping import Array, Bool, Float, Int

import deqjax
from deqjax.models import PositiveConcaveNet

from images.data import Split


class Box(NamedTuple):
    """All y with lower <= y <= upper in each component, for each example of a batch."""

    lower: Float[Array, "b ..."]
    upper: Float[Array, "b ..."]

    def map(self, monotone: Callable[[Array], Array]) -> "Box":
        """The image under a map of the batch that is monotone in each component, up or down."""
        a, b = monotone(self.lower), monotone(self.upper)
        return Box(jnp.minimum(a, b), jnp.maximum(a, b))

    def affine(self, layer: Callable[[Array], Array]) -> "Box":
        """The smallest box around the image under an affine layer of one example."""
        centre = jax.vmap(layer)((self.lower + self.upper) / 2)
        radius = jax.vmap(_magnitude(layer))((self.upper - self.lower) / 2)
        return Box(centre - radius, centre + radius)


def _magnitude(layer):
    """|A| of an affine layer y -> A y + b: its weights without their signs, its bias zero."""

    def leaf(path, x):
        if not eqx.is_inexact_array(x):
            return x
        return jnp.zeros_like(x) if getattr(path[-1], "name", None) == "bias" else jnp.abs(x)

    return jax.tree_util.tree_map_with_path(leaf, layer)


def enclose(deq: deqjax.nn.DEQ, x: Float[Array, "b ..."], z: Float[Array, "b ..."]):
    """`deqjax.certify` of the fixed points of a batch, near z; x is not yet injected."""
    cell = paramax.unwrap(deq.cell)
    return deqjax.certify(jax.vmap(cell), z, jax.vmap(cell.inject)(x), batched=True)


@eqx.filter_jit
def measure(deqs: tuple[deqjax.nn.DEQ, ...], solves) -> dict[str, list]:
    """Measures how far each solve of a batch got, as the model made it, and how hard it was.

    spectral_radius: lower and upper bound of the batch's largest rho(J) at the fixed point;
    certified_error: median and largest bound of max_i |z_i - z*_i| / z*_i; solve_evaluations: the
    mean over the batch.
    """
    lines = {"spectral_radius": [], "certified_error": [], "solve_evaluations": []}
    for deq, (x, sol) in zip(deqs, solves, strict=True):
        at = enclose(deq, x, sol.value)
        lines["spectral_radius"].append([jnp.max(bound) for bound in at.spectral_radius])
        error = jnp.where(at.holds, at.relative_error, jnp.inf)
        lines["certified_error"].append([jnp.median(error), jnp.max(error)])
        count = sol.stats["num_fn_evals"]
        lines["solve_evaluations"].append(jnp.mean(count, dtype=jnp.float32))
    return lines


def certified_share(
    model: PositiveConcaveNet, norms: eqx.nn.State, prepare, split: Split, size: int, rtol: float
) -> float:
    """The share of a split whose prediction cannot change within the enclosures of the solves."""
    model = eqx.nn.inference_mode(model)
    certified = []
    for images, labels in split.padded(size):
        found = np.asarray(certified_predictions(model, norms, prepare(images), rtol))
        certified.extend(found[: len(labels)])
    return float(np.mean(certified))


@eqx.filter_jit
def certified_predictions(
    model: PositiveConcaveNet, norms: eqx.nn.State, images: Float[Array, "b h w c"], rtol: float
) -> Bool[Array, " b"]:
    """Tells whether the class that `model` predicts at rest is that of all points of the last box.

    An example of which an enclosure does not hold is not certified.
    """
    classes, box, holds = last_box(model, norms, images, rtol)
    return holds & wins(model.head, classes, box)


def last_box(
    model: PositiveConcaveNet, norms: eqx.nn.State, images: Float[Array, "b h w c"], rtol: float
) -> tuple[Int[Array, " b"], Box, Bool[Array, " b"]]:
    """The classes predicted, what the head sees as a box, and whether all enclosures hold.

    The solves go on from the model's own results to the tolerance `rtol`: no box can be narrower
    than what its solve leaves open.
    """
    logits, _, solves = model(images, norms)
    box, holds = Box(images, images), jnp.ones(len(images), bool)
    for i, (stage, (_, sol)) in enumerate(zip(model.stages, solves, strict=True)):
        x = box.affine(stage.lift).map(partial(_at_rest, stage.norm_before, norms))
        solver = dataclasses.replace(stage.deq.solver, rtol=rtol, atol=0.0)
        deq = dataclasses.replace(stage.deq, solver=solver)
        ends = x[:1] if i == 0 else x  # the first box is a point
        ends = [enclose(deq, end, deq.batch(end, z0=sol.value)[0]) for end in ends]
        holds &= ends[0].holds & ends[-1].holds
        z = Box(ends[0].lower, ends[-1].upper)
        box = z.map(jax.vmap(stage.after)).map(partial(_at_rest, stage.norm_after, norms))
    box = box.map(jax.vmap(model.pool)).map(lambda y: y.reshape(len(y), -1))
    return jnp.argmax(logits, -1), box, holds


def wins(head: eqx.nn.Linear, classes: Int[Array, " b"], box: Box) -> Bool[Array, " b"]:
    """Tells whether the head gives an example's class the largest logit on the whole of its box."""
    assert head.bias is not None
    margin = lambda w: w[classes][:, None] - w[None]  # (b, classes, ...)
    centre, radius = (box.lower + box.upper) / 2, (box.upper - box.lower) / 2
    product = partial(jnp.einsum, "bjf,bf->bj", precision="highest")
    weight = margin(head.weight)
    least = product(weight, centre) - product(jnp.abs(weight), radius) + margin(head.bias)
    itself = jnp.arange(head.bias.size)[None] == classes[:, None]
    # Not a search for least <= 0, which NaN, as of a failed solve, is not.
    return jnp.all((least > 0) | itself, -1)


def _at_rest(norm: eqx.nn.BatchNorm, norms: eqx.nn.State, x: Array) -> Array:
    # Equinox has one example's channels first.
    y, _ = jax.vmap(norm, (0, None), (0, None), axis_name="batch")(jnp.moveaxis(x, -1, 1), norms)
    return jnp.moveaxis(y, 1, -1)

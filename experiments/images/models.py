"""The networks by name, and the baseline: a residual network without a solve."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import deqjax
from deqjax.models import ImplicitResNet, PositiveConcaveNet

ACTIVATIONS = {
    "tanh": jnp.tanh,
    "softsign": jax.nn.soft_sign,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
}


def constructor(
    model: str,
    *,
    features: tuple[int, ...],
    max_steps: int,
    tolerance: float,
    gradient_tolerance: float,
    beta: float,
    activation: str,
    widths: int | tuple[int, ...] = 1,
    dtype: str = "float32",
) -> Callable[..., Any]:
    """The function that makes a network from `(image_shape, num_classes, key=key)`."""
    residual = {
        "channels": features,
        "width": widths,
        # None, the dtype of the parameters, casts nothing.
        "compute_dtype": None if dtype == "float32" else dtype,
    }
    reversible = {
        # Zero tolerances: all examples take the same steps, and the gradient is that of these.
        "solver": deqjax.Reversible(beta=beta, rtol=0.0, atol=0.0),
        "adjoint": deqjax.ReversibleAdjoint(),
        "max_steps": max_steps,
    }
    concave = {
        "activation": ACTIVATIONS[activation],
        "solver": deqjax.FixedPointIteration(rtol=tolerance, atol=1e-6),
        # The series alone: a step of the Anderson method, to which the default goes on once a
        # single example of the batch stalls, moves 32 copies of z through a memory that takes as
        # long over them as over several of these small convolutions.
        "adjoint": deqjax.ImplicitAdjoint(
            linear_solver=deqjax.FixedPointIteration(rtol=gradient_tolerance)
        ),
        "max_steps": max_steps,
    }
    match model:
        case "implicit-resnet" | "implicit-resnet-multiscale":
            return partial(ImplicitResNet, **residual, **reversible)
        case "pc-linear":
            return partial(PositiveConcaveNet.linear, size=features[0], **concave)
        case "pc-single":
            return partial(PositiveConcaveNet.single, channels=features[0], **concave)
        case "pc-multi":
            return partial(PositiveConcaveNet.multi, channels=features, **concave)
        case _:
            return partial(ResNet, **residual)


class Once(eqx.Module):
    """Stands where a DEQ does, and gives z = cell(x, x)."""

    cell: Callable[[Array, Array], Array]

    def batch(self, xs: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        return jax.vmap(self.cell)(xs, xs), None


class ResNet(eqx.Module):
    """`ImplicitResNet` with x + cell(x, x) for each x + DEQ(x), and so with its parameters.

    **Arguments and call:** those of `ImplicitResNet`; `deqs` and `solves` are empty.
    """

    twin: ImplicitResNet

    def __init__(self, image_shape, num_classes, *, channels, width, compute_dtype, key):
        sizes = {"channels": channels, "width": width, "compute_dtype": compute_dtype}
        implicit = ImplicitResNet(image_shape, num_classes, **sizes, key=key)
        once = [Once(deq.cell) for deq in implicit.deqs]
        self.twin = eqx.tree_at(lambda net: list(net.deqs), implicit, once)

    @property
    def deqs(self) -> tuple[()]:
        return ()

    def __call__(self, images, state):
        logits, state, _ = self.twin(images, state)
        return logits, state, ()

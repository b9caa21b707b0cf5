"""A linear layer with dropout, whose solutions have closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
from problems import matrix

import deqjax
from deqjax import nn

SIZE, BATCH = 6, 5
KEY = jax.random.key(3)
PICARD = deqjax.FixedPointIteration(rtol=1e-6, atol=1e-6)
FIXED = deqjax.FixedPointIteration(rtol=0.0, atol=0.0)
UNROLLED = deqjax.RecursiveCheckpointAdjoint()


class Cell(eqx.Module):
    """`z = drop(W z) + c x`, which has closed forms."""

    weight: jax.Array
    drop: nn.VariationalDropout
    scale: float = 1.0

    def inject(self, x):
        return self.scale * x

    def __call__(self, z, x):
        return self.drop(self.weight @ z) + x


def cell(p=0.4, scale=1.0, dtype=jnp.float32):
    return Cell(jnp.asarray(matrix(SIZE, 0.5, 0), dtype), nn.VariationalDropout((SIZE,), p), scale)


def layer(cell, solver=PICARD, adjoint=deqjax.ImplicitAdjoint(), max_steps=100, **kwargs):
    return nn.DEQ(cell, solver, adjoint, max_steps, **kwargs)


def inputs(*shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), shape).astype(dtype)

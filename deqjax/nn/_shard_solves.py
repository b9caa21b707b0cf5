import dataclasses

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from ._deq import DEQ


def shard_solves(model: PyTree, sharding: NamedSharding | None) -> PyTree:
    """Makes each `nn.DEQ` in `model` solve a batch device by device.

    Under `jax.jit` alone, with the batch split over devices, all devices take the steps of the
    slowest example, with an all-reduce in the condition of the loop at every step. The sweep of a
    reversible solve also sums the cotangent of the parameters over the devices at every step. Here
    each solve is a `jax.shard_map`: no loop has a collective, and the gradient, which is taken
    outside, is summed once. The numbers are the same up to rounding.

    **Arguments:**

    - `model`: any pytree with `nn.DEQ` in it.
    - `sharding`: of a batch, its first axis split over the mesh. `None`, or a mesh of one device,
        gives the behaviour without this function.

    **Returns:** a tree like `model`, for `jax.jit`, in which only `batch` behaves differently.

    **When not to use it:** inside your own `jax.shard_map` or `jax.pmap`, or with parameters that
    are sharded over devices. The number of devices has to divide the batch.
    """
    if sharding is not None and sharding.mesh.size == 1:
        sharding = None
    is_deq = lambda x: isinstance(x, DEQ)
    place = lambda x: dataclasses.replace(x, sharding=sharding) if is_deq(x) else x
    return jax.tree.map(place, model, is_leaf=is_deq)

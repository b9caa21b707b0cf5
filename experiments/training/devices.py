"""The devices of a run: one process or several, one mesh over all of them, a batch split over it.

JAX finds the other processes by itself on TPU pods and under SLURM, Open MPI and Kubernetes; where
it can't, each process is told by hand: the address of process 0, how many there are, which it is.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

T = TypeVar("T")


def initialize(
    distributed: bool,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes of the run, before any other use of JAX.

    On CPUs the processes talk by Gloo, which is JAX's default.
    """
    by_hand = (coordinator, processes, process_id)
    if not distributed:
        if by_hand != (None, None, None):
            raise SystemExit(
                f"Expected --distributed beside --coordinator, --processes and --process-id, got "
                f"{by_hand} without it. Add --distributed, or leave them out."
            )
        return
    if by_hand != (None, None, None) and None in by_hand:
        raise SystemExit(
            "Expected --coordinator, --processes and --process-id together, got "
            f"{by_hand}. Pass all three, or none where JAX finds the cluster by itself."
        )
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(
            f"--distributed expected to join a cluster, got {type(error).__name__}: {error}\nOn "
            "TPU pods and under SLURM, Open MPI or Kubernetes JAX finds it; elsewhere pass, in "
            "each process, --coordinator HOST:PORT --processes N --process-id I, I = 0 on HOST."
        ) from None


def begin(config: Any) -> None:
    """Joins the other processes; a smoke run is compiled in the quickest way."""
    initialize(config.distributed, config.coordinator, config.processes, config.process_id)
    if config.smoke:
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long


def is_main() -> bool:
    """Tells whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def mesh() -> tuple[NamedSharding, NamedSharding]:
    """Two shardings over all devices of all processes: the batch axis split, everything on each."""
    devices = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(devices, P("data")), NamedSharding(devices, P())


def check_batch(size: int, accumulate: int, most: int, what: str) -> None:
    """Refuses a batch that is not shared out evenly over devices and parts."""
    if size % (jax.device_count() * accumulate) or size > most:
        times = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        raise SystemExit(
            f"Expected a batch size that divides by the {jax.device_count()} devices JAX shows"
            f"{times} and is at most the {most:,} training {what}; got {size}. Pass another "
            "--batch-size, or show JAX fewer devices."
        )


def place(examples: Iterable[np.ndarray], sharding: NamedSharding) -> tuple[jax.Array, ...]:
    """Splits a global batch, which every process has, over the devices.

    Of a local array of the global shape JAX takes the rows of this process's own devices, in
    whatever order the mesh has them; nothing travels between processes.
    """
    make = jax.make_array_from_process_local_data
    return tuple(make(sharding, x, x.shape) for x in examples)


def replicate(tree: PyTree, replicated: NamedSharding) -> PyTree:
    """Arrays that every process has made, alike, as global ones: `device_put` takes no others."""
    return jax.jit(lambda x: x, out_shardings=replicated)(tree)


def local(tree: PyTree) -> PyTree:
    """The copy of replicated arrays in this process, for work without the others."""
    one = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
    return jax.tree.map(one, tree)


def agree(number: int) -> int:
    """The number that the main process has, in all of them."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def main_first(make: Callable[[], T]) -> T:
    """Calls `make` in the main process first: the others then find what it has cached."""
    value, failure = None, None
    if is_main():
        try:
            value = make()
        except SystemExit as error:  # which the other processes have to know of
            failure = error
    if agree(int(failure is not None)):
        raise failure or SystemExit("Stopped: the main process could not read its data.")
    return value if value is not None else make()


def everywhere(holds: bool) -> bool:
    """Tells whether something holds in all processes: the same answer in each."""
    return bool(np.all(multihost_utils.process_allgather(np.bool_(holds))))

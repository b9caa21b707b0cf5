"""Seconds and bytes of value and gradient, of a block and of a whole model, beside the floor."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from bench.blocks import Cell
from bench.digits import digit_bytes
from bench.gradients import ADJOINTS, solver, value_and_grad
from bench.pieces import pieces
from bench.rows import Row
from bench.throughput.blocks import Images, Language, distinct, unrolled
from bench.timing import Calls, compiled, interleaved, medians, temporary_bytes
from bench.ways import DType, Variant, floor, needed_flop

Case = tuple[Variant, int]  # and the number of evaluations
Size = Language | Images

LOOP = 8  # calls of a short piece in a row, as many as the paper's solve has


def written(cell: Cell, variant: Variant, d: int, evaluations: int) -> int:
    """Bytes of digits that the exact state writes down."""
    if variant not in ("exact", "isolated"):
        return 0
    return cell.z0.size * digit_bytes(solver(variant, d), d, cell, evaluations)


def gradient_program(cell: Cell, variant: Variant, evaluations: int, d: int) -> tuple[Any, ...]:
    """`(fn, *inputs)`: a loss of the solution and its gradient in parameters and input."""
    if variant in ADJOINTS:
        fn = value_and_grad(variant, cell, d, evaluations)
        return fn, cell.z0, cell.args, cell.cotangent
    params, x = cell.args

    def loss(args: tuple[PyTree, Array], z0: Array, cotangent: Array) -> Array:
        return jnp.sum(unrolled(cell.fn, args[0], z0, args[1], "," in variant) * cotangent)

    args = (distinct(params, evaluations), x)
    return jax.value_and_grad(loss), args, cell.z0, cell.cotangent


class Programs:
    """Compiled, to be timed in interleaved rounds; one that does not fit is not run."""

    def __init__(self, dtype: DType):
        self.calls: Calls = {}
        self.bytes: dict[str, int] = {}
        self.times: dict[str, int] = {}
        self.limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
        self.size = 1024 if jax.default_backend() == "cpu" else 8192
        a = jnp.ones((self.size, self.size), dtype)
        self.add("product", jnp.matmul, a, a, times=LOOP)

    def add(self, name: str, fn: Callable[..., Any], *inputs: Any, times: int = 1) -> None:
        """`times`: called so often in a row, and its time divided by that."""
        program = compiled(fn, *inputs)
        self.bytes[name] = temporary_bytes(program)
        self.times[name] = times

        def call() -> Any:
            for _ in range(times - 1):
                jax.block_until_ready(program(*inputs))
            return program(*inputs)

        if self.bytes[name] < self.limit:
            self.calls[name] = call

    def check(self, name: str) -> None:
        """A state out of range is frozen, which may take another time than one that moves."""
        found = jax.tree.leaves(self.calls[name]() if name in self.calls else ())
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in found):
            raise SystemExit(
                f"Expected a finite gradient of {name}, got NaN or infinity: the state left the "
                "range of its integers. Take fewer evaluations."
            )

    def seconds(self, rounds: int) -> dict[str, float]:
        """Seconds of one call, the median over the rounds."""
        found = medians(interleaved(self.calls, rounds))
        return {name: seconds / self.times[name] for name, seconds in found.items()}

    def rate(self, seconds: dict[str, float]) -> float:
        """Operations a second of one large matrix product."""
        return 2 * self.size**3 / seconds["product"]


def block_rows(
    size: Size, batch: int, dtype: DType, cases: list[Case],
    *, looped: bool, rounds: int, key: PRNGKeyArray,
) -> list[Row]:  # fmt: skip
    """Value and gradient of the solves alone, one row per case and scale.

    `looped`: with the floor in a loop too.
    """
    cells, programs = size.cells(batch, dtype, key), Programs(dtype)
    for cell in cells:
        for piece, program in pieces(cell, LOOP).items():
            # Alone a piece may finish before the machine turns to other work, and a solve hardly
            # ever; a row of them takes as long as a solve.
            if looped or "loop" not in piece:
                times = 1 if "loop" in piece else LOOP
                programs.add(f"{cell.name}: {piece}", *program, times=times)
        for variant, n in cases:
            name = f"{cell.name}: {variant}, {n} evaluations"
            programs.add(name, *gradient_program(cell, variant, n, size.d))
            if variant in ("exact", "isolated"):
                programs.check(name)
    seconds = programs.seconds(rounds)
    rows = []
    for cell, flop in zip(cells, size.flop(batch), strict=True):
        once = [seconds[f"{cell.name}: {piece}"] for piece in ("f", "vjp")]
        inside = [
            seconds.get(f"{cell.name}: {piece} in a loop", 0) / LOOP for piece in ("f", "vjp")
        ]
        for variant, n in cases:
            name = f"{cell.name}: {variant}, {n} evaluations"
            about = {"scale": cell.name, "variant": variant, "dtype": dtype, "batch": batch}
            measured = {
                "evaluations": n,
                "seconds": seconds.get(name),
                "floor": floor(variant, n, *once),
                "floor in a loop": floor(variant, n, *inside) if looped else None,
                "bytes": programs.bytes[name],
                "digits": written(cell, variant, size.d, n),
                "flop": needed_flop(variant, n, flop),
                "rate": programs.rate(seconds),
            }
            rows.append(about | measured | dict(zip(("f", "vjp"), once, strict=True)))
    return rows


def model_rows(
    size: Size, batch: int, dtype: DType, cases: list[Case], *, rounds: int, key: PRNGKeyArray
) -> list[Row]:
    """Value and gradient of the whole model's loss, as in training."""
    programs = Programs(dtype)
    for variant, n in cases:
        programs.add(f"{variant}, {n}", *size.model(variant, n, batch, dtype, key))
    seconds = programs.seconds(rounds)
    rows = []
    for variant, n in cases:
        name = f"{variant}, {n}"
        about = {"variant": variant, "dtype": dtype, "batch": batch, "evaluations": n}
        rows.append(about | {"seconds": seconds.get(name), "bytes": programs.bytes[name]})
    return rows


def device_memory() -> int | None:
    """The most bytes that this process ever held on the device; a CPU does not count them."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def load() -> float:
    return os.getloadavg()[0]

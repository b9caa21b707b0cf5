"""The cost of a solve and its gradient on this machine, over what they cannot do without.

Over the floor: value and gradient of one solve, against the evaluations of f and their VJPs that
the method needs, each timed in a loop of their own.

The loop that isolates f: f in a loop whose length the program knows, in one of unknown length, and
in one of known length with f alone in a loop of one trip, as `guard_bits=0` has it; and a gradient
with it and without (`exact=False`). A machine that reads a predicate on the host shows here.

How much of the time the device is idle cannot be read off a program; two figures bound it. The same
programs on one example as small as it gets have next to nothing to compute: the time of an
evaluation there, over that at full size, is what starting its kernels may take. And one solve of 64
evaluations against eight of 8, queued without waiting: the difference is what it takes to start and
to end a solve.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax

from bench.accelerator.run import (
    Program,
    Run,
    Size,
    compiled,
    good,
    mebibytes,
    milliseconds,
    seconds,
)
from bench.blocks import Cell
from bench.digits import digit_bytes
from bench.gradients import ADJOINTS, solver
from bench.pieces import pieces
from bench.throughput.blocks import Images, Language, distinct, unrolled
from bench.ways import VJP_FLOP, DType, Method, Variant, floor

LANGUAGE: dict[Size, Language] = {
    "smoke": Language(8, 2, (8,), 4, 32),
    "reduced": Language(64, 2, (256, 256), 32, 2048),
    "full": Language(768, 12, (3072, 3072), 448, 50_304),
}
IMAGES: dict[Size, Images] = {
    "smoke": Images((8,), (1,), 4),
    "reduced": Images((16, 32), (1, 3), 16),
    "full": Images((128, 256, 256, 128), (1, 3, 3, 1), 32),
}
BATCH: dict[Size, tuple[int, int]] = {"smoke": (1, 1), "reduced": (4, 4), "full": (32, 64)}
VARIANTS: tuple[Variant, ...] = ("exact", "float", "checkpointed", "explicit")
EVALUATIONS = 8  # the paper's
LOOP = 8
DEPTHS = (4, 16, 64, 256)
LONG = 64
# The language block adds to z without normalising it: room for hundreds of evaluations.
ROOM = {"fraction_bits": 20}
_NOT_LOST = "no NaN"
_FLAT = 1.1  # of the memory at the smallest depth, the digits not counted


def gradient(variant: Variant, cells: list[Cell], n: int, d: int) -> Program:
    """Value and gradient in parameters and input of one solve of each cell."""
    own = lambda c: (distinct(c.args[0], n), c.args[1]) if variant == "explicit" else c.args
    how = solver(variant, d, **ROOM)

    def loss(args: PyTree, cell: Cell, z0: Array, cotangent: Array) -> Array:
        if variant == "explicit":
            return jnp.sum(unrolled(cell.fn, args[0], z0, args[1], False) * cotangent)
        options: dict[str, Any] = {"batched": True, "max_steps": n}
        options["adjoint"] = ADJOINTS[cast(Method, variant)]
        return jnp.sum(deqjax.fixed_point(cell.fn, how, z0, args, **options).value * cotangent)

    def fn(*inputs):
        pairs = zip(cells, inputs, strict=True)
        return [jax.value_and_grad(loss)(args, cell, *rest) for cell, (args, *rest) in pairs]

    return fn, tuple((own(c), c.z0, c.cotangent) for c in cells)


def looped(cells: list[Cell]) -> dict[str, Program]:
    """f of all cells, and f with its VJP, so many times in a loop."""

    def together(piece: str) -> Program:
        each = [pieces(cell, LOOP)[f"{piece} in a loop"] for cell in cells]
        fns = [fn for fn, *_ in each]
        fn = lambda *inputs: [f(*x) for f, x in zip(fns, inputs, strict=True)]
        return fn, tuple(tuple(inputs) for _, *inputs in each)

    return {"f": together("f"), "vjp": together("vjp")}


def loops(cell: Cell) -> dict[str, Program]:
    """Evaluations of f in a loop of known length, of unknown length, and isolated."""

    def isolated(i: Array, z: Array, args: Any) -> Array:
        # A bound that is known is no loop to XLA.
        one = jax.lax.optimization_barrier(jnp.minimum(i + 1, 1))
        body = lambda c: (c[0] + 1, cell.fn(c[1], args))
        return jax.lax.while_loop(lambda c: c[0] < one, body, (jnp.zeros_like(one), z))[1]

    plain = lambda n, z, args: jax.lax.fori_loop(0, n, lambda _, z: cell.fn(z, args), z)
    inside = lambda z, args: jax.lax.fori_loop(0, LONG, lambda i, z: isolated(i, z, args), z)
    inputs = (cell.z0, cell.args)
    return {
        "of known length": (lambda z, args: plain(LONG, z, args), inputs),
        "of unknown length": (plain, (jnp.asarray(LONG), *inputs)),
        "of known length, f isolated": (inside, inputs),
    }


def language(size: Size, dtype: DType, key: PRNGKeyArray, *, smallest: bool = False) -> list[Cell]:
    batch, at = BATCH[size][0], LANGUAGE[size]
    if smallest:
        batch, at = 1, dataclasses.replace(at, width=2 * at.heads, hidden=(4, 4), length=1)
    return at.cells(batch, dtype, key)


def images(size: Size, dtype: DType, key: PRNGKeyArray) -> list[Cell]:
    return IMAGES[size].cells(BATCH[size][1], dtype, key)


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    """One program of each form. Those that are timed differ in sizes and numbers alone."""
    for dtype in ("float32", "bfloat16"):
        for name, cells in (("language", language), ("images", images)):
            made = cells(size, dtype, key)
            forms = looped(made) | {v: gradient(v, made, 2, 2) for v in VARIANTS}
            yield from ((f"{name}, {dtype}, {form}", each) for form, each in forms.items())
    (cell,) = language(size, "float32", key, smallest=True)
    yield from loops(cell).items()


def cost(run: Run) -> None:
    blocks = {"language block": (LANGUAGE, language), "multi-scale blocks": (IMAGES, images)}
    cases: dict[str, Callable[[], None]] = {}
    for (name, (sizes, made)), batch in zip(blocks.items(), BATCH[run.size], strict=True):
        for dtype in ("float32", "bfloat16"):
            case, block = f"{name}, {dtype}", (sizes[run.size], batch, dtype, made)
            cases[case] = partial(over_the_floor, run, case, *block)
    first, *rest = cases
    more = {"memory": memory, "isolation": isolation, "long and short": long_and_short}
    order = {first: cases[first]} | {name: partial(case, run) for name, case in more.items()}
    run.cases(order | {name: cases[name] for name in rest[: run.pick(0, 3, 3)]})


def over_the_floor(run: Run, case: str, size: Any, batch: int, dtype: DType, made: Any) -> None:
    cells = made(run.size, dtype, run.key)
    variants = VARIANTS[: run.pick(1, None, None)]
    forms = looped(cells) | {v: gradient(v, cells, EVALUATIONS, size.d) for v in variants}
    found = compiled(forms)
    f, vjp = good(found["f"]), good(found["vjp"])
    fits = {v: p for v in variants if not isinstance(p := found[v], Exception)}
    calls = {"f": f.call, "vjp": vjp.call} | {v: p.call for v, p in fits.items()}
    taken = seconds(calls, run.pick(1, 5, 10), max(run.left / 4, 1.0))
    once, both = taken["f"] / LOOP, taken["vjp"] / LOOP
    flop = sum(size.flop(batch))
    rate = run.known("rates").get(dtype, math.nan)
    about = f"{once * 1e3:.3g} and {both * 1e3:.3g} ms, {flop / once / rate:.0%}"
    about += f" and {VJP_FLOP * flop / both / rate:.0%} of the rate of products"
    run.add(f"{case}: f, f with its VJP", about, f=once, vjp=both)
    for v in variants:
        if v not in fits:
            run.add(f"{case}: {v}", str(found[v])[:200], note="note")
            continue
        least = floor(v, EVALUATIONS, once, both)
        each = taken[v] / EVALUATIONS
        said = f"{milliseconds(each)} an evaluation, {taken[v] / least:.2f} of the floor, "
        said += f"{size.units(batch) / taken[v]:.4g} {size.unit}/s, {mebibytes(fits[v].bytes)}"
        ok = finite(fits[v].call()) if v == "exact" else None
        numbers = {"seconds": taken[v], "floor": least, "bytes": fits[v].bytes}
        run.add(f"{case}: {v}", said, limit=_NOT_LOST if v == "exact" else "", ok=ok, **numbers)


def memory(run: Run) -> None:
    """Memory of the language block, of few evaluations first: a device counts its peak so far."""
    (cell,) = language(run.size, "float32", run.key)
    depths = DEPTHS[:2] if run.size == "smoke" else DEPTHS
    every: tuple[Variant, ...] = run.pick(VARIANTS[:1], ("exact", "checkpointed"), VARIANTS[:3])
    found = compiled({f"{v}, {n}": gradient(v, [cell], n, 2) for v in every for n in depths})
    for v in every:
        exact, sizes, held, kept = v == "exact", [], [], True
        for n in depths:
            program = good(found[f"{v}, {n}"])
            digits = (
                cell.z0.size * digit_bytes(solver("exact", 2, **ROOM), 2, cell, n) if exact else 0
            )
            sizes.append(None if program.bytes is None else program.bytes - digits)
            kept &= finite(program.call())
            held.append((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"))
        said = ", ".join(map(mebibytes, sizes)) + " beside the digits" * exact
        if held[0]:
            said += "; held at most " + " ".join(f"{x / 2**20:.4g}" for x in held)
        asked = exact and None not in sizes
        ok = max(sizes) <= _FLAT * sizes[0] and kept if asked else None
        limit = f"{_FLAT} of the first, {_NOT_LOST}" if asked else ""
        case = f"memory at {', '.join(map(str, depths))} evaluations, {v}"
        run.add(case, said, limit=limit, ok=ok, bytes=sizes, held=held)


def finite(tree: PyTree) -> bool:
    """Tells whether there is no NaN, which a lost reversal leaves."""
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


def isolation(run: Run) -> None:
    (cell,) = language(run.size, "float32", run.key)
    (small,) = language(run.size, "float32", run.key, smallest=True)
    forms: dict[str, Program] = {}
    sizes = {"full size": cell, "one token": small}
    if run.size == "smoke":
        del sizes["full size"]
    for name, each in sizes.items():
        forms |= {f"loop {k}: {name}": p for k, p in loops(each).items()}
        both: tuple[Variant, ...] = ("isolated", "float")
        forms |= {f"gradient, {v}: {name}": gradient(v, [each], LONG, 2) for v in both}
    calls = {name: good(each).call for name, each in compiled(forms).items()}
    taken = seconds(calls, run.pick(1, 3, 10), max(run.left / 4, 1.0))
    us = {name: each / LONG * 1e6 for name, each in taken.items()}
    for name in (name for name in us if name.endswith("full size")):
        case, idle = name.partition(":")[0], us[name.replace("full size", "one token")]
        said = f"{us[name]:.4g} us an evaluation, {idle:.4g} us with nothing to compute: "
        said += f"{min(idle / us[name], 1):.0%} at most"
        run.add(f"isolation, {case}", said, full=us[name], least=idle)
    for name in sizes:
        plain, alone = (us[f"loop of known length{x}: {name}"] for x in ("", ", f isolated"))
        exact, real = (us[f"gradient, {v}: {name}"] for v in ("isolated", "float"))
        said = f"{alone - plain:+.3g} us an evaluation of f; a gradient's, with one more f, "
        said += f"{exact - real:+.3g} us"
        run.add(f"isolation, cost of the loop of one trip, {name}", said)


def long_and_short(run: Run) -> None:
    (cell,) = language(run.size, "float32", run.key)
    short, many = 8, LONG // 8
    found = compiled({str(n): gradient("exact", [cell], n, 2) for n in (short, LONG)})
    one, few = good(found[str(LONG)]), good(found[str(short)])
    calls = {"long": one.call, "short": lambda: [few.call() for _ in range(many)][-1]}
    taken = seconds(calls, run.pick(1, 3, 10), max(run.left / 4, 1.0))
    said = f"{milliseconds(taken['long'])} and {milliseconds(taken['short'])}: "
    said += f"{1 - taken['long'] / taken['short']:.1%} to start and end a solve"
    run.add(f"one solve of {LONG}, {many} of {short} evaluations, exact", said, seconds=taken)

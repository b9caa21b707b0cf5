"""The cost of a solve beside its evaluations of f; all ratios are of times of the same round."""

import functools as ft
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from bench.blocks import Cell
from bench.compare.methods import OURS, available, distance, solve
from bench.rows import Row
from bench.timing import Calls, by_steps, interleaved, median_ratio, ready, temporary_bytes

# Copies of z that the history of a step moves, with m rows: what it has to read (Anderson: -y
# twice, for its products with y and with g, and v once; Broyden: s likewise, then v twice, for the
# other side of its Gram matrix and the step), what it writes (a row of each), and 3 more for the
# last accepted z and f(z), which are read, and replaced by those of this step, read anyhow.
READS = {"Anderson": 3, "Broyden": 4}
WINDOW = {"Anderson": 5, "Broyden": 16}  # the defaults
ROWS_WRITTEN = 2
VECTORS = 6  # z, f(z) and the last accepted pair read, that pair written


def history_bytes(method: str, size: int, itemsize: int = 4) -> int:
    """Bytes that one step at a full window moves."""
    copies = READS[method] * WINDOW[method] + ROWS_WRITTEN + VECTORS
    return copies * size * itemsize


def overhead(size: int, steps: int, rounds: int) -> list[Row]:
    """Seconds of a step beyond f, and those that its history takes at the memory's bandwidth.

    f is `a z + b` with rates a evenly from -0.99 to 0.99, whose solves last: a window stays full of
    secants that are independent. A step's time is the difference of a long solve and a short one.
    """
    a, z = jnp.linspace(-0.99, 0.99, size), jnp.zeros(size)
    args = (a, jnp.ones(size))
    fn = lambda z, args: args[0] * z + args[1]
    short = WINDOW["Broyden"] + 4
    calls: Calls = {}
    for method, fixed in itertools.product(WINDOW, (True, False)):
        # The tolerance cannot be met: with it, a step also measures and keeps the best iterate.
        solver = OURS[method](1e-30)
        if fixed:
            kind: Any = type(solver)
            solver = kind(rtol=0.0, atol=0.0)

        def run(z, args, n, solver=solver):
            options = {"max_steps": short + steps, "steps": n}
            return deqjax.fixed_point(fn, solver, z, args, **options).value

        name = f"{method}, {'fixed depth' if fixed else 'tolerance'}"
        both = by_steps(run, z, args, steps=(short, short + steps))
        calls |= {f"{name} {n}": call for n, call in both.items()}
    loop = lambda z, args: jax.lax.fori_loop(0, steps, lambda _, z: fn(z, args), z)
    calls["f"] = ready(loop, z, args)
    streams = _streams(16 * size)
    calls |= {name: ready(program, *inputs) for name, (program, inputs, _) in streams.items()}
    found = interleaved(calls, rounds)
    # The faster one of the two, in seconds a byte, round by round.
    each = [[s / moved for s in found[name]] for name, (*_, moved) in streams.items()]
    per_byte = [min(pair) for pair in zip(*each, strict=True)]
    rows = []
    for method, kind in itertools.product(WINDOW, ("tolerance", "fixed depth")):
        long, few = (found[f"{method}, {kind} {n}"] for n in (short + steps, short))
        beyond = [(x - y - f) / steps for x, y, f in zip(long, few, found["f"], strict=True)]
        need = [s * history_bytes(method, size) for s in per_byte]
        row = {"method": method, "mode": kind, "size": size, "bytes": history_bytes(method, size)}
        row |= {"seconds": statistics.median(beyond), "f": statistics.median(found["f"]) / steps}
        row |= {"bandwidth": 1 / statistics.median(per_byte), "ratio": median_ratio(beyond, need)}
        rows.append(row)
    return rows


def _streams(size: int) -> dict[str, tuple[Callable, tuple, int]]:
    """`(program, inputs, bytes)`: memory well beyond the caches, read and written, or read alone.

    In a loop whose carry stays in place, so that no page is allocated while the clock runs.
    """
    turns = 4
    x = jnp.ones(size)
    rows = jnp.ones((16, size // 16))
    triad = lambda x, y: jax.lax.fori_loop(0, turns, lambda _, x: 0.5 * x + y, x)
    read = lambda v, rows: jax.lax.fori_loop(0, turns, lambda _, v: v.at[:16].add(rows @ v), v)
    return {
        "triad": (triad, (x, jnp.ones(size)), 3 * 4 * size * turns),
        "products": (read, (jnp.full(size // 16, 1e-9), rows), 4 * size * turns),
    }


def value_and_grad(solver: Callable) -> Callable[..., Any]:
    """A loss and its gradient in `args` as in training, a function of `(z0, args, cotangent)`."""

    def loss(args, z0, cotangent):
        z, evaluations = solver(z0, args)
        return jnp.sum(z * cotangent), evaluations

    return lambda *inputs: jax.value_and_grad(loss, has_aux=True)(inputs[1], inputs[0], inputs[2])


def gradients(cell: Cell, tol: float, batched: bool) -> dict[str, Callable[..., Any]]:
    """Value and gradient by every method on `cell`; ours with `batched`, each example by itself.

    `tol` is relative to the size of the solution; of an example, an equal share is asked for.
    """
    z, _ = jax.jit(solve("Anderson", cell.fn, 1e-6 * cell.z0.size**0.5, 500))(cell.z0, cell.args)
    size = float(distance(z, jnp.zeros_like(z)))
    programs: dict[str, Callable[..., Any]] = {}
    for method in available():
        programs[method] = value_and_grad(solve(method, cell.fn, tol * size, 500))
        if batched and method in OURS:
            share = tol * size / cell.z0.shape[0] ** 0.5
            mine = solve(method, cell.fn, share, 500, batched=True)
            programs[f"{method}, batched"] = value_and_grad(mine)
    return programs


def dense(width: int, batch: int, seed: int) -> Cell:
    """tanh(z W + x), W Gaussian with a spectral norm of 0.9."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((width, width))
    w *= 0.9 / np.linalg.norm(w, 2)
    x, cotangent = (rng.standard_normal((batch, width)) for _ in range(2))
    # Small inputs: tanh is then nearly the identity, and 17 Picard steps are needed.
    weight, x, cotangent = (jnp.asarray(v, jnp.float32) for v in (w, 0.3 * x, cotangent))
    fn = lambda z, args: jnp.tanh(z @ args[0] + args[1])
    return Cell("tanh(z W + x)", fn, jnp.zeros_like(x), (weight, x), cotangent)


def floor(width: int, batch: int, tol: float, rounds: int, seed: int) -> Row:
    """Value and gradient against what they are made of, and beside jaxopt's."""
    cell = dense(width, batch, seed)
    inputs = (cell.z0, cell.args, cell.cotangent)
    calls: Calls = {}
    counts: dict[str, dict[str, int]] = {}
    for name, program in gradients(cell, tol, batched=True).items():
        run = calls[name] = ready(program, *inputs)
        counts[name] = {"evaluations": int(jnp.max(run()[0][1]))}
        if name in ("Picard", "Picard, batched"):
            counts[name]["VJPs"] = _products(cell, name.endswith("batched"))
    pieces, n = _pieces(cell), 16
    for name, (once, start) in pieces.items():
        calls[name] = ready(once, *start)
        calls[f"{name}, looped"] = ready(ft.partial(_loop, once, n), *start)
    # All several times a round: the median of many short calls would miss what a long one meets.
    found = interleaved(calls, rounds, dict.fromkeys(calls, 5) | dict.fromkeys(pieces, n))
    for name in pieces:
        found[f"{name}, looped"] = [x / n for x in found[f"{name}, looped"]]
    return {"shape": [batch, width], "tol": tol, "counts": counts, "all_seconds": found}


def _products(cell: Cell, batched: bool) -> int:
    """VJPs of the backward solve in z; the one in the parameters is not among them."""
    z, _ = jax.jit(solve("Picard", cell.fn, 1e-5 * cell.z0.size**0.5, 500))(cell.z0, cell.args)
    options: Any = {"max_steps": 500, "batched": batched}
    _, stats = deqjax.implicit_vjp(cell.fn, z, cell.args, cell.cotangent, **options)
    return int(jnp.max(stats["num_steps"])) + 1


def _pieces(cell: Cell) -> dict[str, tuple[Callable, tuple]]:
    """`(once, start)`: f, its VJP in z, and that in z and the parameters, linearised beforehand."""
    _, pull = jax.vjp(cell.fn, cell.z0, cell.args)
    zeros = jax.tree.map(jnp.zeros_like, cell.args)

    def in_all(carry, pull):
        v, total = carry
        v, d_args = pull(v)
        return v, jax.tree.map(jnp.add, total, d_args)

    return {
        "f": (cell.fn, (cell.z0, cell.args)),
        "VJP": (lambda v, pull: pull(v)[0], (cell.cotangent, pull)),
        "last VJP": (in_all, ((cell.cotangent, zeros), pull)),
    }


def _loop(once: Callable, n: int, carry: Any, rest: Any) -> Any:
    return jax.lax.fori_loop(0, n, lambda _, carry: once(carry, rest), carry)


def blocks(cells: list[Cell], tol: float, rounds: int) -> list[Row]:
    """Solve and gradient of whole blocks: seconds, evaluations, bytes, the gradient's error."""
    rows: list[Row] = []
    for cell in cells:
        inputs = (cell.z0, cell.args, cell.cotangent)
        truth = exact(cell)
        calls: Calls = {}
        mine: list[Row] = []
        for name, program in gradients(cell, tol, batched=False).items():
            run = calls[name] = ready(program, *inputs)
            (_, evaluations), grad = run()
            about = {"block": cell.name, "shape": list(cell.z0.shape), "method": name}
            counted = {"evaluations": int(evaluations), "bytes": temporary_bytes(run)}
            mine.append({**about, **counted, "error": error(grad, truth)})
        found = interleaved(calls, rounds)
        rows += [row | {"all_seconds": found[row["method"]]} for row in mine]
    return rows


def exact(cell: Cell) -> Any:
    """The implicit gradient in `args`, in float64 throughout."""
    with jax.enable_x64(True):
        cell = cell.astype(jnp.float64)
        run = value_and_grad(solve("Anderson", cell.fn, 1e-12 * cell.z0.size**0.5, 2000))
        grad = jax.jit(run)(cell.z0, cell.args, cell.cotangent)[1]
        return jax.tree.map(np.asarray, grad)


def error(grad: Any, truth: Any) -> float:
    """Relative, over all leaves together, in float64."""
    pairs = list(zip(jax.tree.leaves(grad), jax.tree.leaves(truth), strict=True))
    apart = sum(float(np.sum((np.asarray(a, float) - b) ** 2)) for a, b in pairs)
    return (apart / sum(float(np.sum(b**2)) for _, b in pairs)) ** 0.5

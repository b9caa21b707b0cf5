"""A positive concave convolution: value and gradient over PyTorch, and a step of Anderson's."""

import importlib.util
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import paramax
from jaxtyping import PRNGKeyArray

import deqjax
from deqjax.nn import PositiveConcaveConv2d

from bench.blocks import Cell
from bench.pieces import pieces
from bench.timing import Calls, by_steps, interleaved, median_ratio, ready

TOLERANCE = 1e-4  # relative, of a step, forwards and backwards, as in the authors' code


def concave(
    key: PRNGKeyArray, *, rounds: int, loop: int, smoke: bool
) -> dict[str, list[dict[str, Any]]]:
    """One row per way and one row per method."""
    n, side, channels = (2, 4, 4) if smoke else (64, 28, 82)
    k1, k2, k3 = jax.random.split(key, 3)
    cell = PositiveConcaveConv2d(channels, 3, jnp.tanh, nonnegative=None, key=k1)
    # Rows of W sum to 1.
    weight = paramax.unwrap(cell.weight)
    weight = weight / jnp.sum(weight, (0, 1, 2), keepdims=True)
    cell = eqx.tree_at(lambda c: c.weight, cell, weight)
    x = jax.vmap(cell.inject)(jax.random.normal(k2, (n, side, side, channels)))
    inputs = (weight, x, jax.random.normal(k3, x.shape))
    return {"peer": _peer(cell, inputs, rounds), "steps": _steps(cell, inputs, rounds, loop)}


def _mapped(cell: PositiveConcaveConv2d) -> Callable:
    def fn(z, args):
        weight, x = args
        return jax.vmap(eqx.tree_at(lambda c: c.weight, cell, weight))(z, x)

    return fn


def _peer(cell: PositiveConcaveConv2d, inputs: Any, rounds: int) -> list[dict[str, Any]]:
    options = {"rtol": TOLERANCE, "atol": 0.0, "norm": optimistix.rms_norm}
    picard, anderson = deqjax.FixedPointIteration(**options), deqjax.Anderson(**options, depth=2)
    series = deqjax.ImplicitAdjoint(linear_solver=deqjax.FixedPointIteration(rtol=TOLERANCE))
    default = deqjax.ImplicitAdjoint(tol=TOLERANCE)
    ways = {
        "Picard, series": (picard, series),
        "Picard, default adjoint": (picard, default),
        "Anderson of depth 2, default adjoint": (anderson, default),
        "Picard, ImplicitAdjoint()": (picard, deqjax.ImplicitAdjoint()),
    }
    calls: Calls = {}
    steps: dict[str, Any] = {}
    for name, (solver, adjoint) in ways.items():

        def loss(weight, x, g, solver=solver, adjoint=adjoint):
            solve = {"adjoint": adjoint, "batched": True, "throw": False}
            z0 = cell.initial(x)
            sol = deqjax.fixed_point(_mapped(cell), solver, z0, (weight, x), **solve)
            return jnp.vdot(sol.value, g), jnp.max(sol.stats["num_steps"])

        calls[name] = ready(jax.value_and_grad(loss, (0, 1), has_aux=True), *inputs)
        steps[name] = int(calls[name]()[0][1])
    if importlib.util.find_spec("torch") is not None:
        calls = {"PyTorch": _torch(*(np.asarray(a) for a in inputs)), **calls}
        steps["PyTorch"] = calls["PyTorch"]()
    found = interleaved(calls, rounds)
    peer = found.get("PyTorch")
    return [
        {
            "way": name,
            "steps": steps[name],
            "seconds": statistics.median(seconds),
            "over PyTorch": peer and median_ratio(seconds, peer),
        }
        for name, seconds in found.items()
    ]


def _torch(weight: Any, x: Any, g: Any) -> Callable[[], int]:
    """The same on oneDNN, channels last: Picard from 0, then the series."""
    torch = importlib.import_module("torch")
    last = torch.channels_last
    image = lambda a: torch.tensor(a).permute(0, 3, 1, 2).contiguous(memory_format=last)
    w = torch.tensor(weight).permute(3, 2, 0, 1).contiguous(memory_format=last).requires_grad_()
    x, g = image(x).requires_grad_(), image(g)
    f = lambda z: torch.tanh(torch.nn.functional.conv2d(z, w, padding=1) + x)

    def iterate(step: Callable, z: Any) -> tuple[Any, int]:
        for k in range(1, 257):
            before, z = z, step(z)
            if (z - before).norm() < TOLERANCE * z.norm():
                return z, k
        raise RuntimeError("PyTorch's iteration does not converge.")

    def run() -> int:
        with torch.no_grad():
            z, steps = iterate(f, torch.zeros_like(x))
        z = z.requires_grad_()
        fz = f(z)
        pull = lambda y: torch.autograd.grad(fz, z, y, retain_graph=True)[0]
        y, _ = iterate(lambda y: g + pull(y), g)
        torch.autograd.grad(fz, (w, x), y)
        return steps

    return run


def _steps(cell: PositiveConcaveConv2d, inputs: Any, rounds: int, loop: int) -> Any:
    """Seconds of a step of a solve that goes on, from the difference of a long and a short one."""
    weight, x, cotangent = inputs
    fn, short, long = _mapped(cell), 2, 2 + loop
    block = Cell("", fn, cell.initial(x), (weight, x), cotangent)
    calls: Calls = {"f": ready(*pieces(block, loop)["f in a loop"])}
    methods = {"Picard": deqjax.FixedPointIteration, "Anderson": deqjax.Anderson}
    cases = list(itertools.product(methods, (True, False)))
    for name, batched in cases:

        def solve(weight, x, steps, method=methods[name], batched=batched):
            options = {"max_steps": long, "steps": steps, "batched": batched, "throw": False}
            solver = method(rtol=1e-30, atol=0.0)  # cannot be met
            return deqjax.fixed_point(fn, solver, x, (weight, x), **options).value

        both = by_steps(solve, weight, x, steps=(short, long))
        calls |= {f"{name} {batched} {steps}": call for steps, call in both.items()}
    found = interleaved(calls, rounds)
    rows = []
    for name, batched in cases:
        pair = (found[f"{name} {batched} {steps}"] for steps in (long, short))
        step = [a - b for a, b in zip(*pair, strict=True)]
        about = {"method": name, "state": "batched" if batched else "one problem"}
        ms = 1e3 * statistics.median(step) / loop
        rows.append({**about, "ms": ms, "over f": median_ratio(step, found["f"])})
    return rows

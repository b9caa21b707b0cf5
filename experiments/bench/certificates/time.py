"""The cost of a certificate beside the solve, and of a convolutional cell beside its products.

Everything is compiled alone and timed in interleaved rounds; a ratio is the median over rounds of
two times of the same round.
"""

import functools as ft
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import deqjax

from bench.certificates.cells import dense
from bench.certificates.tight import ORDINARY
from bench.rows import Row
from bench.timing import Calls, floors, interleaved, median_ratio, ready

RTOL = 1e-4
# The default, 10 eps; the series alone, which keeps no room for Anderson's method beside it; and
# the adjoint that such a cell has, to a bound of 1e-4, whose three JVPs are not in the floor.
GRADIENTS = {
    "value and gradient": deqjax.ImplicitAdjoint(),
    "value and gradient, series": deqjax.ImplicitAdjoint(
        deqjax.FixedPointIteration(), tol=10 * float(jnp.finfo(jnp.float32).eps)
    ),
    "value and gradient, bounded": deqjax.PositiveConcaveAdjoint(),
}
LOOP = 4  # pieces in a loop do without the new memory that each one alone has to be given


def time(batch: int, n: int, channels: int, size: int, rounds: int, seed: int) -> Row:
    rows = []
    for name, rho, x in ORDINARY:
        p = dense(name, rho, x, batch, n, "float32", seed)
        title = f"dense {name}, {n} wide, batch {batch}"
        calls, counts = _certificate(p.fn, jnp.zeros_like(p.args[1]), p.args)
        rows.append(_timed(title, calls, counts, 4 * rounds, dict.fromkeys(calls, 5)))
    calls, counts = _image_calls(batch, channels, size, seed)
    title = f"convolution tanh, {channels} channels, {size} x {size}, batch {batch}"
    often: dict[str, int] = {"f": 3, "VJP": 3, "last VJP": 3, "matmul": 3}
    rows.append(_timed(title, calls, counts, rounds, often))
    return {"rows": rows}


def _timed(title: str, calls: Calls, counts: Row, rounds: int, often: dict[str, int]) -> Row:
    load = os.getloadavg()[0]
    found = interleaved(calls, rounds, often)
    for name in found:
        if name.endswith("looped"):
            found[name] = [x / LOOP for x in found[name]]
    loads = [load, os.getloadavg()[0]]
    return {"problem": title, "counts": counts, "load": loads, "all_seconds": found}


def _solve(fn: Callable, z0: jax.Array, args: Any, **options: Any) -> deqjax.Solution:
    solver = deqjax.FixedPointIteration(rtol=RTOL, atol=0.0)
    return deqjax.fixed_point(fn, solver, z0, args, batched=True, **options)


def _certificate(fn: Callable, z0: jax.Array, args: Any) -> tuple[Calls, Row]:
    """A solve, its certificate with and without the radius, and three evaluations and JVPs."""

    def without(z, args):  # what is not returned is not computed
        return deqjax.certify(fn, z, args, batched=True)._replace(spectral_radius=())

    def three(z, args):
        fz, push = jax.linearize(lambda z: fn(z, args), z)
        step = push(push(push(fz - z)))
        return fn(fn(fz + step, args), args)

    certify = lambda z, args: deqjax.certify(fn, z, args, batched=True)
    solve = ready(lambda z0, args: _solve(fn, z0, args), z0, args)
    sol = solve()
    programs = {"certify": certify, "certify, no radius": without, "3 evaluations, 3 JVPs": three}
    calls: Calls = {"solve": solve}
    calls |= {name: ready(program, sol.value, args) for name, program in programs.items()}
    c = calls["certify"]()
    count = lambda x: int(jnp.max(x))
    about = {
        "evaluations": count(sol.stats["num_fn_evals"]),
        "products": count(c.steps),
        "holds": float(jnp.mean(c.holds)),
        "bound": float(jnp.max(c.relative_error)),
    }
    return calls, about


def _cell(z: jax.Array, args: Any) -> jax.Array:
    cell, x = args
    return jax.vmap(cell)(z, x)


def _image_calls(batch: int, channels: int, size: int, seed: int) -> tuple[Calls, Row]:
    """The cell as it is made: W of the reference's size, x behind its softplus."""
    keys = jax.random.split(jax.random.key(seed), 4)
    make = deqjax.nn.PositiveConcaveConv2d
    cell = make(channels, 3, jnp.tanh, nonnegative=None, key=keys[0])
    x = cell.inject(jax.random.normal(keys[1], (batch, size, size, channels)))
    z0, args = jnp.zeros_like(x), (cell, x)
    calls, counts = _certificate(_cell, z0, args)

    def loss(args, z0, adjoint):
        sol = _solve(_cell, z0, args, adjoint=adjoint)
        return jnp.sum(sol.value**2), sol.stats["num_fn_evals"]

    for name, adjoint in GRADIENTS.items():
        both = jax.value_and_grad(ft.partial(loss, adjoint=adjoint), has_aux=True)
        calls[name] = ready(both, args, z0)
    z = calls["solve"]().value
    cotangent = 2 * z
    _, pull = jax.vjp(_cell, z, args)
    in_z = lambda v, pull: pull(v)[0]
    looped = lambda once: lambda v, rest: jax.lax.fori_loop(0, LOOP, lambda _, v: once(v, rest), v)
    calls |= {
        "f": ready(_cell, z, args),
        "VJP": ready(in_z, cotangent, pull),
        "f, looped": ready(looped(_cell), z, args),
        "VJP, looped": ready(looped(in_z), cotangent, pull),
        "last VJP": ready(lambda v, pull: pull(v)[1], cotangent, pull),
    }
    rows, terms = batch * size**2, 9 * channels
    left = jax.random.uniform(keys[2], (rows, terms))
    right = jax.random.uniform(keys[3], (terms, channels))
    calls["matmul"] = ready(jnp.matmul, left, right)
    # One VJP a step, and one for the term that meets the tolerance; then that in W and x.
    products = {}
    for name, adjoint in GRADIENTS.items():
        run = ft.partial(deqjax.implicit_vjp, _cell, batched=True, adjoint=adjoint)
        products[name] = int(jnp.max(jax.jit(run)(z, args, cotangent)[1]["num_steps"])) + 1
    return calls, counts | {"VJPs": products, "flop": 2 * rows * terms * channels}


def ratios(row: Row) -> dict[str, float]:
    s = row["all_seconds"]
    of = lambda a, b: median_ratio(s[a], s[b])
    found = {
        "certify / solve": of("certify", "solve"),
        "no radius / solve": of("certify, no radius", "solve"),
        "certify / 3 + 3": of("certify", "3 evaluations, 3 JVPs"),
        "no radius / 3 + 3": of("certify, no radius", "3 evaluations, 3 JVPs"),
    }
    if "f" in s:
        for name in GRADIENTS:
            counts = (row["counts"]["evaluations"], row["counts"]["VJPs"][name])
            found[f"{name} / floor"] = median_ratio(s[name], floors(s, *counts))
            looped = floors(s, *counts, ", looped")
            found[f"{name} / floor, pieces in a loop"] = median_ratio(s[name], looped)
        found["f / matmul"] = of("f", "matmul")
    return found

"""Exact reversal on this machine: its residual, and its gradient against checkpointed autodiff.

A case is a kind of f, a dtype, a beta and the context of the solve. All 180 would take an hour to
compile: the six kinds come first, then a covering design, in which each two values of two factors
meet at least once. The numbers of evaluations share a program, in which they are an argument.

The residual has to be 0. The reference rounds f otherwise than the program that is tested, so that
the gradients differ by rounding. How much that is, the reference says itself: all its inputs are
moved by a unit in the last place of the products, at random, and four times what that makes of its
gradient is allowed, but no more than a quarter: a lost reversal leaves NaN, or is off by a third.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

import deqjax

from bench.accelerator.cells import FORMS, Kind, kind
from bench.accelerator.run import Compiled, Program, Run, Size, compiled, good

Context = Literal["arguments", "closed over", "vmap", "stopping", "jit(pull)"]
CONTEXTS: tuple[Context, ...] = ("arguments", "closed over", "vmap", "stopping", "jit(pull)")
DTYPES: tuple[str, ...] = ("float32", "bfloat16")
INVERSES: tuple[int, ...] = (2, 5, -5)  # d in 1 - beta = 1 / d
DEPTHS = (8, 64, 256)
_MOST = DEPTHS[-1]
_MOST_OFF = 0.25


class Case(NamedTuple):
    """One program that is tested."""

    kind: str
    dtype: str
    d: int
    context: Context

    def __str__(self) -> str:
        sign = "-" if self.d < 0 else ""
        return f"{self.kind}, {self.dtype}, 1 - beta = {sign}1/{abs(self.d)}, {self.context}"

    @property
    def inputs(self) -> "Case":
        """The case that stands for all of the same reference."""
        return self._replace(context="arguments")


def design() -> list[Case]:
    """The six kinds, and then whichever case brings the most new pairs."""
    factors = (tuple(FORMS), DTYPES, INVERSES, CONTEXTS)
    every = [Case(*each) for each in itertools.product(*factors)]
    pairs = lambda case: set(itertools.combinations(enumerate(case), 2))
    chosen = [Case(name, "float32", 2, "arguments") for name in FORMS]
    missing = set().union(*map(pairs, every)) - set().union(*map(pairs, chosen))
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def solver(case: Case) -> deqjax.Reversible:
    rtol = 1e-3 if case.context == "stopping" else 0.0
    return deqjax.Reversible(rtol=rtol, atol=rtol, beta=1 - 1 / case.d)


def batched(k: Kind) -> Any:
    """f of the whole batch, of `args = (params, x)`."""
    return lambda z, args: jax.vmap(k.one, (0, None, 0))(z, *args)


def tested(case: Case, k: Kind) -> Program:
    """Exact reversal in its context: `(cotangents of (params, x), residual, steps)`."""
    fn, how, together = batched(k), solver(case), case.context == "stopping"
    moving, fixed = eqx.partition(k.params, eqx.is_inexact_array)
    join = lambda args: (eqx.combine(args[0], fixed), args[1])
    mine = lambda z, args: fn(z, join(args))
    args, steps = (moving, k.x), jnp.asarray(_MOST)

    def pulled(f, z0, args, cotangent, steps):
        options: Any = {"batched": together, "steps": steps, "max_steps": _MOST}
        d, stats = deqjax.reversible_vjp(f, how, z0, args, cotangent, **options)
        return d, stats["reversal_residual"], stats["num_steps"]

    def whole(z0, args, cotangent, steps):
        steps = jnp.full(z0.shape[0], steps) if together else steps
        (_, d, _), *more = pulled(mine, z0, args, cotangent, steps)
        return d, *more

    def each(z0, args, cotangent, steps):
        f = lambda z, args: k.one(z, *join(args))
        one = lambda z0, x, cotangent: pulled(f, z0, (args[0], x), cotangent, steps)
        (_, (d, dx), _), *more = jax.vmap(one)(z0, args[1], cotangent)
        return (jax.tree.map(lambda x: jnp.sum(x, 0, jnp.float32), d), dx), *more

    def closed(z0, cotangent, steps):
        held, tree = jax.tree.flatten(args)
        f = lambda z, _: mine(z, jax.tree.unflatten(tree, held))
        (d, _, _), *more = pulled(f, z0, None, cotangent, steps)
        return d, *more

    match case.context:
        case "arguments" | "stopping":
            return whole, (k.z0, args, k.cotangent, steps)
        case "vmap":
            return each, (k.z0, args, k.cotangent, steps)
        case "closed over":
            return closed, (k.z0, k.cotangent, steps)
        case "jit(pull)":
            options: Any = {"adjoint": deqjax.ReversibleAdjoint(), "max_steps": DEPTHS[1]}
            at = lambda args: deqjax.fixed_point(mine, how, k.z0, args, **options).value
            _, pull = jax.vjp(at, args)
            return lambda cotangent: pull(cotangent)[0], (k.cotangent,)


def reference(case: Case, k: Kind) -> Program:
    """The cotangents by checkpointed autodiff of the same recurrence, steps per example."""
    fn, how = batched(k), solver(case.inputs)
    adjoint = deqjax.RecursiveCheckpointAdjoint()
    moving, fixed = eqx.partition(k.params, eqx.is_inexact_array)

    def run(z0, args, cotangent, steps):
        def value(args):
            mine = lambda z, args: fn(z, (eqx.combine(args[0], fixed), args[1]))
            options: dict[str, Any] = {"batched": True, "max_steps": _MOST, "steps": steps}
            return deqjax.fixed_point(mine, how, z0, args, adjoint=adjoint, **options).value

        return jax.vjp(value, args)[1](cotangent)[0]

    steps = jnp.full(k.z0.shape[0], _MOST)
    return run, (k.z0, (moving, k.x), k.cotangent, steps)


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    """Each kind and each context in both dtypes. Another beta is another number in the program."""
    seen: set[Any] = set()
    for case in design():
        new = {(case.kind, case.dtype), (case.context, case.dtype)} - seen
        if new:
            k = made(case, size, key)
            yield str(case), tested(case, k)
            if (case.kind, case.dtype) in new:
                yield f"reference of {case.inputs}", reference(case, k)
        seen |= new


def made(case: Case, size: Size, key: PRNGKeyArray) -> Kind:
    return kind(case.kind, size, key).astype(case.dtype)


def unit(case: Case) -> float:
    """The last place of what this machine's products take in: TF32 has 11 bits, bfloat16 8."""
    inputs = {"cpu": 2.0**-23, "gpu": 2.0**-10}.get(jax.default_backend(), 2.0**-7)
    return 2.0**-7 if case.dtype == "bfloat16" else inputs


def moved(tree: PyTree, size: float, seed: int) -> PyTree:
    """Moves each entry by up to `size` of itself."""
    rng = np.random.default_rng(seed)
    factor = lambda x: jnp.asarray(1 + size * rng.uniform(-1, 1, x.shape), jnp.float32)
    return jax.tree.map(lambda x: (x.astype(jnp.float32) * factor(x)).astype(x.dtype), tree)


def distance(got: PyTree, truth: PyTree, *, ordered: bool = True) -> float:
    """The largest of `||got - truth|| / ||truth||` over the leaves; infinite for a NaN.

    Not `ordered`: each against the nearest one of its shape, since what is closed over comes in
    order of first use. A leaf of next to nothing is measured by the largest.
    """
    ours, theirs = ([np.asarray(x, np.float64) for x in jax.tree.leaves(t)] for t in (got, truth))
    if len(ours) != len(theirs) or not all(np.all(np.isfinite(x)) for x in ours + theirs):
        return np.inf
    floor = 1e-3 * max(map(np.linalg.norm, theirs))
    gap = lambda a, b: float(np.linalg.norm(a - b) / max(np.linalg.norm(b), floor))
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        each = [b] if ordered else [x for x in theirs if x.shape == a.shape]
        worst = max(worst, min((gap(a, x) for x in each), default=np.inf))
    return worst


def exactness(run: Run) -> None:
    """Judges all cases; a few at a time are compiled together."""
    cases = design()
    if run.size == "smoke":
        cases = [cases[0], Case("MLP", "bfloat16", 5, "stopping")]
    elif run.size == "reduced" and "deterministic" in run.section:
        cases = cases[:1]  # A CPU has no other algorithms.
    at_once = run.pick(1, 2, 8)
    found: dict[Any, Compiled | Exception] = {}

    def prepare(some: list[Case]) -> None:
        needed: dict[Any, Program] = {}
        for case in some:
            k = made(case, run.size, run.key)
            try:
                needed[case] = tested(case, k)
            except Exception as error:  # of the solve before its pull
                found[case] = error
            if (case.inputs, "reference") not in found:
                needed[case.inputs, "reference"] = reference(case, k)
        found.update(compiled(needed))

    def check(case: Case) -> None:
        if case not in found:
            prepare(cases[cases.index(case) :][:at_once])
        judge(run, case, good(found[case]), good(found[case.inputs, "reference"]))
        del found[case]  # and its program with it

    run.cases({str(case): partial(check, case) for case in cases})


def judge(run: Run, case: Case, ours: Compiled, theirs: Compiled) -> None:
    """Writes one row, of the worst number of evaluations."""
    k = made(case, run.size, run.key)
    moving = eqx.filter(k.params, eqx.is_inexact_array)
    inputs = (k.z0, (moving, k.x), k.cotangent)
    nudged = moved(inputs, unit(case), run.seed)
    given = (k.z0, k.cotangent) if case.context == "closed over" else inputs
    worst: dict[str, Any] = {"residual": 0.0, "error": 0.0, "allowed": 0.0, "share": 0.0}
    steps: list[Any] = []
    for n in DEPTHS[1:2] if case.context == "jit(pull)" else DEPTHS:
        if case.context == "jit(pull)":
            d, residual, taken = ours.program(k.cotangent), 0.0, jnp.asarray(n)
        else:
            d, residual, taken = ours.program(*given, jnp.asarray(n))
        taken = jnp.broadcast_to(taken, k.z0.shape[0])
        truth, other = (theirs.program(*each, taken) for each in (inputs, nudged))
        error = distance(d, truth, ordered=case.context != "closed over")
        allowed = min(max(4 * distance(other, truth), unit(case)), _MOST_OFF)
        worst["residual"] = float(np.maximum(worst["residual"], np.max(residual)))  # NaN too
        if error / allowed >= worst["share"]:
            worst |= {"error": error, "allowed": allowed, "share": error / allowed}
        steps += [int(np.min(taken)), int(np.max(taken))]
    ok = worst["residual"] == 0 and worst["error"] <= worst["allowed"]
    seen = f"{worst['residual']:g}" if case.context != "jit(pull)" else "not told"
    said = f"residual {seen}, gradient off by {worst['error']:.1e}"
    said += f", {min(steps)} to {max(steps)} steps"
    run.add(str(case), said, limit=f"0, {worst['allowed']:.1e}", ok=ok, steps=steps, **worst)

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, Int, PyTree

from .._check import OptimistixSolver
from .._fixed_point import fixed_point
from .._solution import Solution
from ..adjoints import AbstractAdjoint


class _Mapped(eqx.Module):
    """A cell over a batch. A module, not a closure: inside `jax.shard_map` its parameters can then
    be made to vary before the loop instead of being summed over devices in each step of it."""

    cell: Callable[[PyTree, PyTree], PyTree]

    def __call__(self, z, x):
        return jax.vmap(self.cell)(z, x)


class DEQ(eqx.Module):
    """A deep equilibrium layer: `z = cell(z, x)`, solved for z.

    Parameters that `paramax` reparametrises are materialised once, before the solve. If the cell
    has a method `inject`, then `inject(x)` is what it sees as x, also computed once.

    **Arguments:**

    - `cell`: `cell(z, x) -> z'` on one example.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`.

    **Cost:** that of `deqjax.fixed_point`.

    **When not to use it:** for a fixed number of explicit layers, which need no solver.

    Reference: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019, equation 3.
    """

    cell: Callable[[PyTree, PyTree], PyTree]
    solver: OptimistixSolver
    adjoint: AbstractAdjoint
    max_steps: int = eqx.field(static=True, default=256)

    def __call__(
        self, x: PyTree, z0: PyTree = None, *, steps: int | Int[Array, ""] | None = None
    ) -> tuple[PyTree, Solution]:
        """Solves one example.

        **Arguments:**

        - `x`: one example, a pytree of arrays.
        - `z0`: the initial iterate; `None` is zeros like the injected x.
        - `steps`: a traced budget of at most `max_steps`.

        **Returns:** `(z, sol)` with `z = sol.value`.
        """
        return self._solve(lambda cell: cell, x, z0, batched=False, steps=steps)

    def batch(
        self, xs: PyTree, z0: PyTree = None, *, steps: int | Int[Array, "..."] | None = None
    ) -> tuple[PyTree, Solution]:
        """Solves a batch, on axis 0 of every leaf, as one state.

        Each example stops on its own tolerance, and the cotangent of the cell's parameters is
        accumulated once (so it is under `jax.vmap` of the layer, see `deqjax.fixed_point`).
        Arguments and returns as for one example, with one entry per example in `sol.result` and
        `sol.stats`; `steps` may have shape `(batch,)`.
        """
        return self._solve(_Mapped, xs, z0, batched=True, steps=steps)

    def _solve(self, lift: Callable, x, z0, *, batched: bool, steps) -> tuple[Any, Solution]:
        cell = paramax.unwrap(self.cell)
        inject = getattr(cell, "inject", None)
        if inject is not None:
            x = jax.vmap(inject)(x) if batched else inject(x)
        sol = fixed_point(
            lift(cell),
            self.solver,
            jax.tree.map(jnp.zeros_like, x) if z0 is None else z0,
            x,
            batched=batched,
            max_steps=self.max_steps,
            steps=steps,
            adjoint=self.adjoint,
        )
        return sol.value, sol

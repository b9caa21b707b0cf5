import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from .._fixed_point import check_adjoint, fixed_point
from .._problem import OptimistixSolver
from .._solution import Solution
from ..adjoints import AbstractAdjoint, ImplicitAdjoint
from ..positive import Enclosure
from ._base import masks_of
from ._monotone import MonotoneLinear


class _Mapped(eqx.Module):
    """A cell over a batch. It is a module, not a closure: inside `jax.shard_map` its parameters can
    then vary before the loop, instead of being summed over devices in each step of the loop.

    Only the masks have a batch axis: mapping over a cell that contains its masks would give its
    parameters one cotangent per example."""

    cell: Callable[..., PyTree]
    masks: PyTree

    def __call__(self, z, x, *step):
        one = lambda masks, *inputs: eqx.combine(masks, self.cell)(*inputs)
        return jax.vmap(one)(self.masks, z, x, *step)


class DEQ(eqx.Module):
    """A deep equilibrium layer: `z = cell(z, x)`, solved for z.

    Parameters of the cell, the solver and the predictor that `paramax` reparametrises are
    materialised once, before the solve. If the cell has a method `inject`, the cell gets
    `inject(x)` as x, also computed once. The masks of its `nn.VariationalDropout` are drawn once,
    if there is a `key`. If the cell has a method `initial`, the solve starts at `initial(x)` of the
    injected x; if not, at zeros like the injected x. If the cell has a method `readout`, the
    layer's output is `readout` of the fixed point, computed once after the solve.

    **Arguments:**

    - `cell`: `cell(z, x) -> z'` on one example; with `indexed`, `cell(z, x, step) -> z'`.
    - `solver`, `adjoint`, `max_steps`: as in `deqjax.fixed_point`.
    - `predictor`: `predictor(x) -> z0` on one example, of the injected x; `None` is the cell's
        `initial`, or zeros. With `deqjax.ImplicitAdjoint` z0 has no gradient, so train the
        predictor with a loss of its own, for instance
        `jnp.mean((deq.predictor(x) - jax.lax.stop_gradient(sol.value)) ** 2)`: the target is
        `sol.value`, not the layer's output, which differs if the cell has a `readout`. With an
        adjoint of the steps taken, z0 has a gradient, and the task trains the predictor too.
    - `sharding`: of the batch axis; set it by `nn.shard_solves`.
    - `indexed`: whether the cell gets the step number, as in `deqjax.fixed_point`. Noise drawn
        from it is that of all examples, unless x holds a key for each (and there is an `initial`).

    **Cost:** that of `deqjax.fixed_point`.

    **When not to use it:** for a fixed number of explicit layers, which need no solver.

    **Raises:** `ValueError` for an `nn.MonotoneLinear` without its splitting, or `indexed` with an
    adjoint of the fixed point; when called, as `deqjax.fixed_point`.

    Reference: Bai, Kolter, Koltun, Deep equilibrium models, NeurIPS 2019, equation 3; for the
    predictor: Bai, Koltun, Kolter, Neural deep equilibrium solvers, ICLR 2022.
    """

    cell: Callable[..., PyTree]
    solver: OptimistixSolver
    adjoint: AbstractAdjoint = ImplicitAdjoint()
    max_steps: int = eqx.field(static=True, default=256)
    predictor: Callable[[PyTree], PyTree] | None = None
    sharding: NamedSharding | None = eqx.field(static=True, default=None)
    indexed: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if isinstance(self.cell, MonotoneLinear):
            raise ValueError(
                "nn.DEQ expects a splitting of an nn.MonotoneLinear, got the cell itself, whose "
                "own iteration need not converge; pass cell.peaceman_rachford() or "
                "cell.forward_backward()."
            )
        check_adjoint(self.adjoint, self.indexed)

    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        batched: bool = False,
        steps: int | Int[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree, Solution]:
        """Solves one example, or a batch.

        **Arguments:**

        - `x`: one example, a pytree of arrays.
        - `z0`: the initial iterate, for instance `sol.value` at a similar x or before the last
            update (not the output z, if the cell has a `readout`: that of `nn.PeacemanRachford`
            drops negative entries); `None` is `predictor` of the injected x, the cell's `initial`,
            or zeros.
        - `batched`: whether axis 0 of every leaf of x and z0 is a batch; see `batch`.
        - `steps`: a traced budget of at most `max_steps`. A random budget in each training step
            randomises the depth without recompiling.
        - `key`: draws the masks of the cell's `nn.VariationalDropout`, one set for all evaluations
            of the solve; `None` is inference: no mask except those that the cell already holds.

        **Returns:** `(z, sol)` with `z = sol.value`, or `cell.readout(sol.value)` if there is one.
        """
        if batched:
            return self.batch(x, z0, steps=steps, key=key)
        deq = self._unwrapped()
        masks = None if key is None else masks_of(deq.cell, key)
        return deq._solve(x, z0, masks, steps, batched=False)

    def batch(
        self,
        xs: PyTree,
        z0: PyTree = None,
        *,
        steps: int | Int[Array, "..."] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[PyTree, Solution]:
        """Solves a batch, on axis 0 of every leaf, as one state: `deq(xs, batched=True)`.

        Each example stops on its own tolerance, and the cotangent of the cell's parameters is
        accumulated once (also under `jax.vmap` of the layer, see `deqjax.fixed_point`). Arguments
        and returns are as for one example, with one entry per example in `sol.result` and
        `sol.stats`; `steps` may have shape `(batch,)`. Example i has the masks of
        `jax.random.fold_in(key, i)`, in any batch; in `jax.shard_map`, fold the device's index into
        the key.
        """
        deq, masks = self._unwrapped(), None
        if key is not None:
            example = jnp.arange(len(jax.tree.leaves(xs)[0]))
            masks = jax.vmap(lambda i: masks_of(deq.cell, jax.random.fold_in(key, i)))(example)
        solve = deq._solve if self.sharding is None else deq._solve_apart
        return solve(xs, z0, masks, steps)

    def _unwrapped(self) -> "DEQ":
        parts = (self.cell, self.solver, self.predictor)
        cell, solver, predictor = paramax.unwrap(parts)
        return dataclasses.replace(self, cell=cell, solver=solver, predictor=predictor)

    def _solve_apart(self, xs, z0, masks, steps) -> tuple[Any, Solution]:
        assert self.sharding is not None
        arrays, static = eqx.partition(self, eqx.is_array)

        def solve(arrays, *inputs):
            z, sol = eqx.combine(arrays, static)._solve(*inputs)
            del sol.stats["max_steps"]  # the same on all devices
            return z, sol

        split, steps = self.sharding.spec, None if steps is None else jnp.asarray(steps)
        specs = (P(), split, split, split, split if steps is not None and steps.ndim else P())
        sharded = jax.shard_map(solve, mesh=self.sharding.mesh, in_specs=specs, out_specs=split)
        z, sol = sharded(arrays, xs, z0, masks, steps)
        return z, eqx.tree_at(
            lambda sol: sol.stats,
            sol,
            sol.stats | {"max_steps": jnp.asarray(self.max_steps, jnp.int32)},
        )

    def certify(
        self, x: PyTree, z: PyTree, *, batched: bool = False, fan_in: int | None = None
    ) -> Enclosure:
        """Encloses the fixed point near z, by the theorem of the cell.

        Calls the cell's method `certify(z, x, batched=..., fan_in=...)` with the injected x. For
        `nn.PositiveConcave` and similar cells this is `deqjax.certify`; for `nn.Subhomogeneous*`,
        their contraction; for `nn.MonotoneLinear` and its splittings, strong monotonicity, which
        encloses the layer's output.

        **Arguments:** x as for the layer, one example or, batched, a batch; `z = sol.value` of its
        solve, or of another (not the output, if the cell has a `readout`); `fan_in` as in
        `deqjax.certify`.

        **Returns, cost, when not to use it:** as `deqjax.certify`, or the cell's method.

        **Raises:** `ValueError` for a cell without such a method, or as the method.
        """
        cell: Any = self.cell
        if not hasattr(cell, "certify"):
            raise ValueError(
                f"nn.DEQ.certify expects a cell with a method certify, which says by which theorem "
                f"its fixed point is enclosed, got {type(cell).__name__}, which has none; if the "
                f"cell is positive and concave, use nn.PositiveConcave(cell), or call "
                f"deqjax.certify(cell, z, x)."
            )
        if hasattr(cell, "inject"):
            inject = paramax.unwrap(cell).inject
            x = (jax.vmap(inject) if batched else inject)(x)
        return cell.certify(z, x, batched=batched, fan_in=fan_in)

    def _solve(self, x, z0, masks, steps, *, batched: bool = True) -> tuple[Any, Solution]:
        """Injects x, starts, solves, and reads out."""
        cell = self.cell
        over = jax.vmap if batched else lambda one: one
        read = lambda name: over(lambda masks, x: getattr(eqx.combine(masks, cell), name)(x))
        if hasattr(cell, "inject"):
            x = read("inject")(masks, x)
        if z0 is None:
            z0 = self._start(x, masks, over, read)
        sol = fixed_point(
            _Mapped(cell, masks) if batched else eqx.combine(masks, cell),
            self.solver,
            z0,
            x,
            batched=batched,
            indexed=self.indexed,
            max_steps=self.max_steps,
            steps=steps,
            adjoint=self.adjoint,
        )
        return (read("readout")(masks, sol.value) if hasattr(cell, "readout") else sol.value), sol

    def _start(self, x, masks, over, read) -> PyTree:
        """The initial iterate if none is given: a prediction, the cell's own, or zeros."""
        if self.predictor is not None:
            return over(self.predictor)(x)
        if hasattr(self.cell, "initial"):
            return read("initial")(masks, x)
        return jax.tree.map(jnp.zeros_like, x)

"""States of the exact mode: pytrees of integers, on which steps are taken and undone."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._tree import max_abs
from ._grid import Grid


def finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether all entries are finite."""
    return everywhere(jax.tree.map(jnp.isfinite, tree))


def everywhere(tests: PyTree) -> Bool[Array, ""]:
    """Whether all entries are true."""
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(jnp.all, tests))))


def nan_where(mask: Bool[Array, ""], tree: PyTree) -> PyTree:
    """NaN in all entries where `mask`."""
    return jax.tree.map(lambda x: jnp.where(mask, jnp.nan, x), tree)


class Lattice(eqx.Module):
    """Steps on pytrees of the integers of a grid."""

    grid: Grid
    n: PyTree  # the numerators of a retention n / d per channel; None: it is `sign / d`

    def quantise(self, tree: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        """The integers, and whether all of them fit."""
        integers, fits = _unzip(jax.tree.map(self.grid.quantise, tree), tree)
        return integers, everywhere(fits)

    def values(self, integers: PyTree, like: PyTree) -> PyTree:
        """The numbers, in the dtypes of `like`."""
        return jax.tree.map(lambda z, x: self.grid.value(z, x.dtype), integers, like)

    def step(self, before: PyTree, update: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        """The state after a step, and whether all of it fits."""
        after, fits = _unzip(self._map(self.grid.forward, before, update), before)
        return after, everywhere(fits)

    def digits(self, before: PyTree, after: PyTree) -> tuple[PyTree, PyTree]:
        """The digits of a step that are recorded: remainders, and guard digits."""
        return _unzip(self._map(self.grid.digits, before, after), before)

    def undo(
        self, after: PyTree, update: PyTree, rest: PyTree, guard: PyTree
    ) -> tuple[PyTree, Bool[Array, ""], Float[Array, ""]]:
        """The state before a step of about this update; whether it fits; the guard's share."""
        share = jnp.zeros((), jnp.float32)
        if self.grid.guard:
            update, shares = _unzip(jax.tree.map(self.grid.corrected, update, guard), update)
            share = max_abs(shares)
        before, fits = _unzip(self._map(self.grid.backward, after, update, rest), after)
        return before, everywhere(fits), share

    def _map(self, fn: Callable, *states: PyTree) -> PyTree:
        """`fn` of each leaf and its numerator."""
        if self.n is None:
            return jax.tree.map(lambda *leaves: fn(*leaves, None), *states)
        return jax.tree.map(fn, *states, jax.tree.broadcast(self.n, states[0]))


def _unzip(pairs: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    """A pytree of pairs as a pair of pytrees."""
    return jax.tree.transpose(jax.tree.structure(like), None, pairs)

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Bool, PyTree

from .._checks import check_real
from .._tree import as_real, from_real, lincomb, scale, select, widen
from ._base import AbstractSolver, Number, Status
from ._grid import Grid, grid


class _Integers(NamedTuple):
    """The memory of the exact mode."""

    before: PyTree  # Z[k-1]
    now: PyTree  # Z[k]
    z_before: PyTree  # value of Z[k-1], which carries its derivative
    overflow: Bool[Array, ""]  # an iterate would not have fitted
    lost: Bool[Array, ""]  # overflow, or an iterate was not finite: a step was not taken


@jax.custom_jvp
def _straight_through(exact: PyTree, real: PyTree) -> PyTree:
    """`exact` with the derivative of `real`: a straight-through estimator for rounding."""
    del real
    return exact


@_straight_through.defjvp
def _(primals, tangents):
    return _straight_through(*primals), tangents[1]


def _all(tests: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack(jax.tree.leaves(jax.tree.map(jnp.all, tests))))


def _finite(tree: PyTree) -> Bool[Array, ""]:
    return _all(jax.tree.map(jnp.isfinite, tree))


def _nan_where(mask: Bool[Array, ""], tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.where(mask, jnp.nan, x), tree)


class Reversible(AbstractSolver):
    """The reversible fixed-point iteration `s[k+1] = (1 - beta) s[k-1] + beta f(s[k])`.

    The iteration starts from `s[-1] = s[0] = z0`. Two consecutive iterates determine the previous
    one, `s[k-1] = (s[k+1] - beta f(s[k])) / (1 - beta)`, so that `deqjax.ReversibleAdjoint` runs
    the iteration backwards instead of storing it. The paper's pair `(y, z)` holds two consecutive
    iterates: one step of the paper is two steps here. If `f` contracts by `k`, a pair multiplies
    the error by at most `|1 - beta| + beta k`.

    **Exact mode** (the default): the state is the integer `Z = round(z 2^b)`, and with
    `1 - beta = sign / d`

        Z[k+1] = sign floor(Z[k-1] / d) + round(beta f(z[k]) 2^b),     z[k] = Z[k] 2^-b

    is undone bit for bit, from any depth and in any floating-point dtype, if the remainders
    `Z[k-1] mod d` are recorded. Derivatives pass straight through rounding.

    **Floating-point mode** (`exact=False`): any beta. A reversed step multiplies rounding noise by
    `1 / |1 - beta|`; the docstring of `deqjax.ReversibleAdjoint` says how it deals with this.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `beta`: relaxation, in (0, 2) and not 1. Exact: a float with `1 - beta = 1/d` or `-1/d`, d an
        integer from 2 on (1/2, 2/3, 0.75, 0.8, 0.9, 1.2, ...). In the floating-point mode it may be
        a scalar array, which is differentiated; a float is not.
    - `exact`: whether to use the exact mode.
    - `fraction_bits`: b, from 8 to 30: the exact state has the range `+-2^(31 - b)` (128 for 24) at
        a spacing of `2^-b`, in 32 bits per entry. A float64 state has 64 bits per entry, the same
        range, and a spacing of `2^-(b + 32)`. An iterate or a z0 beyond the range freezes the
        problem, with `RESULTS.nonlinear_divergence` and `sol.stats["overflow"]`.

    **Cost:** one evaluation of `f` per step; two copies of `z`. For a reversal in the exact mode
    also `log2(d)` bits per entry and step, in whole 32-bit words, with room for `max_steps` steps.

    **When not to use it:** without `deqjax.ReversibleAdjoint`, as it then has no advantage over
    `deqjax.FixedPointIteration`. The exact mode rounds z to the grid: do not use it for states
    whose useful digits lie below `2^-b`.

    **Raises:** `ValueError` for a tolerance below 0 or NaN, `beta` outside (0, 2) or 1, and in the
    exact mode for a `beta` that is an array or has no integer d (the message names the two nearest
    valid ones) and for `fraction_bits` out of range. A traced `beta` out of range is reported as
    `RESULTS.nonlinear_divergence`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the update of its section 3.
    """

    returns_best = False  # the iteration runs backwards from the returned iterate

    rtol: Number = 1e-4
    atol: Number = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    beta: Number = 0.8
    exact: bool = eqx.field(static=True, default=True)
    fraction_bits: int = eqx.field(static=True, default=24)

    def __check_init__(self):
        self.check()

    def requirements(self):
        reversible = lambda x: (x > 0) & (x < 2) & (x != 1)
        beta = ("beta", self.beta, reversible, "a relaxation in (0, 2) and not 1")
        return [*super().requirements(), beta]

    def check(self) -> None:
        super().check()
        if self.exact:
            self.grid  # noqa: B018, which raises

    @property
    def grid(self) -> Grid:
        """The integers of the exact mode."""
        if not isinstance(self.beta, float | int | np.floating):
            raise ValueError(
                f"Reversible(exact=True) expects beta to be a Python float, got {self.beta}; use "
                f"exact=False for a beta that is an array, to be traced or differentiated."
            )
        return grid(float(self.beta), self.fraction_bits)

    def _quantise(self, tree: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        """The integers, and whether all of them fit."""
        pairs = jax.tree.map(self.grid.quantise, tree)
        integers, fits = jax.tree.transpose(jax.tree.structure(tree), None, pairs)
        return integers, _all(fits)

    def start(self, z0: PyTree) -> PyTree:
        """`z0`, in the exact mode rounded to the grid."""
        if not self.exact:
            return z0
        integers, fits = self._quantise(z0)
        nan = ~fits & ~_finite(z0)
        return _straight_through(_nan_where(nan, self._values(integers, z0)), z0)

    def _values(self, integers: PyTree, like: PyTree) -> PyTree:
        return jax.tree.map(lambda z, x: self.grid.value(z, x.dtype), integers, like)

    def blank(self, z0: PyTree) -> PyTree:
        """The previous iterate, `s[-1] = z0`; in the exact mode as integers."""
        if not self.exact:
            return z0
        check_real(
            "Reversible(exact=True)",
            z0,
            "use exact=False, or real and imaginary parts as z.",
        )
        integers, fits = self._quantise(z0)
        overflow = ~fits & _finite(z0)
        return _Integers(integers, integers, self.start(z0), overflow, ~fits)

    def status(self, memory: PyTree) -> Status:
        """The state; in the exact mode a step fails at an overflow or NaN of the integers."""
        status = super().status(memory)
        if not self.exact:
            return status
        return status._replace(failed=memory.lost, overflow=memory.overflow)

    def mix(self, z: PyTree, fz: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """`(1 - beta) s[k-1] + beta f(s[k])`, and `s[k]` for the next step."""
        if not self.exact:
            return lincomb(1 - self.beta, memory, self.beta, fz), z
        m: _Integers = memory
        beta = self.grid.beta
        update, fits = self._quantise(self.relaxed(fz))
        pairs = jax.tree.map(self.grid.forward, m.before, update)
        after, kept = jax.tree.transpose(jax.tree.structure(update), None, pairs)
        # A step that would not fit is never taken: the state stays at the last valid one.
        ok = fits & _all(kept) & ~m.lost
        finite = _finite(fz)
        overflow, lost = m.overflow | (~ok & finite & ~m.lost), m.lost | ~ok
        before, now = select(ok, (m.now, after), (m.before, m.now))
        real = lincomb(1 - beta, m.z_before, beta, fz)
        exact = _nan_where(lost & ~overflow, self._values(now, z))
        return _straight_through(exact, real), _Integers(before, now, z, overflow, lost)

    @property
    def relaxation(self) -> Number:
        """The beta in use: in the exact mode `1 - 1/d` or `1 + 1/d`, to the last bit."""
        return self.grid.beta if self.exact else self.beta

    def view(self, state: PyTree, like: PyTree) -> PyTree:
        """One of the states of `pair`, as an iterate in the dtypes of `like`."""
        return self._values(state, like) if self.exact else state

    def relaxed(self, fz: PyTree) -> PyTree:
        """`beta f(z)` in float32 or wider, as the exact mode rounds it."""
        return scale(self.grid.beta, jax.tree.map(widen, fz))

    def pair(self, z: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """The two consecutive states `s[k-1], s[k]` from which the iteration is run backwards."""
        return (memory.before, memory.now) if self.exact else (memory, z)

    def unmix(self, z_after: PyTree, fz: PyTree, digits: PyTree = None) -> PyTree:
        """`s[k-1]` from `s[k+1]` and `f(s[k])`: the inverse of `mix`."""
        if self.exact:
            update, _ = self._quantise(self.relaxed(fz))
            return jax.tree.map(self.grid.backward, z_after, update, digits)
        rest = as_real(lincomb(1, z_after, -self.beta, fz))
        before = jax.tree.map(lambda x: x / jnp.asarray(1 - self.beta, x.dtype), rest)
        return from_real(before, z_after)

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import optimistix
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_real
from .._tree import aligned, as_real, from_real, lincomb, scale, select, straight_through, widen
from ._base import AbstractSolver, Number, Status
from ._grid import Grid, grid, narrowest
from ._lattice import Lattice, finite, nan_where
from ._retention import (
    as_arrays,
    check_kind,
    check_shapes,
    is_number,
    is_wrapped,
    numerator,
    rounded,
)


class _Integers(NamedTuple):
    """The memory of the exact mode."""

    before: PyTree  # Z[k-1]
    now: PyTree  # Z[k]
    z_before: PyTree  # value of Z[k-1], which carries its derivative
    overflow: Bool[Array, ""]  # an iterate would not have fitted
    lost: Bool[Array, ""]  # overflow, or an iterate was not finite: a step was not taken


class Reversible(AbstractSolver):
    """The reversible fixed-point iteration `s[k+1] = (1 - beta) s[k-1] + beta f(s[k])`.

    The iteration starts from `s[-1] = s[0] = z0`. Two consecutive iterates determine the previous
    one, `s[k-1] = (s[k+1] - beta f(s[k])) / (1 - beta)`, so that `deqjax.ReversibleAdjoint` runs
    the iteration backwards instead of storing it. One step of the paper, whose pair `(y, z)` holds
    two iterates, is two steps here. If `f` contracts by `k`, two steps multiply the error by at
    most `|1 - beta| + beta k`.

    **Exact mode** (the default): the state is the integer `Z = round(z 2^b)`, and with
    `1 - beta = sign / d`

        Z[k+1] = sign floor(Z[k-1] / d) + round(beta f(z[k]) 2^b),     z[k] = Z[k] 2^-b

    is undone bit for bit, from any depth and in any floating-point dtype, if the remainders
    `Z[k-1] mod d` are recorded. The last `guard_bits` binary digits of each rounded update
    `round(beta f(z[k]) 2^b)` are recorded as well: the reversal evaluates f again, and corrects its
    own update to the nearest integer that has them. So f may be rounded differently there, as long
    as `beta f` moves by less than `2^(guard_bits - 1) - 2` spacings. Derivatives pass straight
    through rounding.

    **Floating-point mode** (`exact=False`): any beta. A reversed step multiplies rounding noise by
    `1 / |1 - beta|`; the docstring of `deqjax.ReversibleAdjoint` says how it deals with this.

    **Arguments:**

    - `rtol`, `atol`, `norm`: as in `deqjax.FixedPointIteration`.
    - `beta`: relaxation, in (0, 2) and not 1. A float is a constant; in the exact mode `1 - beta`
        is `1/d` or `-1/d`, d an integer from 2 on (1/2, 2/3, 0.75, 0.8, 0.9, 1.2, ...). An array is
        differentiated by the adjoints of the steps taken; with those of the fixed point, which does
        not depend on it, its gradient is 0. It broadcasts against each leaf of one problem's z, say
        with shape `(channels,)`; a pytree has an array for each leaf. In the exact mode it lies in
        (0, 1), `1 - beta` is rounded to `n / denominator`, n from 1 to `denominator - 1`, and
        `Z[k+1]` is `round(n Z[k-1] / denominator) + round(beta f(z[k]) 2^b)`. So `Reversible(beta=
        paramax.Parameterize(jax.nn.sigmoid, jnp.zeros(channels)))` in `nn.DEQ` learns one.
    - `exact`: whether to use the exact mode.
    - `fraction_bits`: b, from 8 to 30: the exact state has the range `+-2^(31 - b)` (128 for 24) at
        a spacing of `2^-b`, in 32 bits per entry. A float64 state has 64 bits per entry, the same
        range, and a spacing of `2^-(b + 32)`. An iterate or a z0 beyond the range freezes the
        problem, with `RESULTS.nonlinear_divergence` and `sol.stats["overflow"]`. Default: 24. Below
        a float64 state it is 20 if f has float16 numbers or, on a GPU, a float32 product below
        precision "highest", whose factors are rounded there; 18 with bfloat16, or on a TPU.
    - `guard_bits`: 0, or from 2 to 16; by default enough to correct a difference of 64 unit
        roundoffs of the least precise dtype in f, but at most 16: 8 in float32, 4 with
        `fraction_bits=20`, 16 in other dtypes. With 0, as by default for a float64 state and a
        narrower f, f has to give the same bits again: it is compiled by itself, in a loop of one
        trip, in both programs, and the reversal evaluates it once more.
    - `denominator`: as above; an int from 2 to 65,536.

    **Cost:** one evaluation of `f` per step; two copies of `z`. For a reversal in the exact mode
    also, with room for `max_steps` steps (or the adjoint's `last`), per entry the remainders in
    4-byte words (32 steps each for d = 2, 13 for d = 5, 5 for `denominator` 64), and guard digits
    in one byte a step, two with more than 8 bits (half a byte with 3 or 4).

    **When not to use it:** without `deqjax.ReversibleAdjoint`, as it then has no advantage over
    `deqjax.FixedPointIteration`; exact, for states whose useful digits lie below `2^-b`.

    **Raises:** `ValueError` for a tolerance below 0 or NaN, a `beta` out of its range or that does
    not broadcast, and in the exact mode for a float `beta` without an integer d (the message names
    the two nearest valid ones), and for `fraction_bits`, `guard_bits` or `denominator` out of
    range, or a complex z. A traced `beta` out of range is `RESULTS.nonlinear_divergence`.

    Reference: Reversible deep equilibrium models, arXiv 2509.12917, the update of its section 3.
    Recorded remainders, of other iterations: Maclaurin, Duvenaud, Adams, Gradient-based
    hyperparameter optimization through reversible learning, ICML 2015; Zhang et al., BDIA, 2025.
    """

    returns_best = False  # the iteration runs backwards from the returned iterate
    per_channel = ("beta",)

    rtol: Number = 1e-4
    atol: Number = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    beta: PyTree[Number] = eqx.field(default=0.8, converter=as_arrays)
    exact: bool = eqx.field(static=True, default=True)
    fraction_bits: int | None = eqx.field(static=True, default=None)
    guard_bits: int | None = eqx.field(static=True, default=None)
    denominator: int = eqx.field(static=True, default=64)

    def __check_init__(self):
        self.check()

    def requirements(self):
        rows = super().requirements()
        if is_wrapped(self.beta):
            return rows
        test, text = (lambda x: (x > 0) & (x < 2) & (x != 1)), "(0, 2) and not 1"
        if self.exact and not is_number(self.beta):
            test, text = (lambda x: (x > 0) & (x < 1)), "(0, 1)"
        betas = jax.tree.leaves(self.beta)
        return rows + [("beta", beta, test, f"a relaxation in {text}") for beta in betas]

    def check(self) -> None:
        check_kind(self.beta)
        super().check()
        if self.exact:
            self.grid  # noqa: B018, which raises

    @property
    def grid(self) -> Grid:
        """The integers of the exact mode; before a solve, with the bits that suit float32."""
        return self._grid()

    def _grid(self, narrowest: str = "float32") -> Grid:
        beta = float(self.beta) if is_number(self.beta) else None
        return grid(beta, self.fraction_bits, self.guard_bits, self.denominator, narrowest)

    def prepared(self, fn: Callable, z0: PyTree, args: PyTree, rank: int) -> "Reversible":
        """The solver with the bits that suit f."""
        if not self.exact or None not in (self.fraction_bits, self.guard_bits):
            return self
        suited = self._grid(narrowest(fn, z0, args))
        return dataclasses.replace(self, fraction_bits=suited.bits, guard_bits=suited.guard)

    @property
    def _lattice(self) -> Lattice:
        beta = None if is_number(self.beta) else self.beta
        return Lattice(self.grid, jax.tree.map(lambda b: numerator(b, self.denominator), beta))

    def start(self, z0: PyTree) -> PyTree:
        """`z0`, in the exact mode rounded to the grid."""
        if not self.exact:
            return z0
        integers, fits = self._lattice.quantise(z0)
        nan = ~fits & ~finite(z0)
        return straight_through(nan_where(nan, self._lattice.values(integers, z0)), z0)

    def blank(self, z0: PyTree) -> PyTree:
        """The previous iterate, `s[-1] = z0`; in the exact mode as integers."""
        check_shapes(self.beta, z0)
        if not self.exact:
            return z0
        instead = "use exact=False, or real and imaginary parts as z."
        check_real("Reversible(exact=True)", z0, instead)
        integers, fits = self._lattice.quantise(z0)
        overflow = ~fits & finite(z0)
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
            return lincomb(self.retention, memory, self.beta, fz), z
        m: _Integers = memory
        update, fits = self._lattice.quantise(self.relaxed(fz))
        after, kept = self._lattice.step(m.before, update)
        # A step that would not fit is never taken: the state stays at the last valid one.
        ok = fits & kept & ~m.lost
        overflow, lost = m.overflow | (~ok & finite(fz) & ~m.lost), m.lost | ~ok
        before, now = select(ok, (m.now, after), (m.before, m.now))
        real = lincomb(self.retention, m.z_before, self.relaxation, fz)
        exact = nan_where(lost & ~overflow, self._lattice.values(now, z))
        return straight_through(exact, real), _Integers(before, now, z, overflow, lost)

    @property
    def relaxation(self) -> PyTree:
        """The beta in use: in the exact mode `1 - sign / d` or `1 - n / d`, to the last bit."""
        if not self.exact:
            return self.beta
        if is_number(self.beta):
            return self.grid.beta
        return jax.tree.map(lambda beta: rounded(beta, self.denominator), self.beta)

    @property
    def learned(self) -> PyTree:
        """The beta in use if it is made of arrays, which are differentiated; None for a number."""
        return None if is_number(self.beta) else self.relaxation

    @property
    def retention(self) -> PyTree:
        """`1 - beta`."""
        return jax.tree.map(lambda beta: 1 - beta, self.relaxation)

    def view(self, state: PyTree, like: PyTree) -> PyTree:
        """One of the states of `pair`, as an iterate in the dtypes of `like`."""
        return self._lattice.values(state, like) if self.exact else state

    def digits(self, before: PyTree, after: PyTree) -> tuple[PyTree, PyTree]:
        """The digits of a step that are recorded: remainders, and guard digits."""
        return self._lattice.digits(before, after)

    def relaxed(self, fz: PyTree) -> PyTree:
        """`beta f(z)` in float32 or wider, as the exact mode rounds it."""
        fz, n, d = jax.tree.map(widen, fz), self._lattice.n, self.denominator
        if n is None:
            return scale(self.grid.beta, fz)
        return jax.tree.map(lambda x: x / d, scale(jax.tree.map(lambda n: d - n, n), fz))

    def pair(self, z: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """The two consecutive states `s[k-1], s[k]` from which the iteration is run backwards."""
        return (memory.before, memory.now) if self.exact else (memory, z)

    def unmix(self, z_after: PyTree, fz: PyTree) -> PyTree:
        """`s[k-1]` from `s[k+1]` and `f(s[k])`: the inverse of `mix`, in the float mode."""
        minus = jax.tree.map(lambda beta: -beta, self.beta)
        rest = as_real(lincomb(1, z_after, minus, fz))
        retention = jax.tree.broadcast(self.retention, z_after)
        parts = lambda a, x: jax.tree.map(lambda x: x / aligned(a, x), x)
        return from_real(jax.tree.map(parts, retention, rest), z_after)

    def undo(
        self, z_after: PyTree, fz: PyTree, rest: PyTree, guard: PyTree
    ) -> tuple[PyTree, Bool[Array, ""], Float[Array, ""]]:
        """`s[k-1]` from `s[k+1]`, `f(s[k])` and the digits; whether it fits; the guard's share."""
        update, _ = self._lattice.quantise(self.relaxed(fz))
        return self._lattice.undo(z_after, update, rest, guard)

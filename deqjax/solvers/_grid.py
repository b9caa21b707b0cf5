"""The reversible recurrence on integers, on which it can be undone without an error.

A number z is stored as `Z = round(z 2^b)`. With `1 - beta = sign / d`, d an integer, one step is

    Z[k+1] = sign floor(Z[k-1] / d) + U[k],     U[k] = round(beta f(z[k]) 2^b)

and destroys no information except the remainder `r = Z[k-1] mod d`, which is recorded:

    Z[k-1] = sign (Z[k+1] - U[k]) d + r

With a retention `1 - beta = n / d` per channel a step keeps `round(n Z[k-1] / d)`, which is
`n q + round(n r / d)` with `Z[k-1] = q d + r`. The recorded r gives the second term, and so q.

The reversal evaluates f again, and may get another `U'`. So the guard digits `m = U[k] mod 2^g` are
recorded too: U[k] is the integer nearest to U' that has them, if `|U' - U[k]| < 2^(g-1)`.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import DotAlgorithmPreset, Precision
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree, UInt

from .._checks import is_int
from .._tree import aligned, widen
from ..positive._equations import everything, trace

# Above it, neighbouring betas are closer than float32 can tell; at it, a word holds two digits.
_LARGEST_D = 2**16


class Grid(eqx.Module):
    """Fixed-point numbers with `bits` binary places in 32 bits (32 more places in 64 bits)."""

    d: int = eqx.field(static=True)
    sign: int = eqx.field(static=True)
    bits: int = eqx.field(static=True)
    guard: int = eqx.field(static=True, default=0)
    # Whether a retention `1 - beta = n / d` per channel, n from 1 to d - 1, replaces `sign / d`.
    per_channel: bool = eqx.field(static=True, default=False)

    @property
    def beta(self) -> float:
        """The relaxation, `1 - sign / d`."""
        return 1 - self.sign / self.d

    @property
    def per_word(self) -> int:
        """The number of digits of base d in a uint32: the largest m with `d^m <= 2^32`."""
        m = 1
        while self.d ** (m + 1) <= 2**32:
            m += 1
        return m

    def _places(self, dtype) -> int:
        return self.bits + (32 if jnp.dtype(dtype).itemsize == 8 else 0)

    def quantise(self, x: Inexact[Array, "*s"]) -> tuple[Int[Array, "*s"], Bool[Array, "*s"]]:
        """`round(x 2^b)`, or 0 where this is no number that fits, and where it fits."""
        x = widen(x)
        scaled = jnp.round(x * np.asarray(2.0 ** self._places(x.dtype), x.dtype))
        integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
        # The bound is a power of two, hence exact in floating point; the test is false for NaN.
        fits = jnp.abs(scaled) < 2.0 ** (jnp.iinfo(integer).bits - 1)
        return jnp.where(fits, scaled, 0).astype(integer), fits

    def value(self, z: Int[Array, "*s"], dtype) -> Inexact[Array, "*s"]:
        """`Z 2^-b`, rounded to `dtype`."""
        wide = jnp.float64 if z.dtype == jnp.int64 else jnp.float32
        return (z.astype(wide) * np.asarray(2.0 ** -self._places(wide), wide)).astype(dtype)

    def divide(self, z: Int[Array, "*s"]) -> tuple[Int[Array, "*s"], UInt[Array, "*s"]]:
        """`floor(Z / d)` and `Z mod d`."""
        d = np.asarray(self.d, z.dtype)
        quotient, rest = jax.lax.div(z, d), jax.lax.rem(z, d)  # both rounded towards zero
        below = (rest < 0).astype(z.dtype)
        return quotient - below, (rest + below * d).astype(jnp.uint32)

    def kept(
        self, z: Int[Array, "*s"], n: Int[Array, "*c"] | None
    ) -> tuple[Int[Array, "*s"], UInt[Array, "*s"]]:
        """The part of Z that a step keeps, and the remainder that it drops."""
        quotient, rest = self.divide(z)
        if n is None:
            return self.sign * quotient, rest
        return aligned(n, z) * quotient + self._share(rest, n).astype(z.dtype), rest

    def _share(self, rest: UInt[Array, "*s"], n: Int[Array, "*c"]) -> UInt[Array, "*s"]:
        """`round(n rest / d)`; with d up to 2^16 the product fits."""
        return (aligned(n, rest) * rest + np.uint32(self.d // 2)) // np.uint32(self.d)

    def digits(
        self, before: Int[Array, "*s"], after: Int[Array, "*s"], n: Int[Array, "*c"] | None
    ) -> tuple[UInt[Array, "*s"], UInt[Array, "*s"]]:
        """The digits of the step from `before` to `after`: the remainder, and the guard."""
        kept, rest = self.kept(before, n)
        return rest, (after - kept).astype(jnp.uint32) & np.uint32(2**self.guard - 1)

    def corrected(
        self, update: Int[Array, "*s"], guard: UInt[Array, "*s"]
    ) -> tuple[Int[Array, "*s"], Float[Array, "*s"]]:
        """The update nearest to `update` that has the guard digits, and the share they covered."""
        modulus, half = (
            np.asarray(n, update.dtype) for n in (2**self.guard - 1, 2**self.guard // 2)
        )
        off = ((guard.astype(update.dtype) - update + half) & modulus) - half
        return update + off, jnp.abs(off).astype(jnp.float32) / half.astype(np.float32)

    def forward(
        self, before: Int[Array, "*s"], update: Int[Array, "*s"], n: Int[Array, "*c"] | None = None
    ) -> tuple[Int[Array, "*s"], Bool[Array, "*s"]]:
        """The part of `before` that is kept + `update`, and where this fits."""
        kept, _ = self.kept(before, n)
        out = kept + update
        # A sum wraps if and only if its sign differs from that of both terms.
        return out, ((kept ^ out) & (update ^ out)) >= 0

    def backward(
        self,
        after: Int[Array, "*s"],
        update: Int[Array, "*s"],
        rest: UInt[Array, "*s"],
        n: Int[Array, "*c"] | None = None,
    ) -> tuple[Int[Array, "*s"], Bool[Array, "*s"]]:
        """The inverse of `forward`, and where the result is not known to be wrong."""
        d, kept = np.asarray(self.d, after.dtype), after - update
        if n is None:
            quotient = self.sign * kept
        else:
            whole = kept - self._share(rest, n).astype(kept.dtype)
            quotient = jax.lax.div(whole, jnp.broadcast_to(aligned(n, whole), whole.shape))
        # A wrong quotient may not fit. Powers of an even d would in time wrap its error to 0.
        limit = np.asarray(2 ** (jnp.iinfo(after.dtype).bits - 1) // self.d, after.dtype)
        fits = (quotient >= -limit - 1) & (quotient <= limit)
        return quotient * d + rest.astype(after.dtype), fits | bool(self.d % 2)


# Places and guard digits by the narrowest dtype in f. Two evaluations at one point were apart by up
# to 20 unit roundoffs (experiments/gradient_fidelity.py); these digits correct 64 or more, 32 in
# bfloat16. With a float64 state and a narrower f, 16 bits do not hold what the integers differ by.
_BITS = {"float64": (24, 16), "float32": (24, 8), "float16": (20, 16), "mixed": (24, 0)}
_LEAST = (18, 16)


def narrowest(fn: Callable, z: PyTree, args: PyTree) -> str:
    """The name of the least precise floating dtype in f; "mixed" below a float64 state.

    A product whose factors a GPU or TPU rounds counts as of the dtype that has as many digits.
    """
    states = {x.dtype for x in jax.tree.leaves(z)}
    eqns = [e for jaxpr in everything(trace(fn, z, args).jaxpr) for e in jaxpr.eqns]
    found = states | {getattr(v.aval, "dtype", None) for e in eqns for v in e.outvars}
    if jax.default_backend() != "cpu" and any(map(_rounds_factors, eqns)):
        found.add(jnp.dtype("float16" if jax.default_backend() == "gpu" else "bfloat16"))
    known = [jnp.finfo(d) for d in found if d is not None and jnp.issubdtype(d, jnp.inexact)]
    name = max(known, key=lambda info: float(info.eps)).dtype.name  # of a complex dtype, its parts'
    return "mixed" if jnp.dtype("float64") in states and name != "float64" else name


def _rounds_factors(eqn: Any) -> bool:
    """Whether a GPU or TPU may round the float32 factors of this product."""
    if eqn.primitive.name not in ("dot_general", "conv_general_dilated"):
        return False
    precision = eqn.params["precision"]
    full = isinstance(precision, tuple) and set(precision) == {Precision.HIGHEST}
    full = full or precision == DotAlgorithmPreset.F32_F32_F32
    return eqn.invars[0].aval.dtype == jnp.float32 and not full


def grid(
    beta: float | None,
    bits: int | None,
    guard: int | None,
    denominator: int,
    narrowest: str = "float32",
) -> Grid:
    """The grid on which `beta` is exact, or a `ValueError` that names the nearest betas.

    Bits that are None are those that suit an f whose narrowest dtype is `narrowest`. With beta
    None, `1 - beta` is one of n / `denominator` per channel.
    """
    if not (bits is None or (is_int(bits, 8) and bits <= 30)):
        raise ValueError(
            f"Reversible expects fraction_bits to be an int from 8 to 30, got {bits!r}; pass for "
            f"instance 24, for a state in the range +-128 at a spacing of 6e-8."
        )
    if not (guard is None or (is_int(guard, 0) and guard != 1 and guard <= 16)):
        raise ValueError(
            f"Reversible expects guard_bits to be 0 or an int from 2 to 16, got {guard!r}; pass "
            f"None for as many as suit f, or 0 to record none and have f compiled by itself."
        )
    usual, digits = _BITS.get(narrowest, _LEAST)
    bits = usual if bits is None else int(bits)
    # On a coarser grid fewer digits correct the same difference.
    fewer = min(max(digits + bits - usual, 3), 16) if digits else 0
    guard = fewer if guard is None else int(guard)
    if not is_int(denominator, 2) or denominator > _LARGEST_D:
        raise ValueError(
            f"Reversible expects denominator to be an int from 2 to {_LARGEST_D}, got "
            f"{denominator!r}; pass for instance 64."
        )
    if beta is None:
        return Grid(int(denominator), 1, bits, guard, per_channel=True)
    sign = 1 if beta < 1 else -1
    d = min(max(round(1 / abs(1 - beta)), 2), _LARGEST_D)
    # A relative test, so that a beta that went through float32 is recognised.
    if abs(d * abs(1 - beta) - 1) > 1e-6:
        top = min(d + 2, _LARGEST_D) + 1
        near = {Fraction(e + s, e) for e in range(max(d - 2, 2), top) for s in (-1, 1)}
        a, b = sorted(sorted(near, key=lambda q: abs(q - Fraction(beta)))[:2])
        raise ValueError(
            f"Reversible(exact=True) expects beta with 1 - beta = 1/d or -1/d, d an integer from 2 "
            f"to {_LARGEST_D}, got beta={beta}; the nearest are {a} = {float(a):.6g} and {b} = "
            f"{float(b):.6g}; for any other beta use exact=False, the floating-point mode."
        )
    return Grid(d, sign, bits, guard)

"""The reversible recurrence on integers, on which it can be undone without an error.

A number z is stored as `Z = round(z 2^b)`. With `1 - beta = sign / d`, d an integer, one step is

    Z[k+1] = sign floor(Z[k-1] / d) + round(beta f(z[k]) 2^b)

and destroys no information except the remainder `r = Z[k-1] mod d`, which is recorded:

    Z[k-1] = sign (Z[k+1] - round(beta f(z[k]) 2^b)) d + r
"""

from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Inexact, Int, UInt

from .._checks import is_int
from .._tree import widen

# Above it, neighbouring betas are closer than float32 can tell; at it, a word holds two digits.
_LARGEST_D = 2**16


class Grid(eqx.Module):
    """Fixed-point numbers with `bits` binary places in 32 bits (32 more places in 64 bits)."""

    d: int = eqx.field(static=True)
    sign: int = eqx.field(static=True)
    bits: int = eqx.field(static=True)

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

    def forward(
        self, before: Int[Array, "*s"], update: Int[Array, "*s"]
    ) -> tuple[Int[Array, "*s"], Bool[Array, "*s"]]:
        """`sign floor(before / d) + update`, and where this fits."""
        kept = self.sign * self.divide(before)[0]
        out = kept + update
        # A sum wraps if and only if its sign differs from that of both terms.
        return out, ((kept ^ out) & (update ^ out)) >= 0

    def backward(
        self, after: Int[Array, "*s"], update: Int[Array, "*s"], digit: UInt[Array, "*s"]
    ) -> Int[Array, "*s"]:
        """The inverse of `forward`."""
        d = np.asarray(self.d, after.dtype)
        return self.sign * (after - update) * d + digit.astype(after.dtype)


def grid(beta: float, bits: int) -> Grid:
    """The grid on which `beta` is exact, or a `ValueError` that names the nearest ones."""
    if not is_int(bits, 8) or bits > 30:
        raise ValueError(
            f"Reversible expects fraction_bits to be an int from 8 to 30, got {bits!r}; pass for "
            f"instance 24, for a state in the range +-128 at a spacing of 6e-8."
        )
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
    return Grid(d, sign, int(bits))

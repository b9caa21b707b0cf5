"""The map that makes an input positive before a positive concave cell sees it."""

import math
from dataclasses import dataclass

import jax
from jaxtyping import PyTree

from .._checks import number, to_numbers


@dataclass(frozen=True)
class StrictlyPositive:
    """Makes every entry of an input at least `floor`, above 0, and leaves large ones as they are.

        softplus(sharpness x) / sharpness + floor

    For an f with f(0) = 0 at x = 0 (kind 1). If x >= 0 suffices (kind 2), use `jax.nn.relu`.

    **Arguments:**

    - `floor`: the least value, above 0. The floor limits how close to 0 the fixed point comes, and
        so how slow the iteration can become.
    - `sharpness`: above 0; the reference uses 5.

    **Call:** any pytree of float arrays; returns the same shapes and dtypes.

    **Raises:** `ValueError` unless `floor` and `sharpness` are finite Python numbers above 0.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029; there without a floor.
    """

    floor: float = 1e-3
    sharpness: float = 5.0

    def __post_init__(self):
        if not all(0 < number(value) < math.inf for value in (self.floor, self.sharpness)):
            raise ValueError(
                f"A positive concave cell expects floor > 0 and sharpness > 0, finite Python "
                f"numbers, got floor={self.floor!r} and sharpness={self.sharpness!r}; use 1e-3 and "
                f"5: its input has to stay positive and finite."
            )
        to_numbers(self, "floor", "sharpness")

    def __call__(self, x: PyTree) -> PyTree:
        """Applies the map to each entry."""
        # In float32 this softplus is exactly 0 below x = -21. With x = 0 the origin is a second
        # fixed point, and Picard from 0 stays there.
        one = lambda x: jax.nn.softplus(self.sharpness * x) / self.sharpness + self.floor
        return jax.tree.map(one, x)

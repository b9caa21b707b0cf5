"""The map that makes an input positive before a positive concave cell sees it."""

from dataclasses import dataclass

import jax
from jaxtyping import PyTree


@dataclass(frozen=True)
class StrictlyPositive:
    """Makes every entry of an input at least `floor`, above 0, and leaves large ones as they are.

        softplus(sharpness x) / sharpness + floor

    For f with f(0) = 0 at x = 0 (kind 1). Where x >= 0 suffices (kind 2), use `jax.nn.relu`.

    **Arguments:**

    - `floor`: the least value, above 0. It bounds how close to 0 the fixed point comes, and so how
        slow the iteration can get.
    - `sharpness`: above 0; the reference's 5.

    **Call:** any pytree of float arrays; returns the same shapes and dtypes.

    **Raises:** `ValueError` for `floor` or `sharpness` not above 0.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029; there without a floor.
    """

    floor: float = 1e-3
    sharpness: float = 5.0

    def __post_init__(self):
        if not (self.floor > 0 and self.sharpness > 0):
            raise ValueError(
                f"A positive concave cell expected floor > 0 and sharpness > 0, got floor="
                f"{self.floor} and sharpness={self.sharpness}: its input has to stay positive. "
                f"Use 1e-3 and 5."
            )

    def __call__(self, x: PyTree) -> PyTree:
        """Apply it to each entry."""
        # In float32 this softplus is exactly 0 below x = -21. With x = 0 the origin is a second
        # fixed point, and Picard from 0 stays there.
        one = lambda x: jax.nn.softplus(self.sharpness * x) / self.sharpness + self.floor
        return jax.tree.map(one, x)

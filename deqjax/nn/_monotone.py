"""A cell whose fixed point exists for weights of any size."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._checks import check_size, number
from ._base import AbstractCertified
from ._monotonicity import certify
from ._splitting import ForwardBackward, Matrix, PeacemanRachford, lipschitz


class MonotoneWeight(paramax.AbstractUnwrappable[Array]):
    """`W = (1 - m) I - A^T A + B - B^T`, so that the symmetric part of `I - W` is at least `m I`.

    Every W with this property has this form.

    **Arguments:** `a`, `b`, of shape (n, n) and the same dtype; `margin`, m, above 0.

    **Cost:** one product of two matrices.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, proposition 1.
    """

    a: Float[Array, "n n"]
    b: Float[Array, "n n"]
    margin: float = eqx.field(static=True)

    def unwrap(self) -> Array:
        """W, in the dtype of a and b."""
        eye = jnp.eye(len(self.a), dtype=self.a.dtype)
        # The skew part by itself: no rounding of a large B reaches the symmetric part.
        return (1 - self.margin) * eye - self.a.T @ self.a + (self.b - self.b.T)


class MonotoneLinear(AbstractCertified):
    """The cell `relu(W z + x)` with one fixed point, whatever W has learnt, of either sign.

        W = (1 - m) I - A^T A + B - B^T
        z* = relu(W z* + x)   <=>   0 in (I - W) z* - x + dg(z*),     g the indicator of z >= 0

    I - W is strongly monotone (by m) and dg is monotone, hence their sum has exactly one zero.
    Picard iteration of the cell itself need not find the zero, and diverges if W is large. A
    splitting finds it. Each splitting is a cell for `nn.DEQ` or `deqjax.fixed_point`, for every
    solver:

        deq = nn.DEQ(cell.peaceman_rachford(), solver, adjoint)
        z, sol = deq(x)                         # z = z*, for either splitting
        w = paramax.unwrap(deq.cell.weight)     # W as it is now, trained with the layer

    `cell` itself stays as it was; `eqx.tree_at(lambda c: c.weight, cell, deq.cell.weight)` is the
    cell with the trained W.

    **Arguments:**

    - `size`: length of z and x.
    - `margin`: m, above 0. A small margin allows more W, and solves take longer.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for A and B, uniform on +-1/sqrt(size).

    **Call:** `cell(z, x)`, both of shape (size,), x of any sign. `cell.margin` is m.

    **Cost:** size^2 products per evaluation, size^3 per solve for W (and for an inverse).

    **When not to use it:** by itself in a solver, unless W is small; for images, where size^3 is
    too expensive.

    **Raises:** `ValueError` for a size that is not an int above 0, or a margin that is not a finite
    number above 0.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, theorem 1 and proposition 1.
    """

    weight: Matrix

    def __init__(
        self,
        size: int,
        margin: float = 0.1,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        check_size("size", size)
        if not 0 < number(margin) < math.inf:
            raise ValueError(
                f"MonotoneLinear expects a finite Python number above 0 as margin, got "
                f"{margin!r}; use 0.1, as at 0 a fixed point need not exist."
            )
        bound = 1 / math.sqrt(size)
        a, b = jax.random.uniform(key, (2, size, size), dtype, -bound, bound)
        self.weight = MonotoneWeight(a, b, number(margin))

    def __call__(self, z: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """`relu(W z + x)` of one example."""
        return jax.nn.relu(paramax.unwrap(self.weight) @ z + x)

    def certify(self, z, x, *, batched=False, fan_in=None):
        """Encloses the fixed point by strong monotonicity; see `nn.PeacemanRachford.certify`."""
        del fan_in
        return certify(self.weight, z, x, batched)

    @property
    def margin(self) -> float:
        """The margin m."""
        return self.weight.margin  # pyright: ignore

    def lipschitz(self) -> Float[Array, ""]:
        """`L = ||I - W||_2`, float32 or wider, by a singular value decomposition."""
        return lipschitz(paramax.unwrap(self.weight))

    def forward_backward(self, step: float | None = None) -> ForwardBackward:
        """The cell of forward-backward splitting; see `nn.ForwardBackward`."""
        return ForwardBackward(self.weight, step)

    def peaceman_rachford(self, step: float | None = None) -> PeacemanRachford:
        """The cell of Peaceman-Rachford splitting; see `nn.PeacemanRachford`."""
        return PeacemanRachford(self.weight, step)

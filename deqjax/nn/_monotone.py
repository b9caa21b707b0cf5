"""A cell whose fixed point exists for weights of any size, and two splittings that find it."""

import math
from numbers import Real

import equinox as eqx
import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._tree import widen

Matrix = paramax.AbstractUnwrappable[Array] | Float[Array, "n n"]


class MonotoneWeight(paramax.AbstractUnwrappable[Array]):
    """`W = (1 - m) I - A^T A + B - B^T`, so that the symmetric part of `I - W` is at least `m I`.

    Every W with that property is of this form.

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
        return (1 - self.margin) * eye - self.a.T @ self.a + self.b - self.b.T


class Resolvent(paramax.AbstractUnwrappable[Array]):
    """`(I + step (I - W))^-1`, computed where it is unwrapped: once a solve.

    Its gradient reaches W. The inverse exists, with norm at most `1 / (1 + step m)`.
    """

    weight: Matrix
    step: float = eqx.field(static=True)

    def unwrap(self) -> Array:
        """The inverse, computed in float32 or wider, in the dtype of W."""
        weight = paramax.unwrap(self.weight)
        w, eye = widen(weight), jnp.eye(len(weight), dtype=widen(weight).dtype)
        return jnp.linalg.inv(eye + self.step * (eye - w)).astype(weight.dtype)


class MonotoneLinear(eqx.Module):
    """The cell `relu(W z + x)` with one fixed point, whatever W has learnt and of whatever sign.

        W = (1 - m) I - A^T A + B - B^T
        z* = relu(W z* + x)   <=>   0 in (I - W) z* - x + dg(z*),     g the indicator of z >= 0

    I - W is strongly monotone (by m) and dg is monotone, hence their sum has exactly one zero.
    Picard iteration of the cell itself need not find it, and diverges where W is large; a splitting
    does find it. Each is a cell for `nn.DEQ` or `deqjax.fixed_point`, for every solver:

        deq = nn.DEQ(cell.peaceman_rachford(1.0), solver, adjoint)
        z, sol = deq(x)                         # z = z*, whichever the splitting

    **Arguments:**

    - `size`: length of z and x.
    - `margin`: m, above 0. A small one allows more and takes longer.
    - `dtype`: of the parameters; default: JAX's default float.
    - `key`: for A and B, uniform on +-1/sqrt(size).

    **Call:** `cell(z, x)`, both of shape (size,), x of any sign.

    **Cost:** size^2 products an evaluation, size^3 a solve for W (and for an inverse).

    **When not to use it:** by itself in a solver, unless W is small; for images, where size^3 is
    too much.

    **Raises:** `ValueError` for a margin that is not above 0.

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
        if not (isinstance(margin, Real) and margin > 0):
            raise ValueError(
                f"MonotoneLinear expected a Python number above 0 as margin, got {margin!r}: at 0 "
                f"a fixed point need not exist. Use 0.1."
            )
        bound = 1 / math.sqrt(size)
        a, b = jax.random.uniform(key, (2, size, size), dtype, -bound, bound)
        self.weight = MonotoneWeight(a, b, margin)

    def __call__(self, z: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """`relu(W z + x)` of one example."""
        return jax.nn.relu(paramax.unwrap(self.weight) @ z + x)

    def lipschitz(self) -> Float[Array, ""]:
        """`L = ||I - W||_2`, float32 or wider, by a singular value decomposition."""
        w = widen(paramax.unwrap(self.weight))
        return jnp.linalg.norm(jnp.eye(len(w), dtype=w.dtype) - w, 2)

    def forward_backward(self, step: float) -> "ForwardBackward":
        """The cell of forward-backward splitting; see `nn.ForwardBackward`."""
        return ForwardBackward(self.weight, step)

    def peaceman_rachford(self, step: float) -> "PeacemanRachford":
        """The cell of Peaceman-Rachford splitting; see `nn.PeacemanRachford`."""
        return PeacemanRachford(self.weight, step)


class ForwardBackward(eqx.Module):
    """Forward-backward splitting of `z = relu(W z + x)`.

        f(z) = relu(z - step ((I - W) z - x))

    Its fixed points are those of `relu(W z + x)`. With the symmetric part of I - W at least m and
    `L = ||I - W||_2`, f contracts in the Euclidean norm by `sqrt(1 - 2 step m + step^2 L^2)`, below
    1 for `step < 2 m / L^2` and least, `sqrt(1 - m^2 / L^2)`, at half of that.

    **Arguments:**

    - `weight`: W of an `nn.MonotoneLinear`, whose method `forward_backward` makes this cell.
    - `step`: a Python number above 0. `m / cell.lipschitz() ** 2` is safe, for as long as W stays.

    **Call:** as `nn.MonotoneLinear`. `readout(z)` is z.

    **Cost:** size^2 products.

    **When not to use it:** with L far above m, as is usual after training: the bound on the step
    shrinks as 1 / L^2, and `nn.PeacemanRachford` has none.

    **Raises:** `ValueError` for a step that is not above 0.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, algorithm 1.
    """

    weight: Matrix
    step: float = eqx.field(static=True)

    def __init__(self, weight: Matrix, step: float):
        _check_step(step)
        self.weight = weight
        self.step = step

    def __call__(self, z: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """f of one example."""
        w = paramax.unwrap(self.weight)
        return jax.nn.relu((1 - self.step) * z + self.step * (w @ z + x))

    def readout(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """z* of the fixed point: itself."""
        return z


class PeacemanRachford(eqx.Module):
    """Peaceman-Rachford splitting of `z = relu(W z + x)`, which converges for every step.

        f(u) = 2 (I + step (I - W))^-1 (|u| + step x) - |u|,            z* = relu(u*)

    |u| = 2 relu(u) - u and what follows are the two reflected resolvents: the first moves no two
    points apart, the second, linear here, contracts by its norm, which is at most
    `sqrt(1 - 4 step m / (1 + step L)^2)`: below 1 for every step, and least at step = 1 / L.

    **Arguments:**

    - `weight`: W of an `nn.MonotoneLinear`, whose method `peaceman_rachford` makes this cell.
    - `step`: a Python number above 0; 1 is a good first guess.

    **Call:** `cell(u, x)`, both of shape (size,). `readout(u)` is relu(u), which `nn.DEQ` applies;
    after `deqjax.fixed_point`, it is for the caller to apply.

    **Cost:** size^2 products; one inverse, size^3, a solve in `nn.DEQ`, which unwraps the cell
    once. By hand, unwrap it first (`paramax.unwrap(cell)`), or each evaluation inverts anew.

    **When not to use it:** for large images, whose inverse does not fit.

    **Raises:** `ValueError` for a step that is not above 0.

    Reference: Winston and Kolter, Monotone operator equilibrium networks, NeurIPS 2020, arXiv
    2006.08591, algorithm 2.
    """

    resolvent: Matrix
    step: float = eqx.field(static=True)

    def __init__(self, weight: Matrix, step: float):
        _check_step(step)
        self.resolvent = Resolvent(weight, step)
        self.step = step

    def __call__(self, u: Float[Array, " n"], x: Float[Array, " n"]) -> Float[Array, " n"]:
        """f of one example."""
        # Not jnp.abs: at u = 0 its derivative would not be that of the readout's relu.
        v = 2 * jax.nn.relu(u) - u
        return 2 * (paramax.unwrap(self.resolvent) @ (v + self.step * x)) - v

    def readout(self, u: Float[Array, " n"]) -> Float[Array, " n"]:
        """z* of the fixed point u*: relu(u*)."""
        return jax.nn.relu(u)


def _check_step(step: float) -> None:
    if not (isinstance(step, Real) and 0 < step < math.inf):
        raise ValueError(
            f"A splitting expected a Python number above 0 as step, got {step!r}. Use 1.0 for "
            f"Peaceman-Rachford, and m / cell.lipschitz() ** 2, as a float, for forward-backward."
        )

"""What a solve returns."""

import jax
import jax.numpy as jnp
import optimistix
from jaxtyping import Array, Bool, PyTree

from ._tree import as_real, max_abs, quotient, two_norm, widen

RESULTS = optimistix.RESULTS
Solution = optimistix.Solution


def too_large(tree: PyTree) -> Bool[Array, ""]:
    """Whether an entry is NaN or so large that a squared norm would overflow: the divergence test.

    The bound, sqrt(largest float), is where ||f(z) - z||_2 stops being representable.
    """
    size = max_abs(tree)
    return jnp.logical_not(size <= jnp.sqrt(jnp.finfo(size.dtype).max))


def result_code(
    z: PyTree,
    fz: PyTree,
    complete: Bool[Array, ""],
    in_range: Bool[Array, ""],
) -> RESULTS:
    """The result code of one problem; `complete` is what it is without a numerical failure."""
    # The last finite iterate of a divergent sequence may have no finite f.
    finite = jnp.isfinite(max_abs((z, fz))) | (too_large(z) & jnp.isfinite(max_abs(z)))
    diverged = too_large((z, fz)) | ~in_range
    code = RESULTS.where(complete, RESULTS.successful, RESULTS.nonlinear_max_steps_reached)
    code = RESULTS.where(diverged, RESULTS.nonlinear_divergence, code)
    return RESULTS.where(finite, code, RESULTS.nonfinite)


def raise_unsuccessful(sol: Solution) -> Solution:
    """`sol`, with a run-time error naming the first problem's failure, if there is one."""
    failed = jnp.ravel(sol.result != RESULTS.successful)
    first = jnp.argmax(failed)
    code = jax.tree.map(lambda x: jnp.ravel(x)[first], sol.result)
    return code.error_if(sol, jnp.any(failed))


def relative_residual(z: PyTree, fz: PyTree) -> Array:
    """`||f(z) - z||_2 / ||f(z)||_2` of one problem, in float32 or wider; 0 where it is 0 / 0."""
    z, fz = as_real((z, fz))
    scale = jax.lax.stop_gradient(max_abs(fz))
    # Squares of numbers below 1e-19 vanish in float32; the ratio does not depend on the scale.
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    unit = lambda x: widen(x) / scale.astype(widen(x).dtype)
    fz = jax.tree.map(unit, fz)
    gap = two_norm(jax.tree.map(lambda fz, z: fz - unit(z), fz, z))
    return quotient(gap, two_norm(fz))

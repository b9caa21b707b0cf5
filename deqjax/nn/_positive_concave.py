"""A layer's cell from a user's own positive concave function."""

from collections.abc import Callable

import equinox as eqx
import jax
import paramax
from jaxtyping import PyTree

from ..positive import StrictlyPositive
from ._base import AbstractCertified, certify_concave


class PositiveConcave(AbstractCertified):
    """Your own cell for `nn.DEQ`, with its input made positive once before the solve.

        f(z) = cell(z, inject(x))

    **Arguments:**

    - `cell`: `cell(z, x) -> z'` on one example, a function or an Equinox module, positive and
        concave in z >= 0 for every x that `inject` returns. No constructor can check this;
        `deqjax.positive.check_hypotheses` tests it.
    - `inject`: a function or a module, `x -> x`. By default `positive.StrictlyPositive()`, for a
        cell with f(0) = 0 at x = 0, with its own arguments `floor` and `sharpness`. Use
        `jax.nn.relu` if x >= 0 suffices.

    **Call:** `cell(z, inject(x))`; x any pytree of float arrays, z one of the same structure, or
    another if `nn.DEQ` is given a z0.

    **Cost:** that of the cell.

    **When not to use it:** for a cell that has a method `inject`, `initial` or `readout`, such as
    `nn.PositiveConcaveLinear`: pass that to `nn.DEQ` as it is.

    **Raises:** `ValueError` if cell or inject cannot be called, or cell has such a method; when
    called, if cell's output differs from z in structure, shape or dtype.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029.
    """

    cell: Callable[[PyTree, PyTree], PyTree]
    inject: Callable[[PyTree], PyTree] = StrictlyPositive()

    def __check_init__(self):
        if not (callable(self.cell) and callable(self.inject)):
            raise ValueError(
                f"PositiveConcave expects cell(z, x) and inject(x) to be functions or modules, "
                f"got {self.cell!r} and {self.inject!r}; pass two that can be called."
            )
        for method in ("inject", "initial", "readout"):
            if hasattr(self.cell, method):
                raise ValueError(
                    f"PositiveConcave expects a cell without a method {method}, got "
                    f"{type(self.cell).__name__}, which has one that would never be called; pass "
                    f"that cell to nn.DEQ itself."
                )

    def __call__(self, z: PyTree, x: PyTree) -> PyTree:
        """`cell(z, x)` of one example; `x` has been through `inject`."""
        out = paramax.unwrap(self.cell)(z, x)
        # Only shapes and dtypes are compared: the solve handles mesh axes and weak types.
        structs = jax.eval_shape(lambda: (out, z))
        leaves, treedefs = zip(*map(jax.tree.flatten, structs), strict=True)
        kinds = [[(leaf.shape, leaf.dtype) for leaf in each] for each in leaves]
        if treedefs[0] != treedefs[1] or kinds[0] != kinds[1]:
            got, like = (eqx.tree_pformat(tree, struct_as_array=True) for tree in structs)
            raise ValueError(
                f"PositiveConcave expects its cell to return the structure, shapes and dtypes of "
                f"z, {like}, got {got}; cast or reshape the cell's output, or give nn.DEQ another "
                f"z0 (by default it is zeros like the injected x)."
            )
        return out

    def certify(self, z, x, *, batched=False, fan_in=None):
        """Encloses the fixed point by `deqjax.certify`, whose hypotheses are not checked."""
        return certify_concave(self, z, x, batched=batched, fan_in=fan_in)

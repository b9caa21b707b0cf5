"""The base class of the solvers that stop when they can prove a bound on their error."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PyTree

from .._checks import check_real
from .._step import evaluate
from .._tree import flat, mesh_axes, per_problem, select, stop_gradient, unflat
from ..positive._bracket import (
    Bracket,
    Slack,
    centre,
    consistent,
    intersection,
    relative_error,
)
from ..positive._enclosure import enclose
from ..positive._equations import calls, trace
from ..positive._rounding import of_one_sum, rounding
from ._base import AbstractSolver


class AbstractCertifiedSolver(AbstractSolver):
    """A solver whose tolerance is met only when a bracket of z* is narrow enough."""

    precision = "highest"  # rounding is counted for full products, on every platform
    needs_same_f = True

    upper: AbstractVar[float | None]
    fan_in: AbstractVar[int | None]
    slack: AbstractVar[float | None]  # the bound on rounding; None: read off f
    counted: AbstractVar[Array | None]  # the bound that `prepared` counts from these and f

    def __check_init__(self):
        self.check()
        upper = self.upper
        if upper is not None and not (
            isinstance(upper, int | float) and not isinstance(upper, bool) and upper > 0
        ):
            raise ValueError(
                f"{type(self).__name__} expects upper to be None or a Python number above 0 that f "
                f"never exceeds, got {upper!r}; pass for instance the supremum of the activation."
            )

    @abc.abstractmethod
    def proved(self, memory: Any) -> tuple[Bracket, Bool[Array, ""]]:
        """The bracket in the memory, and whether z is the centre of a narrow enough one."""

    @abc.abstractmethod
    def limited(self, memory: Any) -> Bool[Array, ""]:
        """Whether rounding prevents further progress."""

    def prepared(
        self, fn: Callable, z0: PyTree, args: PyTree, rank: int
    ) -> "AbstractCertifiedSolver":
        self._check_real(z0)
        given = (self.fan_in, type(self).__name__)
        fn, z0, args = stop_gradient((fn, z0, args))
        counted = rounding(fn, z0, args, *given, rank=rank, slack=self.slack)
        return eqx.tree_at(lambda s: s.counted, self, counted, is_leaf=lambda x: x is None)

    def margin(self, z: PyTree) -> Slack:
        """The bound on rounding; Optimistix's own loop gives no f to count it in beforehand."""
        if self.counted is not None:
            return self.counted
        if self.slack is not None:
            return self.slack
        if self.fan_in is None:
            raise ValueError(
                f"{type(self).__name__} expects to be run by deqjax.fixed_point, which reads the "
                f"rounding of f off its jaxpr, or to have a fan_in, got neither; pass fan_in=the "
                f"number of terms of the longest sum in f."
            )
        return of_one_sum(z, self.fan_in, type(self).__name__)

    def step(self, fn, y, args, options, state, tags):
        """Optimistix: as in `AbstractSolver`, with a check of the signs of the arrays in f."""
        self.margin(y)
        return super().step(fn, y, args, options, state, tags)

    def start(self, z0: PyTree) -> PyTree:
        """`z0`, but `upper` in each entry that is not between 0 and `upper`."""
        if self.upper is None or math.isinf(self.upper):
            return jax.tree.map(lambda x: jnp.maximum(x, 0), z0)
        inside = lambda x: (x > 0) & (x < self.upper)
        return jax.tree.map(lambda x: jnp.where(inside(x), x, jnp.asarray(self.upper, x.dtype)), z0)

    def unbounded(self, z0: PyTree) -> Bracket:
        """The bracket from 0 to `upper`, or to infinity."""
        self._check_real(z0)
        x = flat(z0, 0)
        upper = jnp.inf if self.upper is None else self.upper
        return Bracket(jnp.zeros_like(x), jnp.full_like(x, upper))

    def _check_real(self, z0: PyTree) -> None:
        check_real(
            type(self).__name__,
            z0,
            "use deqjax.Anderson(), which certifies nothing, or real and imaginary parts as z, "
            "since bounds need an order of the states.",
        )

    def answer(self, bracket: Bracket, like: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        """The centre of the bracket, in the dtypes of `like`, and whether it meets the tolerances
        for every z* in the bracket."""
        z = unflat(centre(bracket), like)
        at = flat(z, 0)
        lower, upper = bracket
        good = (at - lower <= self.allowed(lower)) & (upper - at <= self.allowed(upper))
        return z, jnp.all(good & jnp.isfinite(upper)) & consistent(bracket)

    def allowed(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """The error at z that the tolerances allow, entry by entry."""
        z = jnp.where(jnp.isfinite(z), z, 0)
        return jnp.asarray(self.atol, z.dtype) + jnp.asarray(self.rtol, z.dtype) * z

    def error(self, z: PyTree, fz: PyTree, memory: Any = None) -> Float[Array, ""]:
        """The error, below 1 only with a proof; NaN after a contradiction, or if limited."""
        x, fx = flat(z, 0), flat(fz, 0)
        error = 1 + self.norm((fx - x) / jnp.where(fx == 0, 1, jnp.abs(fx)))
        if memory is None:
            return error
        bracket, done = self.proved(memory)
        over = ~consistent(bracket) | (self.limited(memory) & ~done)
        return jnp.where(over, jnp.nan, jnp.where(done, 0, error))

    def stats(self, fn, z, args, memory, failed, rank):
        """The bracket of the solve; for a failed problem no wider than `deqjax.certify` of z."""
        closing = lambda solver, memory: solver._closing(memory)
        bracket, limited = stop_gradient(per_problem(closing, rank)(self, memory))
        fn, z, args = stop_gradient((fn, z, args))
        axes = mesh_axes(fn, z, args, bracket, self)
        slack, at = self.margin(z), flat(z, rank)
        f = lambda x: flat(evaluate(fn, unflat(x, z), args)[0], rank)

        def better(bracket):
            proved, holds, _ = enclose(f, at, z, slack, axes)
            return select(failed & holds, intersection(bracket, proved), bracket)

        # For a jax.custom_vjp function JAX forms no product with J, and there is no certificate.
        if not calls(trace(fn, z, args).jaxpr, "custom_vjp_call"):
            bracket = jax.lax.cond(jnp.any(failed), better, lambda bracket: bracket, bracket)
        return {**per_problem(_bounds, rank)(z, bracket), "rounding_limited": limited}

    def _closing(self, memory: Any) -> tuple[Bracket, Bool[Array, ""]]:
        """The last bracket of one problem, and whether rounding ended its solve."""
        bracket, done = self.proved(memory)
        return bracket, self.limited(memory) & ~done & consistent(bracket)


def _bounds(z: PyTree, bracket: Bracket) -> dict[str, Any]:
    wide = jax.tree.map(lambda x: x.astype(bracket.lower.dtype), z)
    return {
        "relative_error": relative_error(flat(z, 0), bracket),
        "lower": unflat(bracket.lower, wide),
        "upper": unflat(bracket.upper, wide),
    }

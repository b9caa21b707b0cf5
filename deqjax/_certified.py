"""What the solvers share that end where they can prove how near the fixed point is."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PyTree

from ._bracket import Bracket, flat, relative_error, unflat
from ._rounding import of_one_sum, rounding
from ._tree import unify
from .solvers import AbstractSolver


class AbstractCertifiedSolver(AbstractSolver):
    """A solver that ends where a bracket of z* is narrow enough, and nowhere else."""

    upper: AbstractVar[float | None]
    fan_in: AbstractVar[int | None]
    slack: AbstractVar[float | None]  # the bound of rounding, known once f is

    def __check_init__(self):
        self.check()
        if self.upper is not None and not self.upper > 0:
            raise ValueError(
                f"{type(self).__name__} expects upper to be None or a number above 0 that f never "
                f"exceeds, got {self.upper}; the supremum of the activation is one."
            )

    @abc.abstractmethod
    def proved(self, memory: Any) -> tuple[Bracket, Bool[Array, ""]]:
        """The bracket in the memory, and whether z is the centre of one narrow enough."""

    def bound(self, fn: Callable, z0: PyTree, args: PyTree) -> "AbstractCertifiedSolver":
        """See `AbstractSolver`."""
        slack = rounding(fn, z0, args, self.fan_in, type(self).__name__)
        return dataclasses.replace(self, slack=slack)

    def margin(self, z: PyTree) -> float:
        """The slack; Optimistix's own front door shows a solver no f to read it off."""
        if self.slack is not None:
            return self.slack
        if self.fan_in is None:
            raise ValueError(
                f"{type(self).__name__} expects to be run by deqjax.fixed_point, which reads the "
                f"rounding of f off its jaxpr, or to have a fan_in; got neither. Pass fan_in=the "
                f"number of terms of the longest sum in f."
            )
        return of_one_sum(z, self.fan_in, type(self).__name__)

    def start(self, z0: PyTree) -> PyTree:
        """See `AbstractSolver`."""
        upper = self.upper
        return z0 if upper is None else jax.tree.map(lambda x: jnp.full_like(x, upper), z0)

    def unbounded(self, z0: PyTree) -> Bracket:
        """0 and `upper`, or infinity."""
        x = flat(z0, 0)
        upper = jnp.inf if self.upper is None else self.upper
        return Bracket(jnp.zeros_like(x), jnp.full_like(x, upper))

    def closed(self, bracket: Bracket) -> Bool[Array, ""]:
        """Whether the centre of the bracket is certain to meet the tolerances."""
        lower, upper = bracket
        # The centre is off by so much of either end.
        part = (upper - lower) / jnp.where(upper > 0, upper + lower, 1)
        good = (part * lower <= self.allowed(lower)) & (part * upper <= self.allowed(upper))
        return jnp.all(good & jnp.isfinite(upper))

    def allowed(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """The error at z that the tolerances allow, entry by entry."""
        return jnp.asarray(self.atol, z.dtype) + jnp.asarray(self.rtol, z.dtype) * z

    def error(self, z: PyTree, fz: PyTree) -> Float[Array, ""]:
        """See `AbstractSolver`; never below 1, which only a proof is."""
        scale = lambda z, fz: (fz - z) / jnp.where(fz == 0, 1, jnp.abs(fz))
        return 1 + self.norm(scale(*unify([flat(z, 0), flat(fz, 0)])))

    def verdict(self, error, memory):
        """See `AbstractSolver`."""
        return jnp.where(self.proved(memory)[1], 0, error)

    def report(self, z: PyTree, memory: Any) -> dict[str, Any]:
        """See `AbstractSolver`."""
        bracket, _ = self.proved(memory)
        return {
            "relative_error": relative_error(flat(z, 0), bracket),
            "lower": unflat(bracket.lower, z),
            "upper": unflat(bracket.upper, z),
        }

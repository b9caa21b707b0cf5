"""What the solvers share that end where they can prove how near the fixed point is."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from equinox import AbstractVar
from jaxtyping import Array, Bool, Float, PyTree

from ._bracket import Bracket, centre, consistent, flat, relative_error, unflat
from ._rounding import of_one_sum, rounding
from .solvers import AbstractSolver


class AbstractCertifiedSolver(AbstractSolver):
    """A solver that ends where a bracket of z* is narrow enough, and nowhere else."""

    upper: AbstractVar[float | None]
    fan_in: AbstractVar[int | None]
    slack: AbstractVar[float | None]  # the bound of rounding itself; read off f where it is None

    def __check_init__(self):
        self.check()
        upper = self.upper
        if upper is not None and not (
            isinstance(upper, int | float) and not isinstance(upper, bool) and upper > 0
        ):
            raise ValueError(
                f"{type(self).__name__} expects upper to be None or a Python number above 0 that f "
                f"never exceeds, got {upper!r}; the supremum of the activation is one."
            )

    @abc.abstractmethod
    def proved(self, memory: Any) -> tuple[Bracket, Bool[Array, ""]]:
        """The bracket in the memory, and whether z is the centre of one narrow enough."""

    def bound(self, fn: Callable, z0: PyTree, args: PyTree) -> "AbstractCertifiedSolver":
        """See `AbstractSolver`."""
        if self.slack is not None:
            return self
        name = type(self).__name__
        slack = rounding(fn, z0, args, self.fan_in, name)
        if slack >= 2.0**-7 and jax.default_backend() != "cpu":
            raise ValueError(
                f"{name} expects matrix products of full precision, got an fn whose products round "
                f"their inputs, by {slack:.1e} in all. Solve under "
                f'jax.default_matmul_precision("highest"), or pass slack= the bound you know.'
            )
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
        """See `AbstractSolver`: `upper` where z0 is not between 0 and that."""
        if self.upper is None or math.isinf(self.upper):
            return jax.tree.map(lambda x: jnp.maximum(x, 0), z0)
        inside = lambda x: (x > 0) & (x < self.upper)
        return jax.tree.map(lambda x: jnp.where(inside(x), x, jnp.asarray(self.upper, x.dtype)), z0)

    def unbounded(self, z0: PyTree) -> Bracket:
        """0 and `upper`, or infinity."""
        x = flat(z0, 0)
        upper = jnp.inf if self.upper is None else self.upper
        return Bracket(jnp.zeros_like(x), jnp.full_like(x, upper))

    def answer(self, bracket: Bracket, like: PyTree) -> tuple[PyTree, Bool[Array, ""]]:
        """The centre of the bracket, as the state can hold it, and whether it meets the tolerances
        wherever in the bracket z* is."""
        z = unflat(centre(bracket), like)
        at = flat(z, 0)
        lower, upper = bracket
        good = (at - lower <= self.allowed(lower)) & (upper - at <= self.allowed(upper))
        return z, jnp.all(good & jnp.isfinite(upper)) & consistent(bracket)

    def allowed(self, z: Float[Array, " n"]) -> Float[Array, " n"]:
        """The error at z that the tolerances allow, entry by entry."""
        z = jnp.where(jnp.isfinite(z), z, 0)
        return jnp.asarray(self.atol, z.dtype) + jnp.asarray(self.rtol, z.dtype) * z

    def error(self, z: PyTree, fz: PyTree) -> Float[Array, ""]:
        """See `AbstractSolver`; never below 1, which only a proof is."""
        x, fx = flat(z, 0), flat(fz, 0)
        return 1 + self.norm((fx - x) / jnp.where(fx == 0, 1, jnp.abs(fx)))

    def verdict(self, error, memory):
        """See `AbstractSolver`; there is no going on from a contradiction."""
        bracket, done = self.proved(memory)
        return jnp.where(consistent(bracket), jnp.where(done, 0, error), jnp.nan)

    def report(self, z: PyTree, memory: Any) -> dict[str, Any]:
        """See `AbstractSolver`."""
        bracket, _ = jax.lax.stop_gradient(self.proved(memory))
        z = jax.lax.stop_gradient(z)
        return {
            "relative_error": relative_error(flat(z, 0), bracket),
            "lower": unflat(bracket.lower, z),
            "upper": unflat(bracket.upper, z),
        }

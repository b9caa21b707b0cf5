"""The base class of solvers: a mixing rule, and its interface to Optimistix."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from equinox import AbstractVar
from jaxtyping import Array, Bool, Inexact, PyTree

from .._solution import RESULTS
from .._step import scaled_error, step
from .._tree import is_traced, mesh_axes, vary

Number = float | Inexact[Array, ""]


class Status(NamedTuple):
    """The state of a method, read off its memory."""

    failed: Bool[Array, ""]  # no step can be taken from here
    overflow: Bool[Array, ""]  # an iterate has left the range of the method's numbers
    retry: Bool[Array, ""]  # the next step takes back an iterate at which f is not finite


class OptimistixState(eqx.Module):
    """The state that Optimistix carries between steps: the memory and the last test."""

    memory: PyTree
    small: Bool[Array, ""]
    broken: Bool[Array, ""]


class AbstractSolver(optimistix.AbstractFixedPointSolver):
    """A fixed-point method as a pure mixing rule `(z, f(z), memory) -> (z_next, memory)`.

    A rule never calls `f` and never measures anything; it acts on one problem, and
    `deqjax.fixed_point(..., batched=True)` maps it over the batch. A subclass defines

    - `blank` and `mix`, of one problem;

    and may override

    - `status`, `error` and `start`, of one problem: whether the method can continue, what the
        tolerances are compared with, and the first iterate;
    - `requirements`: the ranges of the fields that it adds;
    - `prepared` and `stats`, of the whole batch, as the certified solvers do;
    - the constants `returns_best`, `precision`, `per_channel` and `needs_same_f`.

    Array fields that are not scalars belong to one problem; `batched=True` repeats them.

    Optimistix's own loop calls neither `start` nor `stats`, and `prepared` once more for its step;
    inside `deqjax.ImplicitAdjoint` only `blank`, `mix` and `status` are called. A memory is a
    pytree of arrays; a part that is not to be frozen entry by entry is a
    `deqjax.solvers.AbstractMemory`.
    """

    # Optimistix declares float here; a user may trace these fields.
    rtol: AbstractVar[Number]  # pyright: ignore[reportIncompatibleVariableOverride]
    atol: AbstractVar[Number]  # pyright: ignore[reportIncompatibleVariableOverride]
    norm: AbstractVar[Callable[[PyTree], Any]]

    # Whether the best iterate, instead of the last, is returned if the steps run out.
    returns_best: ClassVar[bool] = True
    # The precision of the matrix products in f; None: the user's setting.
    precision: ClassVar[str | None] = None
    # The numerical fields that may be arrays of one problem, and not only scalars.
    per_channel: ClassVar[tuple[str, ...]] = ()
    # Whether f has to be the same at each step, so that `indexed=True` is refused.
    needs_same_f: ClassVar[bool] = False

    @abc.abstractmethod
    def blank(self, z0: PyTree) -> PyTree:
        """The memory before the first step, for the initial iterate `z0` of one problem."""

    def error(self, z: PyTree, fz: PyTree, memory: PyTree = None) -> Inexact[Array, ""]:
        """The measure of `f(z) - z`, below 1 within the tolerances; NaN if the method gives up.

        `memory` is the memory that the method had at z, or None after the solve.
        """
        del memory
        return scaled_error(self, z, fz)

    def status(self, memory: PyTree) -> Status:
        """The state of the method, read off its memory."""
        del memory
        return Status(*[jnp.asarray(False)] * 3)

    def start(self, z0: PyTree) -> PyTree:
        """The first iterate: `z0`, as exactly as the method can represent it."""
        return z0

    def prepared(self, fn: Callable, z0: PyTree, args: PyTree, rank: int) -> "AbstractSolver":
        """The solver with values that it reads off `fn(z, args) -> (z', aux)` before the loop."""
        del fn, z0, args, rank
        return self

    def stats(
        self, fn: Callable, z: PyTree, args: PyTree, memory: PyTree, failed: Array, rank: int
    ) -> dict[str, Array]:
        """The stats of this method besides the usual ones, for all problems; some have `failed`."""
        del fn, z, args, memory, failed, rank
        return {}

    @abc.abstractmethod
    def mix(self, z: PyTree, fz: PyTree, memory: PyTree) -> tuple[PyTree, PyTree]:
        """The next iterate and memory, from `z`, `f(z)` and the memory of one problem."""

    def requirements(self) -> list[tuple[str, Any, Callable[[Any], Any], str]]:
        """Rows `(field, value, test, expectation)` of the tests that numerical fields must pass."""
        nonnegative = lambda x: x >= 0
        return [
            ("rtol", self.rtol, nonnegative, "a relative tolerance of at least 0"),
            ("atol", self.atol, nonnegative, "an absolute tolerance of at least 0"),
        ]

    def check(self) -> None:
        """Raises `ValueError` for a field whose value is known and out of its range."""
        for name, value, test, expectation in self.requirements():
            if jnp.shape(value) != () and name not in self.per_channel:
                raise ValueError(
                    f"{type(self).__name__} expects a scalar {name}, got shape {jnp.shape(value)}; "
                    f"pass a float or an array of shape ()."
                )
            # Inside jit even a comparison of known arrays would be traced.
            with jax.ensure_compile_time_eval():
                wrong = not is_traced(value) and not np.all(test(value))
            if wrong:
                raise ValueError(
                    f"{type(self).__name__} expects {expectation}, got {name}={value}; "
                    f"choose {name} in that range."
                )

    def in_range(self) -> Bool[Array, ""]:
        """Whether `check` would pass, as an array, for fields whose values are traced."""
        return jnp.all(jnp.stack([jnp.all(test(x)) for _, x, test, _ in self.requirements()]))

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> OptimistixState:
        """Optimistix: the state before the first step."""
        del options, f_struct, aux_struct, tags
        self.check()
        memory = self.prepared(fn, y, args, 0).blank(y)
        state = OptimistixState(memory, jnp.asarray(False), self.status(memory).failed)
        return vary(state, mesh_axes(fn, y, args))

    def step(self, fn, y, args, options, state, tags):
        """Optimistix: one evaluation and one mix."""
        del options, tags
        out = step(fn, self.prepared(fn, y, args, 0), y, args, state.memory)
        broken = out.broken | out.overflow
        return out.z, OptimistixState(out.memory, out.error < 1, broken), out.aux

    def terminate(self, fn, y, args, options, state, tags):
        """Optimistix: whether the last evaluation met the tolerance, or has diverged."""
        del fn, y, args, options, tags
        failed = state.broken | ~self.in_range()
        result = RESULTS.where(failed, RESULTS.nonlinear_divergence, RESULTS.successful)
        return state.small, result

    def postprocess(self, fn, y, aux, args, options, state, tags, result):
        """Optimistix: nothing is left to do."""
        del fn, args, options, state, tags, result
        return y, aux, {}

"""The record of an activation, and activations that carry their own."""

import abc
from typing import Literal, NamedTuple

from jaxtyping import Array, Float


class Properties(NamedTuple):
    """All that is known of a function sigma on `u >= 0`, where it is nondecreasing.

    For each of the table, `f(z) = sigma(W z + x)` is a standard interference map for every W >= 0
    and every x that `kind` allows: positive, monotone, and `f(a z) < a f(z)` for a > 1. Such a map
    has at most one fixed point, and Picard finds it (Yates, IEEE JSAC 13 (1995), theorems 1 and 2).

    - `concave`: whether sigma is, there.
    - `at_zero`: sigma(0).
    - `supremum`: over u >= 0, no matter whether it is reached.
    - `subhomogeneity`: mu = sup over u > 0 of u sigma'(u) / sigma(u). With x >= 0, f is
        mu-Lipschitz in the Thompson metric max |log(y / z)|, whatever W >= 0 is.
    - `sublinear`: whether sigma(u) / u tends to 0. Then a fixed point exists for every W >= 0. With
        slope 1 at infinity, as relu, the identity and softplus have, one exists for every x that
        `kind` allows if and only if the spectral radius of W is below 1; with slope c, below 1 / c.
    """

    concave: bool
    at_zero: float
    supremum: float
    subhomogeneity: float
    sublinear: bool

    @property
    def kind(self) -> Literal[1, 2]:
        """1: x has to be positive, above 0; 2: x >= 0 will do."""
        return 1 if self.at_zero == 0 else 2


class AbstractActivation(abc.ABC):
    """A function with numbers in it, which knows its own record.

    Subclass it, as a frozen dataclass, for an activation of your own: equal numbers then make equal
    objects, and `jax.jit` compiles once. What it says of itself is believed. A deep copy is the
    same object, since one of `jnp.tanh` would be another function.
    """

    def __deepcopy__(self, memo: dict) -> "AbstractActivation":
        del memo
        return self

    @property
    @abc.abstractmethod
    def properties(self) -> Properties:
        """The known properties."""

    @abc.abstractmethod
    def __call__(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """Apply it to each entry."""

"""The known properties of an activation, and activations that state their own."""

import abc
from typing import Literal, NamedTuple

from jaxtyping import Array, Float


class Properties(NamedTuple):
    """The known facts about a function sigma on `u >= 0`, where it is nondecreasing.

    For each function of the table, `f(z) = sigma(W z + x)` is a standard interference map for every
    W >= 0 and every x that `kind` allows: positive, monotone, and `f(a z) < a f(z)` for a > 1. Such
    a map has at most one fixed point, and Picard iteration finds it (Yates, IEEE JSAC 13 (1995),
    theorems 1 and 2).

    - `concave`: whether sigma is concave on u >= 0.
    - `at_zero`: sigma(0).
    - `supremum`: that of sigma over u >= 0, reached or not.
    - `subhomogeneity`: mu = sup over u > 0 of u sigma'(u) / sigma(u). With x >= 0, f is
        mu-Lipschitz in the Thompson metric max |log(y / z)|, whatever W >= 0 is.
    - `sublinear`: whether sigma(u) / u tends to 0. Then a fixed point exists for every W >= 0. If
        sigma has slope 1 at infinity (relu, the identity, softplus), a fixed point exists for every
        x that `kind` allows if and only if the spectral radius of W is below 1; with slope c, below
        1 / c.
    """

    concave: bool
    at_zero: float
    supremum: float
    subhomogeneity: float
    sublinear: bool

    @property
    def kind(self) -> Literal[1, 2]:
        """1 if x has to be above 0; 2 if x >= 0 suffices."""
        return 1 if self.at_zero == 0 else 2


class AbstractActivation(abc.ABC):
    """An activation with parameters, which states its own properties.

    Subclass it as a frozen dataclass for your own activation: objects with equal numbers are then
    equal, and `jax.jit` compiles once. The stated properties are not checked. A deep copy is the
    same object, because a deep copy of `jnp.tanh` would be another function.
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
        """Applies the activation to each entry."""

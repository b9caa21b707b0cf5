"""A table of activations for which `z = sigma(W z + x)`, `W >= 0`, has at most one solution."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import number, to_numbers
from ._base import AbstractActivation, Properties


class Activation(NamedTuple):
    """The facts that the theorem needs about a function, concave and nondecreasing on `u >= 0`.

    - `kind`: 1 if sigma(0) = 0, so that only a strictly positive x keeps f positive;
        2 if sigma(0) > 0, so that x >= 0 suffices.
    - `supremum`: that of sigma over u >= 0. No component of the fixed point exceeds it, and Picard
        iteration decreases from there. Infinite if sigma is unbounded (it is still sublinear).
    """

    kind: Literal[1, 2]
    supremum: float


def saturating(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """`1 - exp(-u)`, to full relative precision at small u."""
    return -jnp.expm1(-u)


def _bounded(supremum: float) -> Properties:
    """A concave sigma, 0 at 0 with a finite slope, has u sigma' <= sigma, with equality at 0."""
    return Properties(True, 0.0, supremum, 1.0, True)


# The largest u (1 - sigmoid(u)): Lambert's W(1/e), since the maximum is where u = 1 + exp(-u).
_SIGMOID = 0.2784645427610738

# One function has several names in JAX, and not all of them are the same object.
PROPERTIES: dict[Callable, Properties] = {
    **dict.fromkeys((jnp.tanh, jax.nn.tanh, jax.lax.tanh), _bounded(1.0)),
    **dict.fromkeys((jax.nn.soft_sign,), _bounded(1.0)),
    **dict.fromkeys((jax.nn.relu6,), _bounded(6.0)),
    **dict.fromkeys((jax.nn.hard_tanh,), _bounded(1.0)),
    **dict.fromkeys((jnp.arctan, jnp.atan, jax.lax.atan), _bounded(math.pi / 2)),
    **dict.fromkeys((jax.lax.erf, jax.scipy.special.erf), _bounded(1.0)),
    **dict.fromkeys((saturating,), _bounded(1.0)),
    **dict.fromkeys((jnp.log1p, jax.lax.log1p), _bounded(math.inf)),
    **dict.fromkeys(
        (jnp.sqrt, jax.lax.sqrt),
        Properties(True, 0.0, math.inf, subhomogeneity=0.5, sublinear=True),
    ),
    **dict.fromkeys(
        (jax.nn.sigmoid, jax.lax.logistic, jax.scipy.special.expit),
        Properties(True, 0.5, 1.0, subhomogeneity=_SIGMOID, sublinear=True),
    ),
    # sigma(u) = (u + 3) / 6 up to u = 3, so that u sigma' / sigma = u / (u + 3) there.
    **dict.fromkeys(
        (jax.nn.hard_sigmoid,), Properties(True, 0.5, 1.0, subhomogeneity=0.5, sublinear=True)
    ),
    **dict.fromkeys(
        (jax.nn.relu, jax.nn.identity), Properties(True, 0.0, math.inf, 1.0, sublinear=False)
    ),
    **dict.fromkeys(
        (jax.nn.softplus,), Properties(False, math.log(2), math.inf, 1.0, sublinear=False)
    ),
}

# The functions of the table that qualify as activations of the positive concave cells.
ACTIVATIONS: dict[Callable, Activation] = {
    fn: Activation(known.kind, known.supremum)
    for fn, known in PROPERTIES.items()
    if known.concave and known.sublinear
}


@dataclass(frozen=True)
class Shifted(AbstractActivation):
    """`sigma(u) + shift`: kind 2, and subhomogeneous with a mu below 1.

    **Arguments:**

    - `base`: a bounded, concave function of `deqjax.positive.PROPERTIES`, for instance `jnp.tanh`.
    - `shift`: a Python number above 0.

    mu is the largest `u sigma'(u) / (sigma(u) + shift)`: 0.2470 for tanh + 1.2, 0.2014 for
    tanh + 1.603. (Over all real u it would be 0.9991 and 0.4992, just below the 1 and 1/2 that a
    cell needs without and with normalisation.)

    **Raises:** `ValueError` for another base or shift.

    Reference: Sittoni and Tudisco, Subhomogeneous deep equilibrium models, ICML 2024, arXiv
    2403.00720, section 5, for the two shifts.
    """

    base: Callable[[Array], Array]
    shift: float

    def __post_init__(self):
        known = properties(self.base)
        if not (known.concave and math.isfinite(known.supremum)):
            raise ValueError(
                f"Shifted expects a base that is concave and bounded on u >= 0, got "
                f"{name(self.base)}; use jnp.tanh, jax.nn.relu6 or another such function."
            )
        if not 0 < number(self.shift) < math.inf:
            raise ValueError(
                f"Shifted expects a Python number above 0 as shift, got {self.shift!r}; without a "
                f"shift, use {name(self.base)} itself."
            )
        to_numbers(self, "shift")

    def __call__(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """`sigma(u) + shift`."""
        return self.base(u) + self.shift

    @property
    def properties(self) -> Properties:
        """The known properties."""
        known = properties(self.base)
        return known._replace(
            at_zero=known.at_zero + self.shift,
            supremum=known.supremum + self.shift,
            subhomogeneity=_subhomogeneity(self),
        )


@dataclass(frozen=True)
class Power(AbstractActivation):
    """`(u + offset)^exponent`, with mu = exponent; unbounded, and sublinear.

    **Arguments:**

    - `exponent`: a Python number above 0 and below 1.
    - `offset`: a Python number of at least 0. At 0, the slope at u = 0 is infinite.

    **Raises:** `ValueError` for other numbers.
    """

    exponent: float
    offset: float = 0.0

    def __post_init__(self):
        if not (0 < number(self.exponent) < 1 and 0 <= number(self.offset) < math.inf):
            raise ValueError(
                f"Power expects Python numbers 0 < exponent < 1 and offset >= 0, got "
                f"{self.exponent!r} and {self.offset!r}; pass a smaller exponent, since from 1 on "
                f"a fixed point need not exist, and an offset of at least 0."
            )
        to_numbers(self, "exponent", "offset")

    def __call__(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        """`(u + offset)^exponent`."""
        return jnp.power(u + self.offset, self.exponent)

    @property
    def properties(self) -> Properties:
        """The known properties."""
        return Properties(True, self.offset**self.exponent, math.inf, self.exponent, True)


@functools.cache
def _subhomogeneity(activation: Callable[[Array], Array]) -> float:
    # The activation is bounded, concave and positive at 0. So u sigma' tends to 0 at both ends, as
    # u sigma'(2u) <= sigma(2u) - sigma(u), and the ratio h = u sigma' / sigma has its maximum
    # between. There is only one: d log h / d log u = k - h with k = 1 + u sigma'' / sigma', and a
    # falling k cannot cross h upwards. 1 - k is 2 u tanh u for tanh, 2 u / (1 + u) for soft_sign,
    # 2 u^2 / (1 + u^2) for arctan, 2 u^2 for erf, u for saturating, u tanh(u / 2) for sigmoid;
    # relu6 and similar ones rise up to their kink. Each round leaves 1/3,000 of the interval in
    # log u.
    low, high, largest = 1e-6, 1e6, 0.0
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        for _ in range(4):
            u = np.geomspace(low, high, 6001)
            value, slope = jax.jvp(activation, (jnp.asarray(u),), (jnp.asarray(u),))
            ratio = np.asarray(slope / value)
            best = int(np.argmax(ratio[1:-1])) + 1
            low, high, largest = u[best - 1], u[best + 1], float(ratio[best])
    return largest


def properties(activation: Callable[..., Any]) -> Properties:
    """The properties of a known activation, with or without a fixed point for every `W >= 0`.

    **Arguments:** `activation`, a key of `deqjax.positive.PROPERTIES`, or an object such as
    `Shifted(jnp.tanh, 1.2)` or `Power(0.5, 1e-3)` that states its own properties.

    **Raises:** `ValueError` for every other object: the properties cannot be read off a function.
    """
    if isinstance(activation, AbstractActivation):
        return activation.properties
    try:
        return PROPERTIES[activation]
    except (KeyError, TypeError):  # TypeError: not hashable
        names = sorted({name(known) for known in PROPERTIES})
        raise ValueError(
            f"positive.properties expects an activation about which something is known on u >= 0, "
            f"one of the functions {', '.join(names)}, a positive.Shifted or a positive.Power, got "
            f"{name(activation)}; pass the function itself, or derive from "
            f"positive.AbstractActivation and state its properties."
        ) from None


def qualify(activation: Callable[..., Any]) -> Activation:
    """The facts about `activation`, if `z = sigma(W z + x)` has one solution for every `W >= 0`.

    The solution exists because sigma grows slower than any line. The solution is unique because f
    is positive and concave, hence an interference map.

    **Arguments:** `activation`, a function of JAX: tanh, soft_sign, relu6, hard_tanh, arctan, erf,
    log1p, sqrt (kind 1), sigmoid or hard_sigmoid (kind 2), under any of its names;
    `positive.saturating` (1), `positive.Shifted` (2) or `positive.Power` (1, with an offset 2).

    **Raises:** `ValueError` for every other object: concavity cannot be read off a function, and
    relu, the identity and softplus have a fixed point only if the spectral radius of W is below 1.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029.
    """
    try:
        known = properties(activation)
    except ValueError:
        known = None
    if known is None or not (known.concave and known.sublinear):
        names = sorted({name(known) for known in ACTIVATIONS})
        raise ValueError(
            f"A positive concave cell expects an activation known to be concave and nondecreasing "
            f"on u >= 0 and to grow slower than any line, one of the functions {', '.join(names)}, "
            f"a positive.Shifted or a positive.Power, got {name(activation)}; relu, the identity "
            "and softplus do not qualify: with them a fixed point exists only if the spectral "
            "radius of W is below 1, which training does not preserve. Pass one of these functions "
            "itself, neither its name nor a lambda around it: jax.nn.relu6 instead of relu, "
            "jax.nn.sigmoid instead of softplus."
        )
    return Activation(known.kind, known.supremum)


def name(activation: Any) -> str:
    """A readable name of a function, or the representation of anything else."""
    return getattr(activation, "__name__", repr(activation))

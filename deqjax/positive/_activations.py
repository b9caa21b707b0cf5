"""The activations with which `z = sigma(W z + x)`, `W >= 0`, has exactly one solution, as data."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp


class Activation(NamedTuple):
    """What the theorem needs to know of a function that is concave and nondecreasing on `u >= 0`.

    - `kind`: 1 if sigma(0) = 0, so that only a strictly positive x keeps f positive;
        2 if sigma(0) > 0, and x >= 0 suffices.
    - `supremum`: over u >= 0; no component of the fixed point exceeds it, and Picard falls from
        there. Infinite where sigma has no bound (its growth is still sublinear).
    """

    kind: Literal[1, 2]
    supremum: float


# A fixed point exists for every W >= 0 because each grows slower than any line; it is unique
# because f is positive and concave (an interference map: Yates, IEEE JSAC 13 (1995), theorem 1).
# One function has several names in JAX, and not all of them are the same object.
ACTIVATIONS: dict[Callable, Activation] = {
    **dict.fromkeys((jnp.tanh, jax.nn.tanh, jax.lax.tanh), Activation(1, 1.0)),
    **dict.fromkeys((jax.nn.soft_sign,), Activation(1, 1.0)),
    **dict.fromkeys((jax.nn.relu6,), Activation(1, 6.0)),
    **dict.fromkeys((jax.nn.hard_tanh,), Activation(1, 1.0)),
    **dict.fromkeys((jnp.arctan, jnp.atan, jax.lax.atan), Activation(1, math.pi / 2)),
    **dict.fromkeys((jax.lax.erf, jax.scipy.special.erf), Activation(1, 1.0)),
    **dict.fromkeys((jnp.log1p, jax.lax.log1p), Activation(1, math.inf)),
    **dict.fromkeys((jnp.sqrt, jax.lax.sqrt), Activation(1, math.inf)),
    **dict.fromkeys(
        (jax.nn.sigmoid, jax.lax.logistic, jax.scipy.special.expit), Activation(2, 1.0)
    ),
    **dict.fromkeys((jax.nn.hard_sigmoid,), Activation(2, 1.0)),
}


def qualify(activation: Callable[..., Any]) -> Activation:
    """The record of `activation`, if `z = sigma(W z + x)` has one solution for every `W >= 0`.

    **Arguments:** `activation`, a function of JAX: tanh, soft_sign, relu6, hard_tanh, arctan, erf,
    log1p, sqrt (kind 1), sigmoid or hard_sigmoid (kind 2), under any of its names.

    **Raises:** `ValueError` for every other object: concavity cannot be read off a function, and
    relu, the identity and softplus have a fixed point only if the spectral radius of W is below 1.

    Reference: Gabor, Piotrowski and Cavalcante, Positive concave deep equilibrium models, ICML
    2024, arXiv 2402.04029.
    """
    try:
        return ACTIVATIONS[activation]
    except (KeyError, TypeError):  # TypeError: not hashable
        names = sorted({name(known) for known in ACTIVATIONS})
        raise ValueError(
            f"Expected an activation known to be concave and nondecreasing on u >= 0 and to grow "
            f"slower than any line, one of the JAX functions {', '.join(names)}; got "
            f"{name(activation)}. relu, the identity and softplus do not qualify: with them a "
            "fixed point exists only if the spectral radius of W is below 1, which no training "
            "keeps. Pass one of these functions itself, neither its name nor a lambda around it: "
            "jax.nn.relu6 in the place of relu, jax.nn.sigmoid in the place of softplus."
        ) from None


def name(activation: Any) -> str:
    """A readable name of a function, or the representation of anything else."""
    return getattr(activation, "__name__", repr(activation))

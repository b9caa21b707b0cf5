"""How often a cell is evaluated and how much it keeps, where these are drawn or learned."""

from typing import Any

import jax
import jax.numpy as jnp
import paramax
from jaxtyping import Array, Int, PRNGKeyArray


def most_drawn(steps: int) -> int:
    """The most steps that `drawn_steps` gives."""
    return steps + steps // 2


def drawn_steps(key: PRNGKeyArray, steps: int) -> Int[Array, ""]:
    """A number of steps between half of `steps` and one and a half times as many."""
    return jax.random.randint(key, (), steps - steps // 2, most_drawn(steps) + 1)


def learned_beta(beta: float, channels: int) -> Any:
    """A relaxation per channel that starts at `beta` and stays between 0 and 1."""
    start = jax.scipy.special.logit(jnp.asarray(beta))
    return paramax.Parameterize(jax.nn.sigmoid, jnp.full(channels, start))

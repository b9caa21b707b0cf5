"""Positive concave maps and interference functions of other fields than this library's.

A map twice: in JAX, of one problem, as a user would write it; and in NumPy, of a batch, in long
double. A sum written in the first as two that cancel is written in the second as what is left:
both are the same function of real numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.problems import convolved

Arrays = dict[str, np.ndarray]
Draw = Callable[[np.random.Generator, int], Arrays]


class Family(NamedTuple):
    """Random maps of one form."""

    name: str
    draw: Draw  # arrays of so many problems, axis 0; rounded to the dtype before anything is done
    fn: Callable[[Any, Any], Any]  # (z, arrays of one problem), in JAX
    exact: Callable[[Any, Any], Any]  # (z, arrays of all problems), in long double, axis 0
    closed: bool = False  # over the arrays; or else they are its args
    mixed: bool = False  # some array has negative entries
    n: int = 4


def product(w: Any, z: Any) -> Any:
    """`w z`: in JAX of one problem, in NumPy a matrix and a vector per problem."""
    return w @ z if isinstance(z, jax.Array) else np.sum(w * z[:, None, :], -1)


def affine(z: Any, a: Any) -> Any:
    return product(a["w"], z) + a["x"]


def matrix(rng: np.random.Generator, count: int, n: int, low: float, high: float) -> np.ndarray:
    """A matrix of at least 0, with a spectral radius between `low` and `high`."""
    w = rng.uniform(size=(count, n, n)) ** rng.uniform(0.5, 4, (count, 1, 1))
    radius = np.abs(np.linalg.eigvals(w)).max(-1)
    return w * (rng.uniform(low, high, count) / radius)[:, None, None]


def inputs(
    rng: np.random.Generator, count: int, n: int, low: float = -4.0, high: float = 1.0
) -> np.ndarray:
    """Inputs above 0, of a size between 10^low and 10^high that differs by problem."""
    return 10 ** rng.uniform(low, high, (count, 1)) * rng.uniform(0.5, 1.5, (count, n))


def weighted(high: float, n: int = 4, **more: Callable) -> Draw:
    """W (n, n) of a spectral radius up to `high`, x (n,), and what else is drawn by name."""

    def draw(rng, count):
        w = matrix(rng, count, n, 0.05 * high, high)
        return dict(w=w, x=inputs(rng, count, n)) | {k: f(rng, count) for k, f in more.items()}

    return draw


def _uniform(low: float, high: float, *shape: int) -> Callable:
    return lambda rng, count: rng.uniform(low, high, (count, *shape))


def _conv(z: Any, kernel: Any) -> Any:
    """A convolution of one channel, (h, w) with (3, 3), zero padding."""
    return jax.lax.conv_general_dilated(z[None, None], kernel[None, None], (1, 1), "SAME")[0, 0]


def conv_written_out(z: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The same convolution of a batch, (b, 12) with (b, 3, 3)."""
    return convolved(z.reshape(-1, 3, 4, 1), kernel[..., None, None]).reshape(-1, 12)


def _layers(z: Any, a: Any) -> Any:
    step = lambda u, layer: (jnp.tanh(layer[0] @ u + layer[1]), None)
    return jax.lax.scan(step, z, (a["ws"], a["xs"]))[0]


def _layers_exact(z: np.ndarray, a: Arrays) -> np.ndarray:
    for k in range(a["ws"].shape[1]):
        z = np.tanh(product(a["ws"][:, k], z) + a["xs"][:, k])
    return z


def _draw_layers(rng: np.random.Generator, count: int) -> Arrays:
    ws = np.stack([matrix(rng, count, 4, 0.2, 1.5) for _ in range(3)], 1)
    return dict(ws=ws, xs=np.stack([inputs(rng, count, 4) for _ in range(3)], 1))


def _draw_image(rng: np.random.Generator, count: int) -> Arrays:
    kernel = rng.uniform(size=(count, 3, 3))
    kernel *= rng.uniform(0.1, 1.3, (count, 1, 1)) / kernel.sum((1, 2), keepdims=True)
    return dict(kernel=kernel, x=inputs(rng, count, 12))


def _draw_actions(rng: np.random.Generator, count: int) -> Arrays:
    p = rng.uniform(size=(count, 3, 4, 4))
    p /= p.sum(-1, keepdims=True)
    return dict(p=p * rng.uniform(0.1, 0.99, (count, 1, 1, 1)), r=rng.uniform(0, 1, (count, 3, 4)))


def _draw_ces(rng: np.random.Generator, count: int) -> Arrays:
    share = rng.uniform(size=(count, 4, 4))
    scale = np.sqrt(rng.uniform(0.05, 0.98, (count, 1, 1)))
    return dict(a=share / share.sum(-1, keepdims=True) * scale, x=inputs(rng, count, 4))


def _draw_chain(rng: np.random.Generator, count: int) -> Arrays:
    p = rng.uniform(size=(count, 4, 4))
    p /= p.sum(-1, keepdims=True)
    stay = 1 - 10 ** rng.uniform(-3, -0.1, count)
    return dict(p=p, stay=stay, leave=1 - stay, v=rng.dirichlet(np.ones(4), count))


def _draw_powers(rng: np.random.Generator, count: int) -> Arrays:
    gain = matrix(rng, count, 4, 0.05, 0.97)
    more = dict(near=gain * rng.uniform(0.5, 2, (count, 4, 4)), own=rng.uniform(0.5, 2, (count, 4)))
    return dict(far=gain, noise=inputs(rng, count, 4), **more)


_ROLL = np.array([1, 2, 3, 0])


def _both(name: str, draw: Draw, f: Callable[..., Any], closed: bool = False) -> Family:
    """A family whose two forms are written alike, `f(z, arrays, m)`: m is JAX's NumPy, or NumPy."""
    return Family(name, draw, lambda z, a: f(z, a, jnp), lambda z, a: f(z, a, np), closed)


ORDINARY: tuple[Family, ...] = (
    _both("sum of concave functions", weighted(2.0, v=_uniform(0, 0.5, 4, 4)),
          lambda z, a, m: m.tanh(product(a["w"], z)) + 0.25 * m.sqrt(z)
          + m.arctan(product(a["v"], z)) + a["x"]),
    _both("log1p", weighted(3.0), lambda z, a, m: m.log1p(affine(z, a)), closed=True),
    _both("least of two affine maps", weighted(1.2, c=_uniform(0.1, 5, 4)),
          lambda z, a, m: m.minimum(affine(z, a), a["c"])),
    _both("largest of two affine maps",
          weighted(0.98, less=_uniform(0, 1, 4, 4), y=_uniform(0, 1, 4)),
          lambda z, a, m: m.maximum(affine(z, a), product(a["w"] * a["less"], z) + a["y"]),
          closed=True),
    _both("Michaelis and Menten", weighted(3.0, k=_uniform(0.05, 2, 4)),
          lambda z, a, m: product(a["w"], z / (a["k"] + z)) + a["x"]),
    Family("Cobb and Douglas", weighted(1.0, c=_uniform(0.1, 3, 4)),
           lambda z, a: a["c"] * z**0.25 * z[_ROLL] ** 0.5 + a["x"],
           lambda z, a: a["c"] * np.sqrt(np.sqrt(z)) * np.sqrt(z[:, _ROLL]) + a["x"], closed=True),
    _both("CES production", _draw_ces,
          lambda z, a, m: m.square(product(a["a"], m.sqrt(z))) + a["x"]),
    Family("Leontief production",
           weighted(1.0, a=_uniform(0.05, 0.98, 4, 4), b=_uniform(0.01, 1, 4, 4)),
           lambda z, a: jnp.min(a["a"] * z[None, :] + a["b"], 1),
           lambda z, a: np.min(a["a"] * z[:, None, :] + a["b"], 2), closed=True),
    _both("interference, the nearer of two stations", _draw_powers,
          lambda z, a, m: m.minimum((product(a["far"], z) + a["noise"]) / a["own"],
                                    product(a["near"], z) + a["noise"]) / 2),
    Family("Markov chain with an input", _draw_chain,
           lambda z, a: a["stay"] * (a["p"].T @ z) + a["leave"] * a["v"],
           lambda z, a: a["stay"][:, None] * product(np.swapaxes(a["p"], 1, 2), z)
           + a["leave"][:, None] * a["v"], closed=True),
    _both("1 - exp(-u)", weighted(3.0), lambda z, a, m: -m.expm1(-affine(z, a))),
    Family("softplus", weighted(0.9), lambda z, a: jax.nn.softplus(affine(z, a)),
           lambda z, a: np.logaddexp(affine(z, a), 0), closed=True),
    _both("in parallel", weighted(2.0, c=_uniform(0.1, 5, 4)),
          lambda z, a, m: 1 / (1 / affine(z, a) + 1 / a["c"])),
    Family("convolution", _draw_image,
           lambda z, a: jnp.tanh(_conv(z.reshape(3, 4), a["kernel"]).reshape(12) + a["x"]),
           lambda z, a: np.tanh(conv_written_out(z, a["kernel"]) + a["x"]), n=12),
    Family("three layers by a scan", _draw_layers, _layers, _layers_exact, closed=True),
    Family("cond", weighted(1.5, some=_uniform(0, 2)),
           lambda z, a: jax.lax.cond(a["some"] > 1, jnp.tanh, jnp.log1p, affine(z, a)),
           lambda z, a: np.where(
               a["some"][:, None] > 1, np.tanh(affine(z, a)), np.log1p(affine(z, a)))),
    _both("where", weighted(1.3, c=_uniform(0.1, 3, 4)),
          lambda z, a, m: (lambda u: m.where(u < a["c"], u, m.sqrt(u * a["c"])))(affine(z, a)),
          closed=True),
    _both("two layers", weighted(2.0, v=_uniform(0, 1, 4, 4), y=_uniform(0, 0.1, 4)),
          lambda z, a, m: m.sqrt(product(a["v"], m.log1p(affine(z, a))) + a["y"])),
    Family("best of three actions", _draw_actions,
           lambda z, a: jnp.max(a["p"] @ z + a["r"], 0),
           lambda z, a: np.max(np.sum(a["p"] * z[:, None, None], -1) + a["r"], 1), closed=True),
    Family("geometric mean", weighted(1.0, c=_uniform(0.05, 0.98, 4)),
           lambda z, a: a["c"] * jnp.sqrt(z * jnp.roll(z, -1)) + a["x"],
           lambda z, a: a["c"] * np.sqrt(z * np.roll(z, -1, 1)) + a["x"]),
    Family("running sums", weighted(1.0, c=_uniform(0.1, 2, 4)),
           lambda z, a: a["c"] * jnp.cumsum(jax.nn.sigmoid(z)) + a["x"],
           lambda z, a: a["c"] * np.cumsum(1 / (1 + np.exp(-z)), 1) + a["x"], closed=True),
)  # fmt: skip

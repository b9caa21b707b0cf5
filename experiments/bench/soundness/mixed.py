"""Positive concave maps whose arrays have entries of both signs, in each way that one gets into f.

As functions of real numbers each is one of `u = w z + x`, `min(u, k)`, `sqrt(1 + u) - 1`, ...; in
floating point the digits of u are lost to a k that is added and taken away again.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.soundness.families import (
    Arrays,
    Draw,
    Family,
    affine,
    conv_written_out,
    inputs,
    matrix,
    product,
)

N = 4


def _draw(high: float = 0.95, low_x: float = -5.0, high_x: float = -1.0) -> Draw:
    """w, x, a large k and m = -k, and two signs of which one is used."""

    def draw(rng, count):
        k = 2.0 ** rng.integers(1, 13, count)
        return dict(
            w=matrix(rng, count, N, 0.05, high),
            x=inputs(rng, count, N, low_x, high_x),
            k=np.broadcast_to(k[:, None], (count, N)).copy(),
            m=np.broadcast_to(-k[:, None], (count, N)).copy(),
            minus=np.full((count, N), -1.0),
            whole=np.full((count, N), -1, np.int32),
            below=rng.uniform(size=(count, N)) < 2,
        )

    return draw


def _raised(z: Any, a: Any) -> Any:
    """k + u, of which k is to be taken away again."""
    return a["k"] + affine(z, a)


def _reflected(z: Any, a: Any, m: Any, k: Any = None) -> Any:
    """`min(u, k)`, for m = -1."""
    k = a["k"] if k is None else k
    return k + m * jax.nn.relu(k + m * affine(z, a))


def _least(z: np.ndarray, a: Arrays) -> np.ndarray:
    return np.minimum(affine(z, a), a["k"])


def _least_of_six(z: np.ndarray, a: Arrays) -> np.ndarray:
    return np.minimum(affine(z, a), 6)


def _a_mixed_constant(z: Any, a: Any) -> Any:
    """An array of NumPy's with both signs."""
    both = np.array([[6, -1], [6, -1], [6, -1], [6, -1]], z.dtype)
    return _reflected(z, a, both[:, 1], both[:, 0]) * np.ones(N, z.dtype)


def _counted(z: Any, a: Any) -> Any:
    count = jnp.arange(N, dtype=z.dtype)
    return _reflected(z, a, count - (count + 1))


def _rows(z: Any, a: Any) -> Any:
    return jnp.stack([_raised(z, a), a["m"]])


def _in_place(z: Any, a: Any) -> Any:
    """`where` between what depends on z and what does not."""
    upper = jnp.arange(2)[:, None] == 0
    return jnp.sum(jnp.where(upper, _raised(z, a)[None, :], a["m"][None, :]), 0)


def _written(z: Any, a: Any) -> Any:
    buffer = jnp.stack([a["m"], a["m"]])
    return jnp.sum(jax.lax.dynamic_update_slice(buffer, _raised(z, a)[None, :], (0, 0)), 0)


def _carried(z: Any, a: Any) -> Any:
    """A scan whose carry is negative, and does not depend on z, until its first step."""
    u = affine(z, a)
    rows = jnp.stack([a["k"] / 2 + u / 2, a["k"] / 2 + u / 2])
    return jax.lax.scan(lambda total, row: (total + row, None), a["m"], rows)[0]


def _scanned(z: Any, a: Any) -> Any:
    """A scan over terms of both signs."""
    terms = jnp.stack([a["k"], a["m"] / 2, a["m"] / 2])
    return jax.lax.scan(lambda total, term: (total + term, None), affine(z, a), terms)[0]


@jax.custom_jvp
def _shift(u: Any, m: Any) -> Any:
    return u + m


@_shift.defjvp
def _shift_jvp(primals: Any, tangents: Any) -> Any:
    return _shift(*primals), tangents[0] + tangents[1]


def _branch(z: Any, a: Any) -> Any:
    add, other = lambda u, m: u + m, lambda u, m: u * jnp.tanh(m)
    return jax.lax.cond(a["k"][0] > 0, add, other, _raised(z, a), a["m"])


def _dot(z: Any, a: Any) -> Any:
    """A sum of products with the weights k + 1 and -k."""
    weights = jnp.stack([a["k"][0] + 1, a["m"][0]])
    u = affine(z, a)
    return weights @ jnp.stack([u, u])


def _draw_grid(rng: np.random.Generator, count: int) -> Arrays:
    """W = (A + C) - C, both held exactly in float32."""
    a = np.round(matrix(rng, count, N, 0.1, 0.9) * 2**10) / 2**10
    c = np.round(rng.uniform(1, 64, (count, N, N)))
    return dict(w=a + c, m=-c, both=np.concatenate([a + c, -c], 2), x=inputs(rng, count, N, -5, -1))


def _of_grid(z: np.ndarray, a: Arrays) -> np.ndarray:
    return product(a["w"] + a["m"], z) + a["x"]


def _draw_halves(rng: np.random.Generator, count: int) -> Arrays:
    """x = p + q, in exact arithmetic."""
    q = -(2.0 ** rng.integers(1, 7, (count, N)))
    x = np.ceil(inputs(rng, count, N, -4, 0) * 2**16) / 2**16
    return dict(w=matrix(rng, count, N, 0.1, 1.5), p=x - q, q=q)


def _draw_kernels(rng: np.random.Generator, count: int) -> Arrays:
    """Kernels (A + C, -C) of two channels."""
    a = np.ceil(rng.uniform(0, 0.1, (count, 3, 3)) * 2**10) / 2**10
    c = np.round(rng.uniform(1, 64, (count, 3, 3)))
    return dict(kernel=np.stack([a + c, -c], 1), x=inputs(rng, count, 12, -5, -1))


def _two_channels(z: Any, a: Any) -> Any:
    image = z.reshape(3, 4)
    two, kernel = jnp.stack([image, image])[None], a["kernel"][None]
    return jax.lax.conv_general_dilated(two, kernel, (1, 1), "SAME")[0, 0].reshape(12) + a["x"]


def _draw_exponents(rng: np.random.Generator, count: int) -> Arrays:
    p = 2.0 ** rng.integers(4, 11, (count, N))
    return _draw()(rng, count) | dict(p=p, q=1 / p)


def _family(name: str, fn: Any, exact: Any = affine, draw: Any = None, *, closed: bool = False,
            mixed: bool = True, n: int = N) -> Family:  # fmt: skip
    return Family(name, draw or _draw(), fn, exact, closed, mixed, n)


MIXED: tuple[Family, ...] = (
    _family("k - relu(k - u)", lambda z, a: _reflected(z, a, a["minus"]), _least),
    _family("k - relu(k - u), closed over", lambda z, a: _reflected(z, a, a["minus"]),
            _least, closed=True),
    _family("k - relu(k - u), scalars",
            lambda z, a: _reflected(z, a, a["minus"][0], a["k"][0]), _least),
    _family("k - relu(k - u), NumPy constants", lambda z, a: _reflected(
        z, a, np.full(N, -1, z.dtype), np.full(N, 6, z.dtype)), _least_of_six),
    _family("k - relu(k - u), one constant", _a_mixed_constant, _least_of_six, closed=True),
    # Without z, of numbers that are all at least 0.
    _family("k - relu(k - u), -1 made inside",
            lambda z, a: _reflected(z, a, -(a["k"] / a["k"])), _least),
    _family("k - relu(k - u), -1 counted", _counted, _least, closed=True),
    _family("k - relu(k - u), -1 by where", lambda z, a: _reflected(
        z, a, jnp.where(a["below"], -1.0, 1.0).astype(z.dtype)), _least),
    _family("k - relu(k - u), integers",
            lambda z, a: _reflected(z, a, a["whole"].astype(z.dtype)), _least),
    _family("sqrt(1 + u) - 1", lambda z, a: jnp.sqrt(1 + affine(z, a)) + a["minus"],
            lambda z, a: affine(z, a) / (1 + np.sqrt(1 + affine(z, a))), _draw(1.8, -5, 0),
            closed=True),
    _family("1 - 1 / (1 + u)", lambda z, a: 1 + a["minus"] / (1 + affine(z, a)),
            lambda z, a: affine(z, a) / (1 + affine(z, a)), _draw(1.5, -5, 0)),
    _family("1 - (1 + u)^e, e an array", lambda z, a: 1 + a["minus"] * (1 + affine(z, a))
            ** a["minus"], lambda z, a: affine(z, a) / (1 + affine(z, a)), _draw(1.5, -5, 0)),
    _family("(u^q)^p, arrays", lambda z, a: (affine(z, a) ** a["q"]) ** a["p"], affine,
            _draw_exponents, closed=True, mixed=False),
    _family("1 - (1 - tanh u)^2", lambda z, a: 1 + a["minus"]
            * jnp.square(1 + a["minus"] * jnp.tanh(affine(z, a))),
            lambda z, a: np.tanh(affine(z, a)) * (2 - np.tanh(affine(z, a))), _draw(0.9, -5, 0)),
    _family("1 / (1/u + k - k)", lambda z, a: 1 / ((1 / affine(z, a) + a["k"]) + a["m"]), affine,
            _draw(0.95, -1, 2), closed=True),
    _family("quotients by -1", lambda z, a: a["k"] + (a["k"] + affine(z, a) / a["minus"])
            / a["minus"]),
    _family("a maximum of negatives", lambda z, a: a["minus"] * jnp.maximum(
        a["minus"] * affine(z, a), a["minus"] * a["k"]), _least),
    _family("W z = (A + C) z - C z", lambda z, a: a["w"] @ z + a["m"] @ z + a["x"], _of_grid,
            _draw_grid),
    _family("(A + C, -C) (z, z)", lambda z, a: a["both"] @ jnp.concatenate([z, z]) + a["x"],
            _of_grid, _draw_grid, closed=True),
    _family("a kernel of both signs", _two_channels,
            lambda z, a: conv_written_out(z, a["kernel"].sum(1)) + a["x"], _draw_kernels, n=12),
    _family("weights k + 1 and -k", _dot),
    _family("an input in two parts", lambda z, a: jnp.tanh((a["w"] @ z + a["p"]) + a["q"]),
            lambda z, a: np.tanh(product(a["w"], z) + (a["p"] + a["q"])), _draw_halves),
    _family("joined and summed", lambda z, a: jnp.sum(
        jnp.concatenate([_raised(z, a), a["m"]]).reshape(2, N), 0), closed=True),
    _family("padded and summed", lambda z, a: jnp.sum(
        jax.lax.pad(_raised(z, a)[None, :], a["m"][0], [(0, 1, 0), (0, 0, 0)]), 0)),
    _family("where and summed", _in_place, closed=True),
    _family("written and summed", _written),
    _family("summed in windows", lambda z, a: jax.lax.reduce_window(
        _rows(z, a), np.zeros((), z.dtype), jax.lax.add, (2, 1), (1, 1), "VALID")[0], closed=True),
    _family("summed as it goes", lambda z, a: jnp.cumsum(_rows(z, a), 0)[1]),
    _family("a scan that starts below 0", _carried, closed=True),
    _family("a scan over both signs", _scanned),
    _family("in functions of their own", lambda z, a: jax.checkpoint(
        lambda u, m: jax.jit(lambda u, m: u + m)(u, m))(_raised(z, a), a["m"]), closed=True),
    _family("in a custom_jvp", lambda z, a: _shift(_raised(z, a), a["m"])),
    _family("in a branch", _branch,
            lambda z, a: np.where(a["k"][:, :1] > 0, affine(z, a), np.nan)),
)  # fmt: skip

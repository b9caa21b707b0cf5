"""Implicit gradients of J of many kinds: is any finite one further off than it is said to be?

f is affine, so that its derivative is J wherever it is asked for; the reference solves
`(I - J)^T y = g` for the J that is stored, in float64 with residuals in long double.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import deqjax

from bench.rows import Row
from bench.soundness.reference import LONG, eliminated
from bench.soundness.work import work

N, CUT = 24, 16  # unknowns, and those of the first leaf where there are two
_REFINED = 4
# A reference that still moves by more is none.
_DOUBT = 1e-9
_WIDE = 10.0  # how much further off than estimated


def _rotations(blocks: Any) -> np.ndarray:
    """A matrix of plane rotations times moduli, by `(modulus, angle)` of each."""
    j = np.zeros((N, N))
    for i, (size, angle) in zip(range(0, N, 2), blocks, strict=True):
        c, s = size * math.cos(angle), size * math.sin(angle)
        j[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    return j


def _normal(rng):
    """Eigenvalues anywhere in a disc, eigenvectors orthogonal."""
    q, _ = np.linalg.qr(rng.standard_normal((N, N)))
    rho = 1 - 10 ** rng.uniform(-4, -0.3)
    drawn = [(rng.uniform(0, math.pi), rng.uniform()) for _ in range(0, N, 2)]
    blocks = _rotations((rho * share**0.5, angle) for angle, share in drawn)
    blocks[:2, :2] = rho * np.eye(2)
    return q @ blocks @ q.T


def _triangular(rng):
    """Entries above the diagonal of up to 10 / sqrt(n), all alike or of both signs."""
    above = np.ones((N, N)) if rng.uniform() < 0.5 else rng.standard_normal((N, N))
    size = 10 ** rng.uniform(-0.5, 1) / math.sqrt(N)
    return size * np.triu(above, 1) + rng.uniform(0.1, 0.9) * np.eye(N)


def _jordan(rng):
    return rng.uniform(0.2, 0.9) * np.eye(N) + 10 ** rng.uniform(-1, 0.3) * np.eye(N, k=1)


def _nonnegative(rng):
    j = rng.uniform(size=(N, N)) ** rng.uniform(1, 8)
    return j * (1 - 10 ** rng.uniform(-4, -0.3)) / np.abs(np.linalg.eigvals(j)).max()


def _complex(rng):
    """Complex pairs of one modulus, eigenvectors far from orthogonal."""
    rho = 1 - 10 ** rng.uniform(-2, -0.3)
    j = _rotations((rho, 1 + i / N) for i in range(0, N, 2))
    turn = np.eye(N) + rng.uniform(0.1, 2) * np.triu(rng.standard_normal((N, N)), 1) / math.sqrt(N)
    return turn @ j @ np.linalg.inv(turn)


def _leaves(rng):
    """Two leaves that hardly see each other, the one fast, the other slow and small."""
    fast, slow = _normal(rng) * 0.8, _nonnegative(rng)
    j = np.zeros((N, N))
    j[:CUT, :CUT], j[CUT:, CUT:] = fast[:CUT, :CUT], slow[CUT:, CUT:]
    last = np.abs(np.linalg.eigvals(j[CUT:, CUT:])).max()
    j[CUT:, CUT:] *= rng.uniform(0.9, 0.999) / last
    j[CUT:, :CUT] = rng.uniform(size=(N - CUT, CUT)) * 10 ** rng.uniform(-9, -6)
    return j


KINDS = {
    "normal": _normal,
    "triangular": _triangular,
    "Jordan": _jordan,
    "nonnegative": _nonnegative,
    "complex": _complex,
    "scaled leaves": _leaves,
}


def implicit(count: int, seed: int, workers: int) -> list[Row]:
    """`count` J in all, as many of each kind."""
    each = -(-count // len(KINDS))
    *whole, two = KINDS
    tasks = [(whole, each, False, seed), ([two], each, True, seed)]
    return [row for rows in work(_kinds, tasks, min(workers, 2)) for row in rows]


def _kinds(names: list[str], each: int, two: bool, seed: int) -> list[Row]:
    """Asks about all of these kinds in one program; `two`: with a state of two leaves."""
    seeds = [(name, [seed, 4, list(KINDS).index(name), k]) for name in names for k in range(each)]
    rngs = [np.random.default_rng(numbers) for _, numbers in seeds]
    js = np.stack([KINDS[name](rng) for (name, _), rng in zip(seeds, rngs, strict=True)])
    gs = np.stack([rng.standard_normal(N) for rng in rngs])
    if two:
        gs[:, CUT:] *= np.stack([10 ** rng.uniform(-6, 0) for rng in rngs])[:, None]
    js, gs = js.astype(np.float32), gs.astype(np.float32)
    y, stats = jax.jit(jax.vmap(_leafwise if two else _whole))(js, gs)
    right, doubt, true = _solved(js, gs)
    cut = lambda v: np.split(np.asarray(v), [CUT] if two else [])
    rows = []
    for i, (name, numbers) in enumerate(seeds):
        said = {k: float(v[i]) for k, v in stats.items()}
        about = {"kind": name, "seed": numbers, "known": bool(doubt[i] < _DOUBT)}
        rows.append(about | judged(cut(y[i]), cut(right[i]), said, true[i]))
    return rows


def judged(y: list, right: list, said: dict[str, float], true: float) -> Row:
    """The error of the worst leaf beside the one estimated.

    A gradient that is not finite says nothing false.
    """
    relative = lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    error = max(map(relative, y, right))
    finite = all(bool(np.all(np.isfinite(leaf))) for leaf in y)
    estimate = said["error_estimate"]
    return {
        "finite": finite,
        "error": error if finite else math.nan,
        "estimate": estimate,
        "residual": said["residual"],
        "condition": said["condition"],
        "condition / true": said["condition"] / float(true),
        "false": finite and not error <= _WIDE * estimate,
    }


def _asked(fn: Any, z: Any, args: Any, g: Any):
    (_, (_, y)), stats = deqjax.implicit_vjp(fn, z, args, g, condition=True)  # pyright: ignore
    return y, {k: stats[k] for k in ("condition", "error_estimate", "residual")}


def _whole(j, g):
    return _asked(lambda z, a: a[0] @ z + a[1], jnp.zeros(N), (j, jnp.zeros(N)), g)


def _leafwise(j, g):
    cut = lambda v: {"a": v[:CUT], "b": v[CUT:]}
    join = lambda t: jnp.concatenate([t["a"], t["b"]])
    fn = lambda t, a: cut(a[0] @ join(t) + join(a[1]))
    zero = cut(jnp.zeros(N))
    y, stats = _asked(fn, zero, (j, zero), cut(g))
    return join(y), stats


def _solved(js: np.ndarray, gs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, how far it moved in the last refinement, and `||(I - J)^-1||_1`."""
    eye = np.eye(N, dtype=LONG)
    left, g = eye - np.swapaxes(js, 1, 2).astype(LONG), gs.astype(LONG)[..., None]
    inverse = eliminated(left, np.broadcast_to(eye, left.shape))
    y = step = np.zeros_like(g)
    for _ in range(_REFINED):
        residual = g - np.sum(left[..., None] * y[:, None], 2)
        step = np.sum(inverse[..., None] * residual[:, None], 2)
        y = y + step
    moved = np.max(np.abs(step), (1, 2)) / np.max(np.abs(y), (1, 2))
    # The columns of the inverse of I - J are the rows of this one, of its transpose.
    return y[..., 0], moved, np.abs(inverse).sum(2).max(1)

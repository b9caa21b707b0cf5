"""Cells with a theorem of their own, through `nn.DEQ.certify`: are they in their enclosures?"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax

from deqjax import FixedPointIteration, ImplicitAdjoint, nn
from deqjax.positive import Power, Shifted

from bench.problems import convolved
from bench.rows import Row
from bench.soundness.families import product
from bench.soundness.reference import LONG, eliminated
from bench.soundness.work import asked, work

_STEPS = 40  # of the cell, at most, before the certificate
_SHOWN = 2
_DOUBT = 1e-15  # of a reference, relative to the largest entry
_SIZE, _CHANNELS = (3, 3), 2  # of the image


class Kind(NamedTuple):
    """Random cells, and their fixed points in NumPy for W and x as the cell sees them."""

    name: str
    make: Callable[[Any, Any], Any]  # (dtype, key)
    solved: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # z*, known
    shape: tuple[int, ...]
    dtype: str = "float32"
    normalised: bool = False


def _contracted(sigma: Callable, normalise: bool, product: Callable = product) -> Callable:
    """Solves by the iteration itself, whose factor is below 0.56, until it stands still."""

    def solved(w, x):
        z = step = np.ones_like(x)
        entries = tuple(range(1, x.ndim))
        for _ in range(400):
            y = sigma(product(w, z) + x)
            new = y / y.max(entries, keepdims=True) if normalise else y
            step, z = np.abs(new / z - 1), new
        return z, step.max(entries) < _DOUBT / 4

    return solved


def _enumerated(w: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`z = relu(W z + x)` by trying which entries are 0: I - W is such that one choice fits."""
    n = x.shape[1]
    eye = np.eye(n, dtype=LONG)
    best, least = np.zeros_like(x), np.full(len(x), np.inf)
    for above in itertools.product((0, 1), repeat=n):
        on = np.array(above, LONG)
        z = eliminated(eye - on[:, None] * w, (on * x)[..., None])[..., 0]
        image = product(w, z) + x
        wrong = np.where(on == 1, np.maximum(-z, 0), np.maximum(image, 0)).max(1)
        wrong = (wrong / np.maximum(np.abs(z).max(1), np.abs(x).max(1))).astype(float)
        best[wrong < least] = z[wrong < least]
        least = np.minimum(wrong, least)
    return best, least < _DOUBT / 4


_TANH = Shifted(jnp.tanh, 1.25)
_ROOT = Power(0.25, 2.0**-10)
_SIGMAS: dict[str, tuple[Any, Callable]] = {
    "tanh + 1.25": (_TANH, lambda u: np.tanh(u) + 1.25),
    "sigmoid": (jax.nn.sigmoid, lambda u: 1 / (1 + np.exp(-u))),
    "(u + 2^-10)^(1/4)": (_ROOT, lambda u: np.sqrt(np.sqrt(u + 2.0**-10))),
}


def _subhomogeneous(name: str, normalise: bool, n: int, dtype: str = "float32") -> Kind:
    sigma, numpy = _SIGMAS[name]
    make = lambda dtype, key: nn.SubhomogeneousLinear(
        n, sigma, normalise=normalise, dtype=dtype, key=key
    )
    title = f"{name}, {'normalised' if normalise else 'plain'}, {n}"
    return Kind(title, make, _contracted(numpy, normalise), (n,), dtype, normalise)


def _image(normalise: bool) -> Kind:
    make = lambda dtype, key: nn.SubhomogeneousConv2d(
        _CHANNELS, 3, _TANH, normalise=normalise, dtype=dtype, key=key
    )
    solved = _contracted(_SIGMAS["tanh + 1.25"][1], normalise, lambda w, z: convolved(z, w))
    name = f"convolution, {'normalised' if normalise else 'plain'}"
    return Kind(name, make, solved, (*_SIZE, _CHANNELS), "float32", False)


def _monotone(name: str, split: Callable[[Any], Any], n: int = 5) -> Kind:
    make = lambda dtype, key: split(nn.MonotoneLinear(n, 0.2, dtype=dtype, key=key))
    return Kind(f"monotone, {name}", make, _enumerated, (n,))


KINDS: tuple[Kind, ...] = (
    *(_subhomogeneous(name, True, n, dtype) for name in _SIGMAS
      for n, dtype in ((2, "float32"), (6, "float32"), (3, "float64"))),
    *(_subhomogeneous(name, False, 4) for name in _SIGMAS),
    *map(_image, (True, False)),
    _monotone("the cell", lambda cell: cell),
    _monotone("forward-backward", lambda cell: cell.forward_backward()),
    _monotone("Peaceman-Rachford", lambda cell: cell.peaceman_rachford()),
)  # fmt: skip


def layers(normalised: int, others: int, some: int | None, seed: int, workers: int) -> list[Row]:
    """`normalised` linear cells that divide by their largest entry in all, `others` of each."""
    each = -(-normalised // sum(kind.normalised for kind in KINDS))
    picked = range(0, len(KINDS), 1 if some is None else -(-len(KINDS) // some))
    tasks = [(i, each if KINDS[i].normalised else others, seed) for i in picked]
    return work(_kind, tasks, workers)


def _kind(index: int, count: int, seed: int) -> Row:
    kind, seeds = KINDS[index], [seed, 2, index]
    about = {"kind": kind.name, "dtype": kind.dtype, "normalised": kind.normalised, "seed": seeds}
    with jax.enable_x64(kind.dtype == "float64"):
        ask = lambda: _certified(kind, count, np.random.default_rng(seeds))
        return asked(about, ask, bound=None)


def _certified(kind: Kind, count: int, rng: np.random.Generator) -> Row:
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), count)
    cells = eqx.filter_vmap(lambda key: kind.make(jnp.dtype(kind.dtype), key))(keys)
    # Parameters of any size: those that are squared grow by the square of it.
    size = (10 ** rng.uniform(-0.7, 0.7, count)).astype(kind.dtype)
    arrays, static = eqx.partition(cells, eqx.is_inexact_array)
    sized = lambda v: v * size.reshape(-1, *(1,) * (v.ndim - 1))
    cells = eqx.combine(jax.tree.map(sized, arrays), static)
    each = (count, *(1,) * len(kind.shape))
    x = rng.standard_normal((count, *kind.shape)) * 10 ** rng.uniform(-1, 0.5, each)
    steps = rng.integers(0, _STEPS + 1, count).astype(np.int32)
    noise = rng.uniform(-1, 1, x.shape) * 10 ** rng.uniform(-8, -1, each)
    noise *= rng.uniform(size=each) < 0.5
    inputs = (x.astype(kind.dtype), steps, noise.astype(kind.dtype))
    w, seen, z, c = eqx.filter_jit(eqx.filter_vmap(_ask))(cells, *inputs)
    solution, known = kind.solved(np.asarray(w, LONG), np.asarray(seen, LONG))
    return judged(z, solution, known, c)


def _ask(cell: Any, x: Any, steps: Any, noise: Any):
    """W and x as the cell sees them, the output asked about, and what is said of it."""
    plain = paramax.unwrap(cell)
    seen = plain.inject(x) if hasattr(plain, "inject") else x
    z = jax.lax.fori_loop(0, steps, lambda _, z: plain(z, seen), jnp.ones_like(x))
    z = z * (1 + noise)
    deq = nn.DEQ(cell, FixedPointIteration(), ImplicitAdjoint())
    out = plain.readout(z) if hasattr(plain, "readout") else z
    return paramax.unwrap(cell.weight), seen, out, deq.certify(x, z)


def judged(z: Any, solution: np.ndarray, known: np.ndarray, c: Any) -> Row:
    """Counts those that hold and of which z* is outside; an entry of z* may be 0."""
    entries = tuple(range(1, solution.ndim))
    doubt = _DOUBT * np.abs(solution).max(entries, keepdims=True)
    lower, upper, z = (np.asarray(v, LONG) for v in (c.lower, c.upper, z))
    claim = np.asarray(c.relative_error, LONG).reshape(-1, *(1,) * len(entries))
    some = np.isfinite(claim)
    short = some & (np.abs(z - solution) > np.where(some, claim, 0) * solution + doubt)
    outside = ~((lower <= solution + doubt) & (upper >= solution - doubt))
    held = np.asarray(c.holds) & known
    false = held & np.any(outside | short, entries)
    with np.errstate(all="ignore"):  # ends that are no number hold for nothing
        miss = np.maximum(lower - solution, solution - upper) / np.maximum(solution, doubt)
    order = np.argsort(np.where(false, -miss.max(entries), np.inf))[: min(_SHOWN, false.sum())]
    worst = [{"problem": int(j), "outside by": float(miss[j].max()),
              "claimed": float(np.ravel(claim)[j])} for j in order]  # fmt: skip
    of_held = np.ravel(claim)[held & np.isfinite(np.ravel(claim))].astype(float)
    return {
        "bound": float(np.median(of_held)) if len(of_held) else None,
        "tried": int(known.sum()),
        "held": int(held.sum()),
        "unknown": int((~known).sum()),
        "false": int(false.sum()),
        "worst": worst,
    }

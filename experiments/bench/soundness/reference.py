"""Fixed points in long double between two points that prove it, without this library."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LONG = np.longdouble
# Rounding error of one evaluation of `exact`, which nowhere cancels: a hundred roundings.
_ROUNDING = 100 * float(np.finfo(LONG).eps)
# The most doubt of what is still a reference.
_DOUBT = 1e-13
_NEWTON = 60


class Reference(NamedTuple):
    """Points with `|z - z*| <= doubt * z` in every entry, where `known`."""

    z: np.ndarray  # (b, n), long double
    doubt: np.ndarray  # (b, n)
    known: np.ndarray  # (b,)


def solved(exact: Callable[[Any, Any], Any], arrays: dict[str, np.ndarray], n: int) -> Reference:
    """Newton's method from above, in long double; then an upper and a lower point beside it.

    For a monotone, scalable f, `f(u) <= u` gives `z* <= u` and `f(l) >= l` gives `z* >= l`, each
    tested with a margin for rounding. With `(I - J) v = z` the points `z +- t v` pass for a t that
    is not much more than that rounding.
    """
    a = {k: x.astype(LONG) if x.dtype.kind == "f" else x for k, x in arrays.items()}
    count = len(next(iter(a.values())))
    f = lambda z: exact(z, a)
    with np.errstate(all="ignore"):
        least = f(np.zeros((count, n), LONG))
        z = np.maximum(least, LONG(1e-30))
        for _ in range(120):
            low = np.any(f(z) > z, -1, keepdims=True)
            z = np.where(low, 2 * np.maximum(z, f(z)), z)
        for _ in range(_NEWTON):
            step = _solve(_jacobian(f, z), f(z) - z)
            new = np.maximum(z + step, least)
            z = np.where(np.all(np.isfinite(new), -1, keepdims=True), new, f(z))
        v = _solve(_jacobian(f, z), z)
        doubt, found = np.full((count, n), np.inf), np.zeros(count, bool)
        for t in _ROUNDING * 2.0 ** np.arange(1, 12):
            above, below = z + t * v, z - t * v
            proved = np.all(f(above) * (1 + _ROUNDING) <= above, -1)
            proved &= np.all(f(below) * (1 - _ROUNDING) >= below, -1) & np.all(below > 0, -1)
            proved &= np.all(v > 0, -1) & ~found
            doubt[proved] = (t * v / z)[proved].astype(float)
            found |= proved
    return Reference(z, doubt, found & (doubt.max(-1) < _DOUBT))


def _jacobian(f: Callable, z: np.ndarray) -> np.ndarray:
    """The Jacobian by differences: Newton's method mends what they miss."""
    columns = []
    for j in range(z.shape[1]):
        step = np.zeros_like(z)
        step[:, j] = LONG(1e-7) * z[:, j]
        columns.append((f(z + step) - f(z - step)) / (2 * step[:, j, None]))
    return np.stack(columns, -1).astype(float)


def _solve(j: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`(I - J)^-1 b`; NaN where that is singular."""
    left = np.eye(j.shape[-1]) - j
    bad = ~np.all(np.isfinite(left), (1, 2)) | (np.abs(np.linalg.det(np.nan_to_num(left))) < 1e-300)
    left = np.where(bad[:, None, None], np.eye(j.shape[-1]), left)
    out = np.linalg.solve(left, np.nan_to_num(b).astype(float)[..., None])[..., 0]
    return np.where(bad[:, None], np.nan, out).astype(LONG)


def eliminated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a^-1 b` by Gauss and Jordan's elimination with pivots, in long double, axis 0 a batch."""
    both, every = np.concatenate([a, b], 2).astype(LONG), np.arange(len(a))
    n = a.shape[1]
    for i in range(n):
        pivot = i + np.argmax(np.abs(both[:, i:, i]), 1)
        both[every, i], both[every, pivot] = both[every, pivot], both[every, i].copy()
        both[:, i] /= both[:, i, i, None]
        factors = both[:, :, i].copy()
        factors[:, i] = 0
        both -= factors[..., None] * both[:, i, None]
    return both[:, :, n:]

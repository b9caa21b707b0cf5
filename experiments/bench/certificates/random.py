"""Random problems, random points near their solutions, and the spectral radii there."""

import numpy as np
from scipy.sparse.csgraph import connected_components

import deqjax

from bench.certificates.cells import LONG, SIGMAS, Batch, solved

SOURCES = (
    "Picard from 0",
    "Picard from the top",
    "the solution, rounded",
    "the solution, noise 1e-7 to 1e-1",
    "the solution, a few units off",
    "rubbish in [0, 10]",
)
_STEPS = 60  # of Picard, at most
_POWER = 200  # steps towards a Perron vector


def problems(name: str, count: int, n: int, dtype: str, seed: int) -> Batch:
    """Sparse with zero rows to dense, triangular too; rho(W) 0.05 to 20, x 1e-4 to 10."""
    rng = np.random.default_rng(seed)
    some = lambda p: rng.uniform(size=(count, 1, 1)) < p
    w = rng.uniform(size=(count, n, n)) ** rng.uniform(0.5, 8, (count, 1, 1))
    w *= rng.uniform(size=w.shape) < rng.uniform(0.05, 1.2, (count, 1, 1))
    w *= (rng.uniform(size=(count, n, 1)) > 0.2) | ~some(0.3)  # rows of zeros
    w = np.where(some(0.1), np.triu(w, 1), w)
    # A nilpotent matrix is scaled by its largest row instead.
    size, rows = np.abs(np.linalg.eigvals(w)).max(-1), w.sum(-1).max(-1)
    size = np.where(size > 1e-3 * rows, size, np.where(rows > 0, rows, 1))
    rho = 10 ** rng.uniform(np.log10(0.05), np.log10(20), count)
    w *= (rho / size)[:, None, None]
    spread = rng.uniform(0, 2, (count, 1)) * rng.uniform(-0.5, 0.5, (count, n))
    x = 10 ** (rng.uniform(-4, 1, (count, 1)) + spread)
    if deqjax.positive.qualify(SIGMAS[name].jax).kind == 2:
        x *= (rng.uniform(size=x.shape) > 0.5) | ~some(0.2)[..., 0]
    return solved(name, w.astype(dtype), x.astype(dtype))


def points(p: Batch, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points that might have to be certified, in the dtype of the problem; and their sources."""
    rng = np.random.default_rng([seed, 1])
    shape, dtype = p.x.shape, p.x.dtype
    source = rng.integers(0, len(SOURCES), shape[0])
    exact, value = p.solution.astype(float), SIGMAS[p.name].value
    supremum = min(SIGMAS[p.name].supremum, 4 * float(exact.max()))
    ends = [np.zeros_like(p.x), np.full_like(p.x, supremum)]
    steps = rng.integers(0, _STEPS, (shape[0], 1))
    for k in range(_STEPS):
        picard = lambda z: value(np.matmul(p.w, z[..., None])[..., 0] + p.x)
        ends = [np.where(k < steps, picard(z), z).astype(dtype) for z in ends]
    noise = 10 ** rng.uniform(-7, -1, (shape[0], 1)) * rng.uniform(-1, 1, shape)
    units = rng.integers(-9, 10, shape) * float(np.finfo(dtype).eps)
    every = [*ends, exact, exact * (1 + noise), exact * (1 + units), rng.uniform(0, 10, shape)]
    stack = np.stack([z.astype(dtype) for z in every])
    return np.take_along_axis(stack, source[None, :, None], 0)[0], source


def radii(p: Batch) -> tuple[np.ndarray, np.ndarray]:
    """`low <= rho(J) <= high` at z*, after Collatz and Wielandt in long double.

    J falls in z, so that J at `solution - doubt` is above the one that is meant, and J at
    `solution + doubt` below. Each strongly connected part has a positive Perron vector; without the
    parts, the eigenvalues of a reducible matrix are off by as much as the n-th root of rounding.
    """
    slope, w = SIGMAS[p.name].slope, p.w.astype(LONG)
    u = np.matmul(w, p.solution[..., None])[..., 0] + p.x
    off = np.matmul(w, p.doubt.astype(LONG)[..., None])[..., 0] + 1e-18 * u
    over, under = (slope(np.maximum(v, 0))[..., None] * w for v in (u - off, u + off))
    found = [_radius(*three) for three in zip(p.jacobian, over, under, strict=True)]
    low, high = np.array(found).T
    # Rounding of the slopes, whose constants are of float64.
    return low * (1 - 1e-15), high * (1 + 1e-15)


def _radius(j: np.ndarray, over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    count, label = connected_components(j > 0, connection="strong")
    low = high = 0.0
    for k in range(count):
        part = np.flatnonzero(label == k)
        one, above, below = (m[np.ix_(part, part)] for m in (j, over, under))
        values, vectors = np.linalg.eig(one.astype(float))
        v = np.abs(vectors[:, np.argmax(np.real(values))]).astype(LONG)
        shift = LONG(max(float(np.max(np.real(values))), 1e-30))
        for _ in range(_POWER if len(part) > 1 else 1):
            v = v / v.max()
            v = one @ v + shift * np.maximum(v, 1e-300)
        high = max(high, float(np.max(above @ v / v)))
        # Any v >= 0 will do for the lower bound, with the entries left out where it is 0.
        for cut in (0.0, *10.0 ** np.arange(-40, 0, 2)):
            some = np.where(v > cut * v.max(), v, 0)
            ratio = (below @ some)[some > 0] / some[some > 0]
            low = max(low, float(np.min(ratio)))
    return low, high

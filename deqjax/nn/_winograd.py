"""A 3 x 3 convolution by minimal filtering: 16 matrix products for every 2 x 2 outputs.

    y = A^T [(G w G^T) * (B^T d B)] A        d: 4 x 4 inputs, y: 2 x 2 outputs, * entry by entry

These are 16 / 36 of the multiplications of the direct sums. y is linear in d and in w, and the
cotangent of w has the same three factors. Sums of nonnegative terms cancel here, so that the error
is relative to the largest entry, no longer to each entry: proofs need the direct sums.

Reference: Winograd, Arithmetic complexity of computations, SIAM, 1980; Lavin and Gray, Fast
algorithms for convolutional neural networks, arXiv 1509.09308, section 4.1, for the matrices.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

Grid = list[list[Array]]


def convolve(
    x: Float[Array, "n h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "n h w o"]:
    """The convolution of stride 1 with one zero around x."""
    tiles, filters = _inputs(x), _both(_filters, _taps(kernel))
    products = [[d @ u for d, u in zip(*rows, strict=True)] for rows in _pairs(tiles, filters)]
    return _joined(_both(_outputs, products), x.shape)


def kernel_cotangent(
    x: Float[Array, "n h w i"], g: Float[Array, "n h w o"]
) -> Float[Array, "3 3 i o"]:
    """The cotangent of the kernel, from that of the output."""
    _, h, w, o = g.shape
    even = jnp.pad(g, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
    corners = [[even[:, r::2, c::2].reshape(-1, o) for c in range(2)] for r in range(2)]
    spread = _both(_spread, corners)
    rows = _pairs(_inputs(x), spread)
    products = [[d.T @ m for d, m in zip(*row, strict=True)] for row in rows]
    taps = _both(_folded, products)
    return jnp.stack([jnp.stack(row) for row in taps])


def _inputs(x: Array) -> Grid:
    """`B^T d B` of all tiles: 4 x 4 matrices with one row per tile."""
    _, h, w, i = x.shape
    t, s = -(-h // 2), -(-w // 2)
    x = jnp.pad(x, ((0, 0), (1, 1 + h % 2), (1, 1 + w % 2), (0, 0)))
    tap = lambda r, c: x[:, r : r + 2 * t - 1 : 2, c : c + 2 * s - 1 : 2].reshape(-1, i)
    return _both(_mixed, [[tap(r, c) for c in range(4)] for r in range(4)])


def _joined(corners: Grid, shape: tuple[int, ...]) -> Array:
    """The image made of these 2 x 2 tiles, with one row per tile."""
    n, h, w, _ = shape
    t, s = -(-h // 2), -(-w // 2)
    o = corners[0][0].shape[-1]
    rows = [jnp.stack([y.reshape(n, t, s, o) for y in row], 3) for row in corners]
    return jnp.stack(rows, 2).reshape(n, 2 * t, 2 * s, o)[:, :h, :w]


def _taps(kernel: Array) -> Grid:
    return [[kernel[r, c] for c in range(3)] for r in range(3)]


def _pairs(a: Grid, b: Grid):
    return zip(a, b, strict=True)


def _both(along: Callable[..., Sequence[Array]], grid: Sequence[Sequence[Array]]) -> Grid:
    """Applies a transform along both axes."""
    rows = [along(*row) for row in grid]
    columns = [along(*column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def _mixed(a, b, c, d):  # B^T
    return a - c, b + c, c - b, b - d


def _filters(a, b, c):  # G
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _folded(a, b, c, d):  # G^T
    return a + (b + c) / 2, (b - c) / 2, (b + c) / 2 + d


def _outputs(a, b, c, d):  # A^T
    return a + b + c, b - c - d


def _spread(a, b):  # A
    return a, a + b, a - b, -b

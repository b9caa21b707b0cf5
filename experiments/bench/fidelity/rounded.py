"""Cells whose f is rounded differently at every evaluation, as by nondeterministic kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bench.blocks import Args, Cell, make_tanh, normalise
from bench.fidelity.errors import relative, vector
from bench.gradients import gradient
from bench.rows import Row
from bench.ways import Method

METHODS: tuple[Method, ...] = ("exact", "isolated")


def rounded(depths: tuple[int, ...], d: int, seed: int) -> list[Row]:
    """Error, residual and guard of each mode, for each kind of deviation and depth."""
    cell = make_tanh(8, 64, jax.random.key(seed))
    rows: list[Row] = []
    args = cell.z0, cell.args, cell.cotangent
    truth = {n: _gradient("checkpointed", cell._replace(fn=plain), d, n)(*args)[0] for n in depths}
    for kind, fn in kinds(seed).items():
        for method in METHODS:
            for n in depths:
                found, residual, guard = _gradient(method, cell._replace(fn=fn), d, n)(*args)
                row = {"kind": kind, "method": method, "d": d, "evaluations": n}
                error = relative(vector(found), vector(truth[n]))
                said = {"error": error, "residual": float(residual), "guard": float(guard)}
                rows.append({**row, **said})
    return rows


def _gradient(method: Method, cell: Cell, d: int, n: int) -> Callable:
    def run(z0: Array, args: Args, cotangent: Array):
        moved = cell._replace(z0=z0, args=args, cotangent=cotangent)
        return gradient(method, moved, d, n, jnp.asarray(n, jnp.int32))

    return jax.jit(run)


def plain(z: Array, args: Args) -> Array:
    """A block without any deviation."""
    weight, x = args
    return normalise(z + jnp.tanh(z @ weight + x))


def kinds(seed: int) -> dict[str, Callable[[Array, Args], Array]]:
    """The same block, with sums in a new order or with noise at each evaluation."""
    rng = np.random.default_rng(seed)

    @jax.custom_jvp
    def shuffled(terms: Array) -> Array:
        add = lambda x: np.add.accumulate(rng.permuted(x, axis=-1), -1, dtype=x.dtype)[..., -1]
        return jax.pure_callback(add, jax.ShapeDtypeStruct(terms.shape[:-1], terms.dtype), terms)

    shuffled.defjvp(lambda x, t: (shuffled(*x), jnp.sum(t[0], -1)))

    def reordered(z: Array, args: Args) -> Array:
        weight, x = args
        products = jnp.broadcast_to(weight.T, (*z.shape, z.shape[-1])) * z[..., None, :]
        return normalise(z + jnp.tanh(shuffled(products) + x))

    def noisy(z: Array, args: Args) -> Array:
        draw = lambda z: (1e-7 * rng.standard_normal(z.shape)).astype(z.dtype)
        # Depends on z, so that it is not taken out of the loop; it has no derivative.
        noise = jax.pure_callback(draw, z, jax.lax.stop_gradient(z))
        return plain(z, args) + noise

    return {"sums in a new order": reordered, "noise of 1e-7": noisy}

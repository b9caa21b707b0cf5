"""Maps for which the theorem is not true: what refuses each, and what does not notice."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paramax

import deqjax
from deqjax.nn import PositiveConcaveLinear
from deqjax.positive import Shifted, check_hypotheses

from bench.rows import Row


class Case(NamedTuple):
    """`f(z)` with the fixed points that it has, and how one would ask the cell for it."""

    name: str
    f: Callable[[jax.Array], jax.Array]
    points: tuple  # fixed points; where there is none, points to be tried
    unique: int  # how many fixed points there are
    activation: Callable
    x: float | None = None  # where x breaks the theorem
    negative: bool = False  # where W does


def _matrix(*rows: tuple[float, ...]) -> Callable[[jax.Array], jax.Array]:
    return lambda z: jnp.asarray(rows, z.dtype) @ z


_BOTH = _matrix((1.0, -1.0), (-1.0, 1.0))
_GROWS = _matrix((0.6, 0.6), (0.6, 0.6))  # spectral radius 1.2
_THREE = ((1.2, 1.2), (2.1575, 0.2425), (0.2425, 2.1575))
CASES = (
    Case("sigmoid(10 z - 5)", lambda z: jax.nn.sigmoid(10 * z - 5),
         ((0.0072,), (0.5,), (0.9928,)), 3, jax.nn.sigmoid, x=-5.0),
    Case("sigmoid(10 z + x), x = -5", lambda z: jax.nn.sigmoid(10 * z + jnp.full(1, -5.0)),
         ((0.0072,), (0.5,), (0.9928,)), 3, jax.nn.sigmoid, x=-5.0),
    Case("tanh(2 z + x), x = 0", lambda z: jnp.tanh(2 * z + jnp.zeros(1)),
         ((0.0,), (0.9575,)), 2, jnp.tanh, x=0.0),
    Case("sqrt(5 z + x), x = 0", lambda z: jnp.sqrt(5 * z + jnp.zeros(1)),
         ((0.0,), (5.0,)), 2, jnp.sqrt, x=0.0),
    Case("tanh(-3 z + 1)", lambda z: jnp.tanh(-3 * z + 1), ((0.2447,),), 1, jnp.tanh,
         negative=True),
    Case("tanh(W z) + 1.2, W = [[1, -1], [-1, 1]]", lambda z: jnp.tanh(_BOTH(z)) + 1.2, _THREE, 3,
         Shifted(jnp.tanh, 1.2), negative=True),
    Case("softplus(z / 2 + 1)", lambda z: jax.nn.softplus(z / 2 + 1), ((2.1479,),), 1,
         jax.nn.softplus),
    Case("softplus(W z + 1), rho(W) = 1.2", lambda z: jax.nn.softplus(_GROWS(z) + 1),
         ((1.0, 1.0), (100.0, 100.0)), 0, jax.nn.softplus),
    Case("relu(W z + 1), rho(W) = 1.2", lambda z: jax.nn.relu(_GROWS(z) + 1),
         ((1.0, 1.0), (100.0, 100.0)), 0, jax.nn.relu),
)  # fmt: skip


def refused(seed: int, smoke: bool) -> list[Row]:
    with jax.enable_x64(True):
        return [_refused(case, seed) for case in CASES[:: 4 if smoke else 1]]


def _refused(case: Case, seed: int) -> Row:
    key = jax.random.key(seed)
    cell, kept_out = _by_the_cell(case, key)
    enclosed = _by_certify(case)
    z = jnp.asarray(case.points[0])
    found = check_hypotheses(lambda z, x: case.f(z), z, key=key)
    fails = [k for k, finding in found._asdict().items() if not finding.holds]
    return {
        "case": case.name,
        "fixed points": case.unique,
        "cell": cell,
        "kept out": kept_out,
        "certify": enclosed,
        "check": fails,
    }


def _by_the_cell(case: Case, key: Any) -> tuple[str, bool]:
    """The layer's answer to the request, and whether the map is kept out."""
    size = len(case.points[0])
    try:
        cell = PositiveConcaveLinear(size, case.activation, key=key)
    except ValueError:
        return "ValueError", True
    if case.x is not None:
        injected = float(cell.inject(jnp.full(size, case.x))[0])
        strict = deqjax.positive.qualify(case.activation).kind == 1
        return f"x becomes {injected:.3g}", injected > 0 if strict else injected >= 0
    # Whatever an optimiser does to the parameter.
    negative = lambda w: -jnp.ones_like(w) if eqx.is_inexact_array(w) else w
    least = float(jnp.min(paramax.unwrap(jax.tree.map(negative, cell.weight))))
    return f"W >= 0, always (W = {least:.3g} from a parameter of -1)", case.negative and least >= 0


def _by_certify(case: Case) -> str | list[bool]:
    """`holds` at each point, all fixed points to float64's last digits; or the error."""
    found = []
    for point in case.points:
        z = jnp.asarray(point)
        for _ in range(50 if case.unique else 0):  # Newton, from four digits
            jacobian = jax.jacfwd(case.f)(z) if float(jnp.min(z)) > 0 else jnp.zeros(())
            if jacobian.ndim:
                z = z - jnp.linalg.solve(jnp.eye(len(z)) - jacobian, z - case.f(z))
        try:
            c = deqjax.certify(lambda z, _: case.f(z), z)
        except ValueError:
            return "ValueError"
        found.append(bool(np.asarray(c.holds)))
    return found

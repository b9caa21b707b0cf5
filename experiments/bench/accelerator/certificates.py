"""The parts of certificates, and whether they hold on this machine.

Functions: by how many units (half of eps, relative) the device's float32 misses float64 of the
host, against the table that certificates count with. `erf` is compared at fewer points, since NumPy
has none and Python's takes a microsecond a point.

Certificates: of random dense and convolutional positive concave cells, against fixed points in
float64 on the host, by Picard from a lower and an upper point of each, which bracket it whether
they have met or not. What is false of a certificate beyond the bracket is a violation. Products
that ask for the default precision (TF32 or bfloat16 inputs on an accelerator) and cells in bfloat16
are certified too: their bounds have to hold, or `holds` has to be False.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import deqjax
from deqjax.nn._convolution import conv2d, stock
from deqjax.positive._rounding_rules import _FUNCTIONS

from bench.accelerator.report import LATE
from bench.accelerator.run import Compiled, Program, Run, Size, compiled, good
from bench.problems import convolved

POINTS: dict[Size, int] = {"smoke": 2_000, "reduced": 1_000_000, "full": 4_000_000}
ERF_POINTS: dict[Size, int] = {"smoke": 200, "reduced": 200_000, "full": 1_000_000}
_UNIT = 2.0**-24
_POWERS = (0.25, 0.5, 0.9, -0.5)
_DIVISION = 3  # what `_rounding.py` counts for a quotient

_erf = np.vectorize(math.erf, otypes=[float])
# On the device, and on the host in float64; entries of the table by their name before the comma.
FUNCTIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Any], Any]]] = {
    "tanh": (jnp.tanh, np.tanh),
    "erf": (jax.lax.erf, _erf),
    "expm1": (jnp.expm1, np.expm1),
    "log1p": (jnp.log1p, np.log1p),
    "logistic": (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "atan": (jnp.arctan, np.arctan),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "sqrt": (jnp.sqrt, np.sqrt),
    "rsqrt": (jax.lax.rsqrt, lambda x: 1 / np.sqrt(x)),
    "cbrt": (jnp.cbrt, np.cbrt),
    **{
        # The exponent as it is stored: of a rounded one the 23 of log 1e-10 would make nine units.
        f"pow, {p}": ((lambda x, p=p: jnp.power(x, p)), (lambda x, p=p: x ** float(np.float32(p))))
        for p in _POWERS
    },
    "division, x / (x + 3)": (lambda x: x / (x + 3), lambda x: x / np.float32(x + np.float32(3))),
    "division, x / sqrt(x + 1)": (lambda x: x / jnp.sqrt(x + 1), lambda x: x / np.sqrt(x + 1)),
}
# The sum and the root round as well.
_MORE = {"division, x / (x + 3)": 0, "division, x / sqrt(x + 1)": 2}


class Form(NamedTuple):
    """Random cells of one kind: sigma(W z + x) on the device and on the host."""

    sigma: tuple[Callable[[Array], Array], Callable[[Any], Any]]
    convolution: bool = False
    dtype: str = "float32"
    precision: jax.lax.Precision | None = None  # None: as the certificate asks for it


SOFTSIGN = (jax.nn.soft_sign, lambda u: u / (1 + np.abs(u)))
FORMS: dict[str, Form] = {
    "dense, tanh": Form(FUNCTIONS["tanh"]),
    "dense, sigmoid": Form(FUNCTIONS["logistic"]),
    "dense, log1p": Form(FUNCTIONS["log1p"]),
    "convolution, soft_sign": Form(SOFTSIGN, convolution=True),
    "convolution, tanh": Form(FUNCTIONS["tanh"], convolution=True),
    "dense, tanh, default precision": Form(FUNCTIONS["tanh"], precision=jax.lax.Precision.DEFAULT),
    "convolution, tanh, default precision": Form(
        FUNCTIONS["tanh"], convolution=True, precision=jax.lax.Precision.DEFAULT
    ),
    "dense, tanh, bfloat16": Form(FUNCTIONS["tanh"], dtype="bfloat16"),
}
COUNT: dict[Size, int] = {"smoke": 8, "reduced": 200, "full": 200}
_DENSE: dict[Size, int] = {"smoke": 4, "reduced": 32, "full": 64}
_IMAGE: dict[Size, tuple[int, int]] = {"smoke": (3, 2), "reduced": (6, 4), "full": (8, 8)}
_STEPS = 1_000  # of Picard, on the host


def points(n: int, seed: int) -> np.ndarray:
    """Random float32 numbers, log-uniform in [1e-10, 60]."""
    u = np.random.default_rng(seed).uniform(math.log(1e-10), math.log(60), n)
    return np.exp(u).astype(np.float32)


def problems(form: Form, size: Size, seed: int) -> tuple[Any, Any, Any]:
    """W, x and a point somewhere between the fixed point and rubbish, in the dtype of the form."""
    rng = np.random.default_rng([seed, list(FORMS.values()).index(form)])
    b, n, (side, c) = COUNT[size], _DENSE[size], _IMAGE[size]
    shape = (b, 3, 3, c, c) if form.convolution else (b, n, n)
    state = (b, side, side, c) if form.convolution else (b, n)
    per = lambda ndim: (b, *(1,) * (ndim - 1))  # a number per problem
    w = rng.uniform(size=shape) ** rng.uniform(0.5, 6, per(len(shape)))
    w *= rng.uniform(size=shape) < rng.uniform(0.1, 1.2, per(len(shape)))
    # Row sums of at most 0.1 to 4.
    sums = np.sum(w, (1, 2, 3) if form.convolution else 2)
    most = np.max(sums, -1).reshape(per(len(shape)))
    w *= 10 ** rng.uniform(-1, 0.6, most.shape) / np.maximum(most, 1e-3)
    each = per(len(state))
    x = 10 ** (rng.uniform(-3, 1, each) + rng.uniform(-1, 1, state))
    cast = lambda a: jnp.asarray(a, form.dtype)
    w, x = cast(w), cast(x)
    noise = 10 ** rng.uniform(-7, -1, each) * rng.uniform(-1, 1, state)
    low, _ = bracket(form, w, x, int(rng.integers(20, 60)))
    return w, x, cast(low * (1 + noise))


def on_host(form: Form, w: np.ndarray, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    product = convolved(z, w) if form.convolution else np.matmul(w, z[..., None])[..., 0]
    return form.sigma[1](product + x)


def bracket(form: Form, w: Any, x: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Picard from 0, which rises, and from a point above its own image, which falls."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    f = lambda z: on_host(form, w, x, z)
    low, high = np.zeros_like(x), np.ones_like(x)
    axes = tuple(range(1, x.ndim))
    while np.any(under := np.any(f(high) > high, axes, keepdims=True)):
        high = np.where(under, 2 * high, high)
    for _ in range(steps):
        low, high = f(low), f(high)
        if np.all(high - low <= 1e-13 * high):
            break
    return low * (1 - 1e-12), high * (1 + 1e-12)


def certified(form: Form, size: Size, seed: int) -> Program:
    """`(lower, upper, relative error, holds)` of all problems of a form."""

    def one(z, w, x):
        if form.convolution:
            own = form.precision is None
            conv = conv2d if own else partial(stock, stride=1, precision=form.precision)
            y = conv(z[None], w)[0]
        else:
            y = jnp.matmul(w, z, precision=form.precision)
        return form.sigma[0](y + x)

    def fn(w, x, z):
        f = lambda z, args: jax.vmap(one)(z, *args)
        e = deqjax.certify(f, z, (w, x), batched=True)
        return e.lower, e.upper, e.relative_error, e.holds

    return fn, problems(form, size, seed)


def programs(size: Size, key: PRNGKeyArray) -> Iterator[tuple[str, Program]]:
    del key
    x = jnp.asarray(points(16, 0))
    yield from ((name, (fn, (x,))) for name, (fn, _) in FUNCTIONS.items())
    yield from ((name, certified(form, size, 0)) for name, form in FORMS.items())


def certificates(run: Run) -> None:
    names = list(FUNCTIONS)[: run.pick(3, None, None)]
    forms = dict(list(FORMS.items())[run.pick(5, 0, 0) :])
    found: dict[str, Any] = {}

    def check(name: str) -> None:
        if not found:
            found.update(compiled({n: certified(f, run.size, run.seed) for n, f in forms.items()}))
        judged(run, name, forms[name], good(found[name]))

    cases: dict[str, Callable[[], None]] = {"functions": partial(functions, run, names)}
    run.cases(cases | {name: partial(check, name) for name in forms})


def functions(run: Run, names: list[str]) -> None:
    every = points(POINTS[run.size], run.seed)
    some = every[: ERF_POINTS[run.size]]
    inputs = {name: some if name == "erf" else every for name in names}
    found = compiled({n: (FUNCTIONS[n][0], (jnp.asarray(inputs[n]),)) for n in names})
    for name in names:
        if run.left <= 0:
            run.add(f"units of {name}", "", note=LATE)
            continue
        got = np.asarray(good(found[name]).call(), np.float64)
        x = inputs[name].astype(np.float64)
        truth = FUNCTIONS[name][1](x)
        units = np.abs(got / truth - 1) / _UNIT
        worst = int(np.nanargmax(np.where(np.isnan(units), np.inf, units)))
        table = _DIVISION + _MORE[name] if name in _MORE else _FUNCTIONS[name.partition(",")[0]][1]
        said = f"{units[worst]:.2f} of {len(x):.0e} points, at {x[worst]:.4g}"
        run.add(f"units of {name}", said, limit=str(table), ok=bool(units[worst] <= table))


def judged(run: Run, name: str, form: Form, program: Compiled) -> None:
    w, x, z = (np.asarray(a, np.float64) for a in program.inputs)
    lower, upper, error, holds = (np.asarray(a) for a in program.call())
    low, high = bracket(form, w, x, _STEPS)
    false = np.flatnonzero(holds & violated(z, (low, high), lower, upper, error))
    said = f"{len(false)} violations, {int(np.sum(holds))} of {len(holds)} hold, median bound "
    said += f"{np.median(error):.1e}, Picard within {np.max(high / low - 1):.0e}"
    which = false[:5].tolist()
    run.add(f"certificates, {name}", said, limit="0", ok=len(false) == 0, which=which)


def violated(z: Any, bracket: tuple[Any, Any], lower: Any, upper: Any, error: Any) -> np.ndarray:
    """Marks the problems that contradict their bracket, wherever in it the fixed point is."""
    (low, high), axes = bracket, tuple(range(1, np.ndim(z)))
    # The least distance of z from anything in the bracket.
    least = np.maximum(np.maximum(z / high - 1, 1 - z / low), 0)
    # A comparison with NaN is false, and no certificate.
    meets = np.all((lower <= high) & (upper >= low), axes)
    return ~(meets & (np.max(least, axes) <= error))

"""The integers of the reversible iteration, against Python's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import deqjax
from deqjax.adjoints.reversible._tape import Digits
from deqjax.solvers._grid import Grid

BASES = [2, 3, 5, 10, 65536]
each = pytest.mark.parametrize("d, sign", [(d, s) for d in BASES for s in (1, -1)])
# One length, so that each operation is compiled once.
N = 24
LENGTH = dict(min_size=N, max_size=N)
quick = settings(max_examples=20, deadline=None, derandomize=True)


def integers(bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edges = [low, low + 1, -1, 0, 1, high - 1, high]
    return st.lists(st.one_of(st.sampled_from(edges), st.integers(low, high)), **LENGTH)


def check_step(d, sign, bits, xs, us):
    """Floor division, the sums that do not fit, and the inverse of those that do."""
    grid, dtype = Grid(d, sign, 24), f"int{bits}"
    x, u = (np.asarray(v, dtype) for v in (xs, us))
    quotient, digit = grid.divide(jnp.asarray(x))
    assert quotient.dtype == dtype and digit.dtype == jnp.uint32
    assert quotient.tolist() == [v // d for v in xs]
    assert digit.tolist() == [v % d for v in xs]
    after, fits = grid.forward(jnp.asarray(x), jnp.asarray(u))
    exact = [sign * (v // d) + w for v, w in zip(xs, us, strict=True)]
    half = 2 ** (bits - 1)
    assert fits.tolist() == [-half <= v < half for v in exact]
    # Also where the sum has wrapped: arithmetic modulo 2^bits is undone like any other.
    assert after.tolist() == [(v + half) % (2 * half) - half for v in exact]
    back, fits = grid.backward(after, jnp.asarray(u), digit)
    assert back.tolist() == xs and jnp.all(fits)


@each
@quick
@given(integers(32), integers(32))
def test_a_step_of_int32_is_undone(d, sign, xs, us):
    check_step(d, sign, 32, xs, us)


@pytest.mark.x64
@each
@quick
@given(integers(64), integers(64))
def test_a_step_of_int64_is_undone(d, sign, xs, us):
    check_step(d, sign, 64, xs, us)


@pytest.mark.parametrize("d, count", [(2, 32), (3, 20), (5, 13), (10, 9), (255, 4), (65536, 2)])
def test_a_word_holds_as_many_digits_as_fit(d, count):
    assert Grid(d, 1, 24).per_word == count
    assert d**count <= 2**32 < d ** (count + 1)


@pytest.mark.parametrize("d, guard", [*((d, 0) for d in BASES), (2, 8), (5, 4), (10, 16), (3, 3)])
def test_digits_pushed_are_popped(d, guard):
    """Across words, ending in, at and after the end of one; the largest digit in one entry."""
    grid = Grid(d, 1, 24, guard)
    digits, m, rng = Digits(None, grid), grid.per_word, np.random.default_rng(d)
    rows = rng.integers(-(2**31), 2**31, (2 * m + 1, 3)).astype(np.int32)
    rows[:, 0] = -1  # whose remainder is d - 1
    updates = rng.integers(-(2**20), 2**20, rows.shape).astype(np.int32)
    # As far off as the guard digits can correct, and by less.
    half = 2**guard // 2
    off = rng.integers(min(1 - half, 0), half + 1, rows.shape).astype(np.int32)
    off[:, 1] = half
    zero, beta = jnp.zeros(3, jnp.int32), grid.beta
    solver = deqjax.Reversible(beta=beta, guard_bits=guard)
    push = jax.jit(
        lambda tape, i, go, row, after: digits.push(solver, tape, i, go, (row, zero), after)
    )

    @jax.jit
    def undo(tape, words, i, first, after, update):
        fy = grid.value(update, "float32") / beta
        return digits.undo(solver, tape, words, i, first, (zero, after), fy, zero, 0)

    for steps in (m - 1, m, m + 1, 2 * m + 1):
        tape = digits.blank((zero, zero), len(rows), 0)
        pairs = [-(-len(rows) // 2)]
        words = {0: [], 3: pairs, 4: pairs}.get(guard, [len(rows)])
        assert [x.shape for x in tape.digits] == [(n, 3) for n in (3, *words)]
        afters = [grid.divide(jnp.asarray(x))[0] + u for x, u in zip(rows, updates, strict=True)]
        for i, row in enumerate(rows):
            tape = push(tape, i, jnp.asarray(i < steps), row, (zero, afters[i]))
        words = digits.words(tape, 0)
        for i in reversed(range(steps)):
            first = jnp.asarray(i == steps - 1)
            out, words, found = undo(tape, words, i, first, afters[i], updates[i] + off[i])
            assert out.tolist() == rows[i].tolist()
            assert found.guard == np.abs(off[i]).max() / max(half, 1)


def check_quantise(dtype, bits, values):
    grid = Grid(2, 1, bits)
    x = np.asarray(jnp.asarray(values, dtype), np.float64)
    state, places = ("int64", bits + 32) if dtype == "float64" else ("int32", bits)
    integer, fits = grid.quantise(jnp.asarray(x, dtype))
    assert integer.dtype == state
    half = 2 ** (jnp.iinfo(state).bits - 1)
    for v, got, ok in zip(x.tolist(), integer.tolist(), fits.tolist(), strict=True):
        finite = np.isfinite(v)
        # Scaling by a power of two is exact, in Python's floats too.
        exact = round(v * 2.0**places) if finite else None
        inside = finite and abs(exact) < half
        assert ok == inside
        assert got == (exact if inside else 0)
    back = np.asarray(grid.value(integer, dtype), np.float64)
    eps = float(jnp.finfo(dtype).eps)
    inside = np.asarray(fits)
    gap = np.abs(back - x)[inside]
    assert np.all(gap <= 2.0 ** -(places + 1) + eps * np.abs(x[inside]))


EDGES = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-30, 0.3, -0.7]


def quantise_all(dtype):
    for bits in (8, 24, 30):
        top = 2.0 ** (31 - bits)
        below = top * (1 - float(jnp.finfo(dtype).epsneg))
        # float16 ends below the range of 8 bits.
        top, below = (min(v, float(jnp.finfo(dtype).max)) for v in (top, below))
        values = [*EDGES, top, -top, below, -below, 1.5 * 2.0**-bits, 2.5 * 2.0**-bits]
        check_quantise(dtype, bits, values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_quantise(dtype):
    """The largest number below the range fits; the range itself, inf and NaN do not."""
    quantise_all(dtype)


@pytest.mark.x64
def test_quantise_float64():
    quantise_all("float64")


@quick
@given(st.lists(st.floats(-300, 300, width=32), **LENGTH))
@example([127.99999] * N)
def test_quantise_rounds_to_the_nearest(values):
    check_quantise("float32", 24, values)


BETAS = {
    0.5: (2, 1), 2 / 3: (3, 1), 0.75: (4, 1), 0.8: (5, 1), 0.9: (10, 1), 1.2: (5, -1),
    1.5: (2, -1), 4 / 3: (3, -1), 1.01: (100, -1), 1 - 1 / 1000: (1000, 1),
    np.float32(0.8): (5, 1), np.float32(2 / 3): (3, 1), 1 - 2.0**-16: (2**16, 1),
}  # fmt: skip


@pytest.mark.parametrize("beta", BETAS, ids=repr)
def test_betas_accepted(beta):
    solver = deqjax.Reversible(beta=beta)
    assert (solver.grid.d, solver.grid.sign) == BETAS[beta]
    assert np.isclose(solver.relaxation, float(beta), rtol=1e-6)


REFUSED = {
    0.3: "1/2 = 0.5 and 2/3 = 0.666667",
    0.6: "1/2 = 0.5 and 2/3 = 0.666667",
    0.7: "2/3 = 0.666667 and 3/4 = 0.75",
    0.123: "1/2 = 0.5 and 2/3 = 0.666667",
    1.3: "5/4 = 1.25 and 4/3 = 1.33333",
    1.9: "4/3 = 1.33333 and 3/2 = 1.5",
}


@pytest.mark.parametrize("beta, nearest", REFUSED.items(), ids=map(repr, REFUSED))
def test_betas_refused(beta, nearest):
    with pytest.raises(ValueError, match=f"the nearest are {nearest}.*exact=False"):
        deqjax.Reversible(beta=beta)
    assert deqjax.Reversible(beta=beta, exact=False).beta == beta


@pytest.mark.parametrize("bits", [7, 31, 0, -8, 24.0, "24"])
def test_fraction_bits_refused(bits):
    with pytest.raises(ValueError, match="fraction_bits to be an int from 8 to 30"):
        deqjax.Reversible(beta=0.5, fraction_bits=bits)
    for good in (8, 30):
        assert deqjax.Reversible(beta=0.5, fraction_bits=good).grid.bits == good


@pytest.mark.parametrize("bits", [-1, 1, 17, 8.0, "8", True])
def test_guard_bits_refused(bits):
    with pytest.raises(ValueError, match="guard_bits to be 0 or an int from 2 to 16"):
        deqjax.Reversible(beta=0.5, guard_bits=bits)


def half_products(z, w):
    return jnp.tanh((w.astype("bfloat16") @ z.astype("bfloat16")).astype(z.dtype))


SUITED = [
    ("float32", lambda z, w: jnp.tanh(w @ z), {}, (24, 8)),
    ("float32", lambda z, w: jnp.tanh(w @ z), {"fraction_bits": 20}, (20, 4)),
    ("float32", lambda z, w: jnp.tanh(w @ z), {"fraction_bits": 8}, (8, 3)),
    ("float32", lambda z, w: jnp.tanh(w @ z), {"guard_bits": 0}, (24, 0)),
    ("float32", half_products, {}, (18, 16)),
    ("float32", half_products, {"fraction_bits": 20}, (20, 16)),
    ("bfloat16", lambda z, w: jnp.tanh(w @ z), {}, (18, 16)),
    ("float16", lambda z, w: jnp.tanh(w @ z), {}, (20, 16)),
    ("float64", lambda z, w: jnp.tanh(w @ z), {}, (24, 16)),
    # The dtype of a complex number's parts.
    ("float32", lambda z, w: jnp.fft.ifft(jnp.fft.fft(z)).real, {}, (24, 8)),
    ("float64", lambda z, w: jnp.fft.ifft(jnp.fft.fft(z)).real, {}, (24, 16)),
    # 2^-17 in float32 is 2^39 units of a float64 state.
    (
        "float64",
        lambda z, w: (w.astype("float32") @ z.astype("float32")).astype(z.dtype),
        {},
        (24, 0),
    ),
]


@pytest.mark.x64
@pytest.mark.parametrize("dtype, fn, given, expected", SUITED)
def test_bits_suit_the_least_precise_dtype_of_f(dtype, fn, given, expected):
    z, w = jnp.ones(3, dtype), jnp.ones((3, 3), dtype)
    traced = lambda z, w: (fn(z, w), None)
    solver = deqjax.Reversible(beta=0.5, **given).prepared(traced, z, w, 0)
    assert (solver.fraction_bits, solver.guard_bits) == expected


ROUNDED = {None: (20, 16), "default": (20, 16), "high": (20, 16), "highest": (24, 8)}
ROUNDED |= {"F32_F32_F32": (24, 8)}


@pytest.mark.x64
@pytest.mark.parametrize("precision, expected", ROUNDED.items(), ids=str)
def test_products_that_a_platform_rounds_count_as_half(monkeypatch, precision, expected):
    """As on a GPU or a TPU; products of float64 are not rounded there."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fn = lambda z, w: (jnp.tanh(jnp.matmul(w, z, precision=precision)), None)
    bits = lambda dtype: dataclasses.astuple(
        deqjax.Reversible(beta=0.5)
        .prepared(fn, jnp.ones(3, dtype), jnp.ones((3, 3), dtype), 0)
        .grid
    )[2:4]
    assert bits("float32") == expected
    if precision != "F32_F32_F32":
        assert bits("float64") == (24, 16)

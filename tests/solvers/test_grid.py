"""The integers of the reversible iteration, against Python's."""

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
    assert grid.backward(after, jnp.asarray(u), digit).tolist() == xs


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


@pytest.mark.parametrize("d", BASES)
def test_digits_pushed_are_popped(d):
    """Across words, ending in, at and after the end of one; the largest digit in one entry."""
    grid = Grid(d, 1, 24)
    digits, m, rng = Digits(grid), grid.per_word, np.random.default_rng(d)
    rows = rng.integers(-(2**31), 2**31, (2 * m + 1, 3)).astype(np.int32)
    rows[:, 0] = -1  # whose remainder is d - 1
    zero, solver = jnp.zeros(3, jnp.int32), deqjax.Reversible(beta=grid.beta)
    push = jax.jit(lambda tape, i, go, row: digits.push(tape, i, go, (row, zero)))
    undo = jax.jit(
        lambda tape, words, i, first, after: digits.undo(
            solver, tape, words, i, first, (zero, after), jnp.zeros(3), zero, 0
        )
    )
    for steps in (m - 1, m, m + 1, 2 * m + 1):
        tape = digits.blank((zero, zero), len(rows), 0)
        assert tape.shape == (3, 3)
        for i, row in enumerate(rows):
            tape = push(tape, i, jnp.asarray(i < steps), row)
        words = digits.words(tape, 0)
        for i in reversed(range(steps)):
            after = grid.divide(jnp.asarray(rows[i]))[0]
            first = jnp.asarray(i == steps - 1)
            out, words, _ = undo(tape, words, i, first, after)
            assert out.tolist() == rows[i].tolist()


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


def test_beta_has_to_be_known():
    with pytest.raises(ValueError, match="beta to be a Python float.*exact=False"):
        deqjax.Reversible(beta=jnp.asarray(0.8))


@pytest.mark.parametrize("bits", [7, 31, 0, -8, 24.0, "24", None])
def test_fraction_bits_refused(bits):
    with pytest.raises(ValueError, match="fraction_bits to be an int from 8 to 30"):
        deqjax.Reversible(beta=0.5, fraction_bits=bits)
    for good in (8, 30):
        assert deqjax.Reversible(beta=0.5, fraction_bits=good).grid.bits == good

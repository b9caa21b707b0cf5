"""Eager calls: fn is read at each, its arrays die with it, programs are found by what it does."""

import dataclasses
import functools
import gc
import itertools
import pathlib
import types
from collections import OrderedDict
from collections.abc import Callable

import equinox as eqx
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import deqjax
from deqjax import nn
from deqjax._program import _programs
from deqjax._traced import trace

KEY = jax.random.key(0)
Z, X = np.full(3, 0.1, np.float32), np.ones(3, np.float32)
PICARD = deqjax.FixedPointIteration(rtol=1e-6)
EXACT = deqjax.Reversible()
compilations = []


@jax.monitoring.register_event_duration_secs_listener
def _(name, _, **__):
    if name.endswith("backend_compile_duration"):
        compilations.append(name)


class Module(eqx.Module):
    fn: Callable

    def __call__(self, z, x):
        return self.fn(z, x)


# Every entry point, as a function of fn; the first of what it returns tells what fn was.
ENTRIES = {
    "fixed_point": lambda fn: deqjax.fixed_point(fn, PICARD, Z, X).value,
    "fixed_point_path": lambda fn: deqjax.fixed_point_path(fn, PICARD, Z, X, indices=(3,))[1].value,
    "DEQ": lambda fn: nn.DEQ(Module(fn), PICARD, deqjax.ImplicitAdjoint())(X)[0],
    "implicit_vjp": lambda fn: deqjax.implicit_vjp(fn, Z, X, X)[0][1],
    "reversible_vjp": lambda fn: deqjax.reversible_vjp(fn, EXACT, Z, X, X, max_steps=4)[0][1],
    "spectral_radius": lambda fn: deqjax.spectral_radius(fn, Z, X, key=KEY, max_steps=4).value,
    "jacobian_frobenius": lambda fn: deqjax.jacobian_frobenius(fn, Z, X, key=KEY),
    "certify": lambda fn: deqjax.certify(fn, Z, X).upper,
    "check_hypotheses": lambda fn: (
        deqjax.positive.check_hypotheses(fn, X, z=Z, key=KEY, samples=2).exists.witness
    ),
}
every_entry = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


class Cell:
    def __init__(self, w):
        self.w = w

    def step(self, z, x):
        return jnp.tanh(self.w * z + x)


@dataclasses.dataclass  # compared by value, and so not hashable
class Plain:
    w: float

    def __call__(self, z, x):
        return jnp.tanh(self.w * z + x)


scale = 0.5


def reads_a_global(z, x):
    return jnp.tanh(scale * z + x)


def changing():
    """`set(w)` and a function that reads w, in each of four ways."""
    cell, plain, w = Cell(0.5), Plain(0.5), 0.5

    def of_closure(z, x):
        return jnp.tanh(w * z + x)

    def set_closure(value):
        nonlocal w
        w = value

    return {
        "bound method": (lambda w: setattr(cell, "w", w), lambda: cell.step),
        "global": (lambda w: globals().__setitem__("scale", w), lambda: reads_a_global),
        "closure": (set_closure, lambda: of_closure),
        "dataclass": (lambda w: setattr(plain, "w", w), lambda: plain),
    }


@every_entry
@pytest.mark.parametrize("way", ["bound method", "global", "closure", "dataclass"])
def test_fn_is_read_at_every_call(entry, way):
    set_w, fn = changing()[way]
    got = []
    for w in (0.5, 0.25, 0.5):
        set_w(w)
        got.append(np.asarray(entry(fn())))
        fresh = entry(lambda z, x, w=w: jnp.tanh(w * z + x))
        np.testing.assert_array_equal(got[-1], fresh)
    assert np.any(got[0] != got[1])
    np.testing.assert_array_equal(got[0], got[2])


def test_gradient_of_what_a_bound_method_reads():
    """z = tanh(w z + 1): dz/dw = z (1 - z^2) / (1 - w (1 - z^2)), before and after a first call."""
    cell = Cell(0.5)
    solve = lambda: deqjax.fixed_point(cell.step, deqjax.Anderson(rtol=1e-6), 0.0, 1.0).value

    def loss(w):
        cell.w = w
        return solve()

    for w in (0.5, 0.9, 0.3):
        z, slope = loss(w), jax.grad(loss)(w)
        assert abs(z - jnp.tanh(w * z + 1)) < 1e-6
        s = 1 - z**2
        assert abs(slope - z * s / (1 - w * s)) < 1e-5


@every_entry
def test_a_new_lambda_of_the_same_body_compiles_nothing(entry):
    """Nor new arrays behind it; `jax.nn.relu6` has a derivative rule, which is compared too."""

    def call(i):
        w = jnp.asarray(0.1 * i, jnp.float32)
        b = jnp.full(3, 0.1 * i)
        return jax.block_until_ready(entry(lambda z, x: jax.nn.relu6(w * jnp.tanh(z) + x + b)))

    call(1)
    before = len(compilations)
    for i in range(2, 5):
        call(i)
    # A 0-d array or a fill may be compiled by the test itself, once; nothing of the solve may.
    assert len(compilations) == before


def test_the_gradient_of_a_new_lambda_compiles_nothing():
    def slope(i):
        w = jnp.full(3, 0.1 * i)
        solve = lambda w: deqjax.fixed_point(lambda z, x: jnp.tanh(w * z + x), PICARD, Z, X).value
        return jax.block_until_ready(jax.grad(lambda w: jnp.sum(solve(w)))(w))

    slope(1)
    before = len(compilations)
    for i in range(2, 5):
        slope(i)
    assert len(compilations) == before


def test_the_certificate_of_a_layer_compiles_once():
    deq = nn.DEQ(nn.PositiveConcaveLinear(3, key=KEY), PICARD, deqjax.ImplicitAdjoint())
    xs = jnp.ones((2, 3))
    zs, _ = deq.batch(xs)
    jax.block_until_ready(deq.certify(xs, zs, batched=True))
    before = len(compilations)
    jax.block_until_ready(deq.certify(xs, zs, batched=True))
    assert len(compilations) == before


@every_entry
def test_arrays_live_no_longer_than_the_closure(entry):
    """Closed over directly, by a nested `jax.jit`, and in a gradient."""

    def call(i):
        w = jnp.full((40, 40), 1e-4 * (i + 1))
        inner = jax.jit(lambda z: jnp.sum(w) * z)
        fn = lambda z, x: jnp.tanh(w[:3, :3] @ z + inner(z) + x)
        jax.block_until_ready(entry(fn))

    def gradient(i):
        w = jnp.full((3, 40), 1e-4 * (i + 1))
        solve = lambda w: deqjax.fixed_point(lambda z, x: jnp.tanh(w[:, :3] @ z + x), PICARD, Z, X)
        jax.block_until_ready(jax.grad(lambda w: jnp.sum(solve(w).value))(w))

    for f in (call, gradient):
        f(0)
        f(1)  # JAX 0.12 may keep what it has seen last
        gc.collect()
        before = len(jax.live_arrays())
        for i in range(2, 7):
            f(i)
        gc.collect()
        assert len(jax.live_arrays()) == before


def maps():
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


def test_a_program_that_cannot_be_found_again_dies():
    """A derivative rule that closes over an array is another one at each call."""

    def call(i):
        @jax.custom_jvp
        def own(z):
            return jnp.tanh(z)

        w = jnp.full((40, 40), 1.0 + i)
        own.defjvp(lambda p, t: (own(p[0]), t[0] * w[0, 0]))
        jax.block_until_ready(deqjax.fixed_point(lambda z, x: own(0.5 * z + x), PICARD, Z, X))

    call(0)
    gc.collect()
    held, programs, arrays = maps(), list(_programs), len(jax.live_arrays())
    for i in range(1, 9):
        call(i)
    gc.collect()
    assert maps() - held < 50
    assert list(_programs) == programs
    assert len(jax.live_arrays()) == arrays


def test_programs_are_bounded(monkeypatch):
    """Another constant is another program; the one used least recently goes."""
    programs = OrderedDict()
    monkeypatch.setattr("deqjax._program._programs", programs)
    monkeypatch.setattr("deqjax._program._MOST", 3)
    fixed = deqjax.FixedPointIteration(rtol=0, atol=0)
    call = lambda c: deqjax.fixed_point(lambda z, x: z * 0.1 + c, fixed, Z, X, max_steps=1)
    for c in (1.0, 2.0, 3.0):
        call(c)
    first, second, third = programs
    call(1.0)
    assert list(programs) == [second, third, first]
    call(4.0)
    assert list(programs)[:2] == [third, first] and len(programs) == 3


def test_one_program_under_jit_for_all_its_uses():
    """It is traced and lowered once, whichever way it is called."""
    step = Cell(0.7).step
    solve = lambda x: deqjax.fixed_point(step, PICARD, Z, x).value
    once = jax.jit(solve).lower(X).as_text()
    often = jax.jit(lambda x: solve(solve(solve(solve(x))))).lower(X).as_text()
    assert often.count("stablehlo.while") == once.count("stablehlo.while")


def test_a_rule_that_raises_is_for_who_differentiates():
    def back(_, g):
        raise NotImplementedError("no gradient of this operation")

    fn = jax.custom_vjp(jnp.tanh)
    fn.defvjp(lambda z: (jnp.tanh(z), z), back)
    sol = deqjax.fixed_point(lambda z, x: fn(0.5 * z + x), PICARD, Z, X)
    np.testing.assert_allclose(sol.value, jnp.tanh(0.5 * sol.value + X), rtol=1e-5)


def norms():
    """A norm of which only what it reads changes, in four ways, and how that is set."""
    box = types.SimpleNamespace(scale=1.0)

    class Norm(eqx.Module):
        box: object

        def __call__(self, tree):
            return self.box.scale * optimistix.max_norm(tree)

    module = types.ModuleType("configuration")
    by_global = eval("lambda tree: conf.scale * max_norm(tree)",
                     {"conf": module, "max_norm": optimistix.max_norm})  # fmt: skip
    closure = lambda tree: box.scale * optimistix.max_norm(tree)
    wrapped = functools.wraps(optimistix.max_norm)(closure)
    return [(box, closure), (box, wrapped), (box, Norm(box)), (module, by_global)]


@pytest.mark.parametrize("i", range(4))
def test_what_a_norm_reads_is_read_at_every_call(i):
    where, norm = norms()[i]
    solver = deqjax.FixedPointIteration(rtol=1e-4, atol=0.0, norm=norm)
    steps = []
    for where.scale in (1.0, 1e4):
        sol = deqjax.fixed_point(lambda z, x: 0.5 * z + x, solver, jnp.ones(3), 1.0)
        steps.append(int(sol.stats["num_steps"]))
    assert steps[1] > steps[0]


def test_static_parts_of_aux_are_told_apart():
    class Aux(eqx.Module):
        flag: object = eqx.field(static=True)

    for flag in (True, 1, 1.0, 0.0, -0.0):
        fn = lambda z, x, flag=flag: (0.5 * z + x, Aux(flag))
        aux = deqjax.fixed_point(fn, PICARD, Z, X, has_aux=True).aux
        assert repr(aux.flag) == repr(flag)


def with_rule(scale):
    @jax.custom_jvp
    def f(z):
        return jnp.sin(z)

    f.defjvp(lambda p, t: (f(p[0]), scale * t[0] * jnp.cos(p[0])))
    return f


def with_vjp(back):
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda z: (jnp.sin(z), z), back)
    return f


def calls_back(host):
    return lambda z: jax.pure_callback(host, jax.ShapeDtypeStruct(z.shape, z.dtype), z)


def scanned(length, unroll=1):
    step = lambda c, _: (jnp.tanh(c), None)
    return lambda z: jax.lax.scan(step, z, None, length=length, unroll=unroll)[0]


W = np.linspace(0.1, 0.9, 9, dtype=np.float32).reshape(3, 3)
dot = lambda precision: lambda z: jnp.dot(W, z, precision=precision)


def masked(scale):
    """A function whose derivative rule multiplies with an integer operand."""
    f = jax.custom_vjp(lambda z, mask: jnp.sin(z))
    back = lambda mask, g: (g * (scale * mask.astype(g.dtype)), None)
    f.defvjp(lambda z, mask: (jnp.sin(z), mask), back)
    return lambda z: f(z, jnp.asarray([1, 0, 1]))


through = lambda dtype: lambda z: z.astype(dtype).astype(z.dtype)
either = lambda one, other: lambda z: jax.lax.cond(z[0] > 0, one, other, z)
divided = lambda by: lambda z: jax.lax.fori_loop(0, 2, lambda _, c: c / by, z)
noisy = lambda seed: lambda z: z + jax.random.normal(jax.random.key(seed), (3,))
PAIRS = [
    (lambda z: 0.5 * z, lambda z: 0.25 * z),
    (lambda z: 0.0 * z, lambda z: -0.0 * z),
    (lambda z: z + jnp.inf, lambda z: z + jnp.nan),
    (lambda z: z + z, lambda z: z - z),
    (lambda z: z * 2, lambda z: z + z),
    (lambda z: jnp.exp(z) - z, lambda z: z - jnp.exp(z)),
    (jnp.sin, jnp.cos),
    (jnp.sort, lambda z: -jnp.sort(-z)),
    (lambda z: z**2, lambda z: z**3),
    (lambda z: z[::-1], lambda z: z),
    (jnp.cumsum, lambda z: jax.lax.cumsum(z, reverse=True)),
    (jnp.flip, lambda z: jnp.roll(z, 1)),
    (lambda z: jnp.roll(z, 1), lambda z: jnp.roll(z, 2)),
    (lambda z: z.at[0].set(1.0), lambda z: z.at[1].set(1.0)),
    (lambda z: z.at[0].set(1.0), lambda z: z.at[0].add(1.0)),
    (through(jnp.bfloat16), through(jnp.float16)),
    (lambda z: jnp.where(z > 0, z, 0), lambda z: jnp.where(z >= 0, z, 0)),
    (lambda z: jnp.max(z) + z, lambda z: jnp.min(z) + z),
    (lambda z: W @ z, lambda z: z @ W),
    (dot("highest"), dot("default")),
    (scanned(2), scanned(3)),
    (scanned(4), scanned(4, unroll=2)),
    (either(jnp.sin, jnp.cos), either(jnp.cos, jnp.sin)),
    (divided(2), divided(3)),
    (jax.nn.relu, lambda z: jnp.maximum(z, 0)),
    (with_rule(1.0), with_rule(2.0)),
    (with_rule(1.0), jnp.sin),
    (with_vjp(lambda z, g: (g * jnp.cos(z),)), with_vjp(lambda z, g: (jnp.sin(z) * jnp.cos(z),))),
    (with_vjp(lambda z, g: (g * jnp.cos(z),)), with_vjp(lambda z, g: (g,))),
    (masked(1.0), masked(2.0)),
    (calls_back(np.sin), calls_back(np.cos)),
    (calls_back(lambda z: z), calls_back(lambda z: z + 1)),
    (noisy(0), noisy(1)),
    (lambda z: jax.lax.stop_gradient(z), lambda z: z),
    (jax.checkpoint(jnp.sin), jnp.sin),
    (jax.jit(lambda z: z * 2), jax.jit(lambda z: z * 3)),
]


def body(fn, z=Z):
    return trace(fn, jnp.asarray(z)).body


@pytest.mark.parametrize("pair", PAIRS)
def test_different_functions_share_no_program(pair):
    one, other = map(body, pair)
    assert one != other


def test_dtypes_shapes_and_weak_types_share_no_program():
    double = lambda z: z + z
    inputs = [Z, Z.astype(np.float16), Z.astype(jnp.bfloat16), Z[:2], Z[None], Z.astype(np.int32)]
    bodies = [body(double, z) for z in inputs] + [trace(double, jnp.asarray(2.0)).body]
    bodies.append(trace(double, jnp.asarray(2.0, jnp.float32)).body)
    assert all(a != b for a, b in itertools.combinations(bodies, 2))

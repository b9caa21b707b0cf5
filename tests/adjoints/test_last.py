"""`last=K`: the gradient of the last K steps, as if there were a `stop_gradient` before them."""

import collections
import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import ways
from jax.sharding import AxisType, PartitionSpec as P
from problems import noisy, nothing_but_nan, relative_error
from registry import slow

import deqjax
from deqjax.adjoints.reversible._tape import _checksum

N, BATCH, STEPS = 4, 8, 12
cell = lambda z, a: jnp.tanh(a[0] @ z + a[1])
cells = lambda z, a: jax.vmap(cell, (0, (None, 0)))(z, a)
still = jax.lax.stop_gradient
Reversed, Stored = deqjax.ReversibleAdjoint, deqjax.RecursiveCheckpointAdjoint

# Adjoint and options of the solver.
KINDS = {
    "exact": (Reversed, {}),
    "isolated": (Reversed, {"guard_bits": 0}),
    "float": (Reversed, {"exact": False}),
    "short": (ft.partial(Reversed, segment=3), {"exact": False}),
    "stored": (Stored, {}),
}


def problem(dtype=jnp.float32, batch=()):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return (draw(N, N) / 2, draw(*batch, N)), draw(*batch, N), draw(*batch, N)


def solver(beta=0.75, tol=0.0, **options):
    return deqjax.Reversible(rtol=tol, atol=tol, beta=beta, **options)


def steps(args, z0, beta, n, last):
    """The real recurrence, with the gradient stopped where the last steps begin."""
    past = now = z0
    for k in range(n):
        early = k < n - last
        a, b, past, now = still((args, beta, past, now)) if early else (args, beta, past, now)
        past, now = now, (1 - b) * past + b * cell(now, a)
    return still(now) if last < 1 else now


@pytest.mark.parametrize("kind", ["exact", slow("isolated"), "float", slow("short"), "stored"])
@pytest.mark.parametrize("last", [1, 5, slow(2), slow(STEPS), 30])
def test_it_is_stop_gradient(kind, last):
    """Both modes and second derivatives, by args, z0 and a beta per channel."""
    adjoint, options = KINDS[kind]
    args, z0, g = problem()
    at = (args, z0, jnp.full(N, 0.75))

    def solve(args, z0, beta):
        s = solver(beta, **options)
        how = dict(max_steps=STEPS, adjoint=adjoint(last=last))
        return deqjax.fixed_point(cell, s, z0, args, **how).value

    def derivatives(value):
        loss = lambda at: g @ jnp.sin(value(*at))
        first, second = jax.jvp(jax.grad(loss), (at,), (at,))
        return first, second, jax.jvp(loss, (at,), (at,))[1]

    found = jax.jit(lambda: derivatives(solve))()
    truth = jax.jit(lambda: derivatives(lambda a, z, b: steps(a, z, b, STEPS, last)))()
    assert relative_error(found, truth) < 1e-5
    assert jnp.any(found[0][1] != 0) == (last >= STEPS)


@pytest.mark.parametrize("way", ways.WAYS.values(), ids=ways.WAYS)
@pytest.mark.parametrize("kind", ["exact", slow("float"), slow("stored")])
def test_under_every_transformation(way, kind):
    adjoint, options = KINDS[kind]
    args, z0, g = problem(batch=(BATCH,))

    def solve(args, z0, batched):
        fn, s = cells if batched else cell, solver(**options)
        how = dict(max_steps=STEPS, adjoint=adjoint(last=5), batched=batched)
        return deqjax.fixed_point(fn, s, z0, args, **how).value

    one = lambda w, x, z: steps((w, x), z, 0.75, STEPS, 5)
    each = lambda w, x: jax.vmap(one, (None, 0, 0))(w, x, z0)
    truth = jax.vjp(each, args[0], args[1])[1](g)
    assert relative_error(way(solve, args, z0, g), truth) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_every_number_of_steps(kind):
    """`steps` is traced, and differs within the batch; 0 steps are those of z0 itself."""
    adjoint, options = KINDS[kind]
    args, z0, g = problem(batch=(BATCH,))
    traces = collections.Counter()

    @jax.jit
    def run(budget):
        traces["run"] += 1

        def solve(args, z0):
            how = dict(max_steps=20, steps=budget, adjoint=adjoint(last=5), batched=True)
            return deqjax.fixed_point(cells, solver(**options), z0, args, **how).value

        return jax.vjp(solve, args, z0)[1](g)

    ended = lambda n, w, x, z: steps((w, x), z, 0.75, n, 5)
    for budget in [0, 3, 5, 6, 7, 12, 19, 20], [20] * 8, [0] * 8, [4, 9] * 4:
        (d_w, d_x), d_z0 = run(jnp.asarray(budget))
        pulls = [
            jax.vjp(ft.partial(ended, n), args[0], x, z)[1](h)
            for n, x, z, h in zip(budget, args[1], z0, g, strict=True)
        ]
        w, x, z = (jnp.stack(parts) for parts in zip(*pulls, strict=True))
        assert relative_error((d_x, d_z0, 1 + d_w), (x, z, 1 + jnp.sum(w, 0))) < 1e-5
        assert [bool(jnp.any(d)) for d in d_z0] == [n <= 5 for n in budget]
    assert traces["run"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_tolerance(kind):
    """Each problem of a batch stops by itself, and has the gradient that it has alone."""
    adjoint, options = KINDS[kind]
    args, z0, g = problem(batch=(BATCH,))
    xs = args[1] * jnp.arange(BATCH, dtype=jnp.float32)[:, None]

    def run(fn, x, z0, g, batched):
        def solve(x):
            s = solver(tol=1e-3, **options)
            how = dict(max_steps=60, adjoint=adjoint(last=4), batched=batched)
            sol = deqjax.fixed_point(fn, s, z0, (args[0], x), **how)
            return sol.value, sol.stats["num_steps"]

        value, pull, n = jax.vjp(solve, x, has_aux=True)
        return value, n, pull(g)[0]

    value, n, d_x = run(cells, xs, z0, g, True)
    assert len(set(n.tolist())) > 3
    for i in range(BATCH):
        alone = run(cell, xs[i], z0[i], g[i], False)
        assert alone[1] == n[i]
        truth = jax.vjp(lambda x, i=i: steps((args[0], x), z0[i], 0.75, int(n[i]), 4), xs[i])
        assert relative_error(d_x[i], truth[1](g[i])[0]) < 1e-5
        assert relative_error((value[i], d_x[i]), (alone[0], alone[2])) < 1e-6


def counted():
    """A cell, and how often it and its derivative are evaluated."""
    count = collections.Counter()

    def note(name, x):
        jax.debug.callback(lambda _: count.update([name]), x)

    @jax.custom_vjp
    def seen(z):
        note("f", z)
        return z

    def forward(z):
        note("f", z)
        return z, None

    def backward(_, g):
        note("vjp", g)
        return (g,)

    seen.defvjp(forward, backward)
    return (lambda z, a: jnp.tanh(seen(z) @ a[0].T + a[1])), count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [[STEPS] * 8, [2, 5, 3, 9, 12, 7, 4, 1]], ids=["all", "each"])
def test_the_cost_is_that_of_the_last_steps(kind, budget):
    """Reversed steps are counted: K for any depth, also of a batch that stops apart."""
    adjoint, options = KINDS[kind]
    args, z0, g = problem(batch=(BATCH,))
    fn, count = counted()

    @jax.jit
    def forwards(args):
        per = None if min(budget) == STEPS else jnp.asarray(budget)
        how = dict(max_steps=STEPS, steps=per, adjoint=adjoint(last=4), batched=True)
        solve = lambda a: deqjax.fixed_point(fn, solver(**options), z0, a, **how).value
        return jax.vjp(solve, args)

    _, pull = jax.block_until_ready(forwards(args))
    jax.effects_barrier()
    assert count == {"f": STEPS + 1}  # and one at the solution
    count.clear()
    jax.block_until_ready(jax.jit(pull)(g))
    jax.effects_barrier()
    assert count["vjp"] == 4
    assert count["f"] == {"isolated": 8, "stored": 8}.get(kind, 4)


def test_memory_does_not_depend_on_the_depth():
    """The record is as long as the last steps."""
    args, z0, g = problem(batch=(BATCH,))

    def bytes_of(max_steps, **last):
        solve = lambda a: deqjax.fixed_point(
            cells, solver(), z0, a, max_steps=max_steps, batched=True, adjoint=Reversed(**last)
        ).value  # fmt: skip
        run = jax.jit(lambda a: jax.vjp(solve, a)[1](g)).lower(args).compile()
        return run.memory_analysis().temp_size_in_bytes

    assert abs(bytes_of(16, last=8) - bytes_of(4096, last=8)) < 256
    assert bytes_of(4096) > 10 * bytes_of(4096, last=8)


def test_a_failed_reversal_is_caught():
    """By the checksum of the state before the last steps; errors before them do no harm."""
    args, z0, g = problem()
    run = lambda fn, n=15, **options: deqjax.reversible_vjp(
        fn, solver(**options), z0, args, g, max_steps=n, adjoint=Reversed(last=6)
    )
    _, quiet = run(cell)
    assert quiet["reversal_residual"] == 0 and quiet["trusted"]
    for fn, options in (noisy(1e-3), {}), (noisy(1e-6), {"guard_bits": 0}):
        found, stats = run(fn, **options)
        assert not stats["trusted"] and nothing_but_nan(found[:2])
        assert stats["reversal_residual"] == jnp.inf
        found, stats = run(fn, 6, **options)  # no step before them: compared with z0
        assert 0 < stats["reversal_residual"] < jnp.inf
    _, stats = run(noisy(1e-7))
    assert stats["trusted"] and 0 < stats["guard"] < 1


def test_a_failed_reversal_in_floating_point():
    """Of a segment within the last steps; and stored states keep the others accurate."""
    args, z0, g = problem()
    adjoint = Reversed(segment=2, last=6)
    run = lambda fn, **how: deqjax.reversible_vjp(
        fn, solver(exact=False, **how), z0, args, g, max_steps=15, adjoint=adjoint
    )
    found, stats = run(noisy(0.1))
    assert not stats["trusted"] and nothing_but_nan(found[:2])
    # Without its stored states a reversal of 25 steps at 1 - beta = 1/10 is lost.
    how = dict(max_steps=60, adjoint=Reversed(segment=4, last=25))
    s = solver(0.9, exact=False)
    found, stats = deqjax.reversible_vjp(cell, s, z0, args, g, **how)
    truth = jax.vjp(lambda a: steps(a, z0, 0.9, 60, 25), args)[1](g)
    assert stats["trusted"] and relative_error(found[1], truth[0]) < 1e-3


def test_a_failure_is_raised():
    args, z0, g = problem()
    adjoint = Reversed(on_failure="raise", last=6)
    with pytest.raises(eqx.EquinoxRuntimeError, match="before the last K steps"):
        out = deqjax.reversible_vjp(
            noisy(1e-3), solver(), z0, args, g, max_steps=15, adjoint=adjoint
        )
        jax.block_until_ready(out)


@pytest.mark.x64
@pytest.mark.parametrize("method", [deqjax.Anderson, deqjax.Broyden])
@pytest.mark.parametrize("tol", [0.0, 1e-6])
def test_solvers_that_remember(method, tol):
    """Their memory is kept where another loop goes on from it, also in a batch that stops apart."""
    args, z0, g = problem(jnp.float64, (3,))
    xs = args[1] * jnp.asarray([0.1, 1.0, 3.0])[:, None]
    budget = jnp.asarray([3, 5, 8]) if tol == 0 else None

    def run(last, batched):
        def solve(w, x, z, n):
            fn, how = cells if batched else cell, dict(max_steps=30, steps=n, batched=batched)
            sol = deqjax.fixed_point(
                fn, method(tol, tol), z, (w, x), adjoint=Stored(last=last), **how
            )
            return sol.value, sol.stats

        def each(w, x):
            if batched:
                return solve(w, x, z0, budget)
            return jax.vmap(solve, (None, 0, 0, None if budget is None else 0))(w, x, z0, budget)

        value, pull, stats = jax.vjp(each, args[0], xs, has_aux=True)
        return value, pull(g), stats

    value, _, stats = jax.jit(ft.partial(run, None, True))()
    together, d_together, found = jax.jit(ft.partial(run, 2, True))()
    apart, d_apart, _ = jax.jit(ft.partial(run, 2, False))()
    assert len(set(stats["num_steps"].tolist())) > 1
    np.testing.assert_array_equal(found["num_steps"], stats["num_steps"])
    np.testing.assert_allclose(together, value, rtol=1e-9)
    np.testing.assert_allclose(found["residual"], stats["residual"], rtol=1e-3, atol=1e-12)
    assert relative_error(d_together, d_apart) < 1e-6
    assert relative_error(together, apart) < 1e-9


def test_devices_that_stop_at_different_steps():
    """In a shard_map, f closing over what devices share: all take part in each of its sums."""
    args, z0, g = problem(batch=(BATCH,))
    xs = args[1] * jnp.arange(BATCH, dtype=jnp.float32)[:, None]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    many = lambda w: lambda z, x: jnp.tanh(z @ w.T + x)

    def pulled(w, x, z, g):
        how = dict(max_steps=60, batched=True, adjoint=Reversed(last=3))
        value = lambda w: deqjax.fixed_point(many(w), solver(tol=1e-3), z, x, **how).value
        return jax.vjp(value, w)[1](g)[0]

    split = (P(), *3 * (P("data"),))
    apart = jax.shard_map(pulled, mesh=mesh, in_specs=split, out_specs=P())
    truth = jax.jit(pulled)(args[0], xs, z0, g)
    assert relative_error(jax.jit(apart)(args[0], xs, z0, g), truth) < 1e-5


def test_a_tolerance_is_found_by_a_first_run():
    """Stored steps of a solve with a tolerance are taken twice."""
    args, z0, _ = problem(batch=(1,))
    fn, count = counted()
    evaluations = []
    for last in None, 2:
        how = dict(max_steps=60, batched=True, adjoint=Stored(last=last))
        sol = deqjax.fixed_point(fn, solver(tol=1e-3), z0, args, **how)
        jax.block_until_ready(sol.value)
        jax.effects_barrier()
        evaluations.append(count["f"])
        count.clear()
    n = int(sol.stats["num_steps"][0])
    assert evaluations[1] - evaluations[0] == n


def test_an_early_step_that_is_not_reproducible():
    args, z0, g = problem()
    calls = collections.Counter()

    def draw(z):
        calls["f"] += 1
        return np.float32(calls["f"] <= 5)

    def fn(z, a):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return cell(z, a) + jax.pure_callback(draw, shape, still(z))

    options = dict(max_steps=15, adjoint=Reversed(last=6))
    _, stats = deqjax.reversible_vjp(fn, solver(), z0, args, g, **options)
    assert stats["reversal_residual"] == 0


@pytest.mark.x64
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_the_checksum_tells_states_apart(dtype):
    """Also those whose errors share a factor, or cancel in a sum."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-(2**30), 2**30, (5, 6)).astype(dtype) for _ in range(2))
    of = jax.jit(lambda *pair: _checksum(pair))
    assert of(a, b) == of(a.copy(), b.copy())
    others = [(b, a), (a, a), (b, b), (a[::-1], b), (a, b[:, ::-1]), (a + 1, b - 1), (-a, b)]
    for power in range(31):
        e = np.zeros_like(a)
        e[0, 0], e[1, 1] = 2**power, -(2**power)
        others += [(a + e, b), (a + e, b - e), (a + abs(e), b)]
    found = {int(of(*pair)) for pair in others}
    assert len(found) == len(others) and int(of(a, b)) not in found


@pytest.mark.x64
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_every_dtype_and_a_pytree(dtype):
    args, z0, g = problem(dtype)
    fn = lambda z, a: {"z": cell(z["z"], a), "y": [0.5 * jnp.cos(z["y"][0])]}
    whole = lambda z: {"z": z, "y": [z[:3].astype(jnp.float32)]}
    options = dict(max_steps=40, adjoint=Reversed(last=7))
    found, stats = deqjax.reversible_vjp(fn, solver(), whole(z0), args, whole(g), **options)
    assert stats["reversal_residual"] == 0
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("last", [1, 5, 30])
@pytest.mark.parametrize("kind", ["exact", "stored", "theirs"])
def test_through_optimistix(kind, last):
    """Our solver by their loop, and theirs by ours."""
    args, z0, g = problem()
    adjoint = (Reversed if kind == "exact" else Stored)(last=last)
    s = optimistix.FixedPointIteration(1e-12, 1e-12) if kind == "theirs" else solver()
    beta = 1.0 if kind == "theirs" else 0.75

    def run(door):
        options = dict(max_steps=9, adjoint=adjoint, throw=False)
        solve = lambda a, z0: door(cell, s, z0, a, **options).value
        return jax.jit(lambda a, z0: jax.vjp(solve, a, z0)[1](g))(args, z0)

    truth = jax.vjp(lambda a, z0: steps(a, z0, beta, 9, last), args, z0)[1](g)
    assert relative_error(run(optimistix.fixed_point), truth) < 1e-5
    assert relative_error(run(deqjax.fixed_point), truth) < 1e-5


def test_the_best_iterate():
    """If the steps run out, its own last steps are differentiated."""
    args, z0, g = problem()
    factors = jnp.asarray([0.5, 0.5, 0.5, 0.9, 1.0, 1.1, 2.0, 3.0])

    def fn(z, a, step):
        return z + factors[step] * jnp.tanh(a[1] - z) + 0 * a[0][0]

    def solve(args):
        picard = deqjax.FixedPointIteration(1e-9, 1e-9)
        options = dict(max_steps=7, indexed=True, adjoint=Stored(last=2))
        sol = deqjax.fixed_point(fn, picard, z0, args, **options)
        return sol.value, sol.value

    def stopped(args):
        z = z0
        for k in range(int(n)):
            a, z = still((args, z)) if k < n - 2 else (args, z)
            z = fn(z, a, k)
        return z

    _, pull, value = jax.vjp(solve, args, has_aux=True)
    z, gaps, all_z = z0, [], [z0]
    for k in range(8):
        fz = fn(z, args, k)
        gaps.append(float(jnp.max(jnp.abs((fz - z) / (1e-9 + 1e-9 * jnp.abs(fz))))))
        z = fz
        all_z.append(z)
    n = int(np.argmin(gaps))
    assert 2 < n < 7
    np.testing.assert_allclose(value, all_z[n], rtol=1e-6)
    assert relative_error(pull(g)[0][1], jax.vjp(stopped, args)[1](g)[0][1]) < 1e-5


@pytest.mark.parametrize("adjoint", [Reversed, Stored])
@pytest.mark.parametrize("last", [0, -1, 2.0, "all", True])
def test_what_last_may_be(adjoint, last):
    with pytest.raises(ValueError, match="expects last to be an int"):
        adjoint(last=last)

"""Where a reversal cannot be right: it says so, and no wrong number is returned for a gradient."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from problems import noisy, nothing_but_nan, relative_error, tanh

import deqjax
from deqjax import RESULTS, ReversibleAdjoint

finite = lambda tree: all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))


def reversible(beta=0.5, tol=0.0, **kwargs):
    return deqjax.Reversible(rtol=tol, atol=tol, beta=beta, **kwargs)


growth = lambda z, a: a[0] * z + a[1][:, None]
START = jnp.asarray([[0.5, 0.1], [1.0, 2.0], [-0.3, 0.7]])
GROWTH = jnp.float32(0.5), jnp.ones(3)


@pytest.mark.parametrize("tol", [0.0, 1e-4])
@pytest.mark.parametrize("fails", ["iterate", "z0", "nan"])
def test_an_example_that_leaves_the_range(tol, fails):
    """Only it is flagged; its gradient, and that of what examples share, is not a number."""
    z0, (rate, drive) = START, GROWTH
    args = rate, drive.at[1].set({"iterate": 400.0, "z0": 1.0, "nan": jnp.nan}[fails])
    z0 = z0.at[1, 0].set(200.0) if fails == "z0" else z0
    options = dict(batched=True, max_steps=90)
    sol = deqjax.fixed_point(growth, reversible(0.5, tol), z0, args, **options)
    overflow = fails != "nan"
    assert sol.stats["overflow"].tolist() == [False, overflow, False]
    code = RESULTS.nonlinear_divergence if overflow else RESULTS.nonfinite
    for i, expected in enumerate([RESULTS.successful, code, RESULTS.successful]):
        assert (sol.result == expected)[i]
    # At a fixed depth a NaN stays in the value, as in floating point.
    held = sol.value if overflow or tol else sol.value[::2]
    assert finite(held) and jnp.all(jnp.abs(held) <= 128)
    out, stats = deqjax.reversible_vjp(
        growth, reversible(0.5, tol), z0, args, jnp.ones_like(z0), **options
    )
    assert stats["overflow"].tolist() == [False, overflow, False]
    _, (d_rate, _), d_z0 = out
    if overflow:
        assert stats["trusted"].tolist() == [True, False, True]
        assert math.isinf(stats["reversal_residual"][1])
        assert nothing_but_nan(d_rate) and nothing_but_nan(d_z0[1])
    elif tol == 0:  # with a tolerance it has stopped before its first step
        assert not finite(d_rate) and not finite(d_z0[1])

    # The others are what they are beside an example that stays in range, to the last bit.
    sane = deqjax.fixed_point(growth, reversible(0.5, tol), START, GROWTH, **options)
    healthy, _ = deqjax.reversible_vjp(
        growth, reversible(0.5, tol), START, GROWTH, jnp.ones_like(z0), **options
    )
    for i in (0, 2):
        assert jnp.all(sol.value[i] == sane.value[i])
        assert jnp.all(d_z0[i] == healthy[2][i])


def test_throw():
    args = 3 * GROWTH[0], GROWTH[1]
    with pytest.raises(eqx.EquinoxRuntimeError, match="diverge"):
        options = dict(batched=True, max_steps=40, throw=True)
        sol = deqjax.fixed_point(growth, reversible(), START, args, **options)
        jax.block_until_ready(sol.value)


def test_nan_of_f_is_no_overflow_at_a_fixed_depth():
    """f is not a number from step 3 on: no gradient of later steps can be told."""
    fn = lambda z, a: jnp.where(z > 2.5, jnp.nan, z + a)
    out, stats = deqjax.reversible_vjp(
        fn, reversible(), jnp.float32(0), jnp.float32(1), jnp.float32(1), max_steps=20
    )
    assert not stats["overflow"]
    assert not any(jnp.isfinite(x) for x in jax.tree.leaves(out))


@pytest.mark.parametrize("exact", [True, False])
def test_fresh_noise_per_call_is_caught(exact):
    p = tanh(4, 0.8, dtype=np.float32)
    solver = reversible(exact=exact)

    def run(on_failure):
        adjoint = ReversibleAdjoint(on_failure=on_failure, segment=4)
        options = dict(max_steps=15, adjoint=adjoint)
        return deqjax.reversible_vjp(noisy(0.1), solver, p.z0, p.args, p.cotangent, **options)

    out, stats = run("nan")
    assert not stats["trusted"]
    assert 0 < stats["reversal_residual"] < math.inf
    assert nothing_but_nan(out) and len(jax.tree.leaves(out)) == 3
    assert finite(run("keep")[0])
    with pytest.raises(eqx.EquinoxRuntimeError, match="did not end at z0"):
        jax.block_until_ready(run("raise"))
    loss = lambda a: jnp.sum(
        deqjax.fixed_point(
            noisy(0.1), solver, p.z0, a, max_steps=15, adjoint=ReversibleAdjoint(segment=4)
        ).value
    )
    assert nothing_but_nan(jax.jit(jax.grad(loss))(p.args))


P100 = tanh(6, 0.9, dtype=np.float32)


def deep(beta, adjoint, scale=1.0):
    """The gradient of 100 floating-point steps, and how its reversal went."""
    args = (scale * P100.args[0], P100.args[1])
    if isinstance(adjoint, ReversibleAdjoint):
        (_, d_args, _), stats = deqjax.reversible_vjp(
            P100.fn, reversible(beta, exact=False), P100.z0, args, P100.cotangent,
            adjoint=adjoint, max_steps=100,
        )  # fmt: skip
        return d_args, stats

    return stored(beta, args), None


@jax.jit
def stored(beta, args):
    solver, adjoint = reversible(beta, exact=False), deqjax.RecursiveCheckpointAdjoint()
    options = dict(max_steps=100, adjoint=adjoint)
    value = lambda a: deqjax.fixed_point(P100.fn, solver, P100.z0, a, **options).value
    return jax.vjp(value, args)[1](P100.cotangent)[0]


def test_segments():
    """Right, or not a number; right wherever half of the digits are left at a stored state."""
    for beta in (0.3, 0.5, 0.7, 0.95, 1.7):
        scale = 0.15 if beta > 1 else 1.0  # or it would not converge
        traced = jnp.float32(beta)
        truth, _ = deep(traced, deqjax.RecursiveCheckpointAdjoint(), scale)
        for k in (1, 3, 7, 12):
            grad, stats = deep(traced, ReversibleAdjoint(segment=k), scale)
            keeps_half = abs(1 - beta) ** -k < 2.0**12
            assert stats["trusted"] or not keeps_half, (beta, k)
            ok = relative_error(grad, truth) < 1e-3 if stats["trusted"] else nothing_but_nan(grad)
            assert ok, (beta, k)
        grad, stats = deep(beta, ReversibleAdjoint(), scale)
        assert stats["trusted"]
        assert relative_error(grad, truth) < 1e-3, beta
    # The textbook sweep promises nothing.
    truth, _ = deep(jnp.float32(0.95), deqjax.RecursiveCheckpointAdjoint())
    assert not relative_error(deep(0.95, ReversibleAdjoint(segment=None))[0], truth) < 1e-3


@pytest.mark.parametrize("field", [dict(segment=0), dict(segment="x"), dict(on_failure="maybe")])
def test_fields_refused(field):
    (name, value) = next(iter(field.items()))
    with pytest.raises(ValueError, match=f"expects {name}.*got {value!r}"):
        ReversibleAdjoint(**field)


def vjp(fn=tanh(4, 0.8).fn, solver=None, z0=None, args=None, cotangent=None, **options):
    p = tanh(4, 0.8)
    parts = (solver or reversible(), p.z0 if z0 is None else z0, args or p.args)
    g = p.cotangent if cotangent is None else cotangent
    return deqjax.reversible_vjp(fn, *parts, g, **(dict(max_steps=5) | options))


def test_what_reversible_vjp_refuses():
    for bad, sentence in [
        (dict(cotangent=jnp.ones(3)), r"reversible_vjp expects"),
        (dict(cotangent={"z": jnp.ones(4)}), r"reversible_vjp expects"),
        (dict(cotangent=jnp.ones(4, "bfloat16")), r"reversible_vjp expects"),
        (dict(solver=deqjax.FixedPointIteration()), r"expects the solver deqjax\.Reversible"),
        (dict(max_steps=0), "max_steps"),
        (dict(steps=6), "0 <= steps <= max_steps=5"),
        (dict(steps=jnp.ones(4, int)), "integer array of shape"),
        (dict(batched=True, z0=jnp.float32(0)), "batch of the same length"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            vjp(**bad)


def test_reversible_vjp_is_the_gradient_of_each_place_that_f_takes_arrays_from():
    w, x = tanh(4, 0.8).args
    g = jnp.ones(4)
    steps = jnp.asarray(4)
    (none, (d_w, d_x), d_z0), _ = vjp(cotangent=g, steps=steps)
    assert not jax.tree.leaves(none)

    def loss(args, z0):
        options = dict(max_steps=5, steps=steps, adjoint=ReversibleAdjoint())
        return jnp.sum(deqjax.fixed_point(tanh(4, 0.8).fn, reversible(), z0, args, **options).value)

    truth = jax.grad(loss, (0, 1))((w, x), jnp.zeros(4))
    assert relative_error(((d_w, d_x), d_z0), truth) < 1e-6

    (closed, nothing, _), _ = vjp(lambda z, _: jnp.tanh(w @ z + x), cotangent=g, steps=steps)
    assert relative_error(closed, (d_w, d_x)) < 1e-6
    assert all(jnp.all(a == 0) for a in jax.tree.leaves(nothing))  # args are not used

    class Cell(eqx.Module):
        weight: jax.Array
        size: int = eqx.field(static=True)
        count: jax.Array

        def __call__(self, z, args):
            return jnp.tanh(self.weight @ z + args[1])

    (d_cell, d_args, _), _ = vjp(Cell(w, 4, jnp.asarray(3)), cotangent=g, steps=steps)
    assert isinstance(d_cell, Cell) and d_cell.count is None
    assert relative_error((d_cell.weight, d_args[1]), (d_w, d_x)) < 1e-6

    class Both(Cell):
        def __call__(self, z, args):
            return jnp.tanh(self.weight @ z + x)

    with pytest.raises(ValueError, match="closes over"):
        vjp(Both(w, 4, jnp.asarray(3)))


def test_optimistix_door_needs_a_ceiling():
    p = tanh(4, 0.8)
    options = dict(adjoint=ReversibleAdjoint(), throw=False, max_steps=None)
    solve = lambda a: optimistix.fixed_point(p.fn, reversible(0.5, 1e-3), p.z0, a, **options).value
    with pytest.raises(ValueError, match="expects a number as max_steps, got None"):
        jax.grad(lambda a: jnp.sum(solve(a)))(p.args)

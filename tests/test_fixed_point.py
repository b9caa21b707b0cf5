"""The front door: counting, stopping, codes, batches, pytrees, and what it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import deqjax
from deqjax import RESULTS

PICARD = deqjax.FixedPointIteration(rtol=1e-6, atol=1e-6)
FIXED = deqjax.FixedPointIteration(rtol=0.0, atol=0.0)
half = lambda z, b: 0.5 * z + b


def solve(fn=half, solver=PICARD, z0=0.0, args=1.0, **kwargs):
    return deqjax.fixed_point(fn, solver, z0, args, **kwargs)


def test_counting():
    """z_n = 2 (1 - 2^-n): it stops before mixing at the first n that meets the tolerance."""
    sol = solve()
    n = next(n for n in range(99) if 2.0**-n < 1e-6 + 1e-6 * (2 - 2.0**-n))
    assert sol.stats["num_steps"] == n
    assert sol.stats["num_fn_evals"] == n + 1
    assert sol.value == np.float32(2 * (1 - 2.0**-n))
    assert np.isclose(sol.stats["residual"], 2.0**-n / (2 - 2.0**-n), rtol=1e-3)
    assert sol.result == RESULTS.successful
    assert sol.stats["max_steps"] == 256
    assert not sol.stats["overflow"]


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("traced", [False, True])
def test_fixed_depth(n, traced):
    """Zero tolerances mean exactly `steps`, even at a fixed point and even when traced."""
    zero = jnp.asarray(0.0)

    def run(zero, n):
        solver = deqjax.FixedPointIteration(rtol=zero, atol=zero) if traced else FIXED
        return solve(solver=solver, z0=2.0, max_steps=7, steps=n)

    sol = jax.jit(run)(zero, n) if traced else run(zero, n)
    assert sol.stats["num_steps"] == n
    assert sol.value == 2
    assert sol.stats["residual"] == 0
    assert sol.result == RESULTS.successful
    assert solve(solver=FIXED, max_steps=3).value == 1.75


def test_step_cap():
    sol = solve(max_steps=5)
    assert sol.stats["num_steps"] == 5
    assert sol.result == RESULTS.nonlinear_max_steps_reached
    # A traced request beyond the ceiling cannot be met, and says so.
    capped = jax.jit(lambda n: solve(solver=FIXED, max_steps=5, steps=n))(9)
    assert capped.stats["num_steps"] == 5
    assert capped.result == RESULTS.nonlinear_max_steps_reached


@pytest.mark.parametrize(
    "solver", [PICARD, FIXED, deqjax.Reversible(), optimistix.Newton(1e-6, 1e-6)]
)
def test_nonfinite(solver):
    sol = solve(lambda z, b: jnp.log(z - 3) + b, solver, max_steps=20)
    assert sol.result == RESULTS.nonfinite


def test_nonfinite_stops_before_mixing():
    """The last iterate at which f could be evaluated is kept."""
    sol = solve(lambda z, _: jnp.where(z > 2.5, jnp.nan, z + 1), z0=0.0)
    assert sol.value == 3
    assert sol.stats["num_steps"] == 3
    assert sol.result == RESULTS.nonfinite


def test_divergence():
    for solver in (PICARD, FIXED):
        sol = solve(lambda z, b: 3 * z + b, solver, max_steps=60)
        assert sol.result == RESULTS.nonlinear_divergence
        assert np.isfinite(sol.value)
    for beta in (1.0, -0.1, 2.5):
        run = lambda beta: solve(solver=deqjax.Reversible(beta=beta, exact=False)).result
        assert jax.jit(run)(jnp.asarray(beta)) == RESULTS.nonlinear_divergence
    run = lambda tol: solve(solver=deqjax.FixedPointIteration(rtol=tol)).result
    assert jax.jit(run)(jnp.asarray(-1.0)) == RESULTS.nonlinear_divergence


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_residual_at_any_scale(scale):
    sol = solve(solver=FIXED, args=np.float32(scale), max_steps=3)
    assert np.isclose(sol.stats["residual"], 1 / 15, rtol=1e-5)
    assert sol.result == RESULTS.successful


def test_residual_of_zero():
    sol = solve(lambda z, _: 0 * z, FIXED, max_steps=2)
    assert sol.stats["residual"] == 0
    assert jax.grad(lambda z: solve(lambda z, _: 0 * z, z0=z).stats["residual"])(0.0) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_errors_are_float32_or_wider(dtype):
    sol = solve(z0=jnp.zeros((3,), dtype), args=jnp.ones((3,), dtype), max_steps=50)
    assert sol.value.dtype == dtype
    assert sol.stats["residual"].dtype == jnp.float32


def test_aux_and_its_gradient():
    fn = lambda z, b: (0.5 * z + b, {"twice": 2 * z, "name": "aux"})
    sol = solve(fn, has_aux=True)
    assert sol.aux["twice"] == 2 * sol.value
    assert sol.aux["name"] == "aux"
    grad = jax.grad(lambda b: solve(fn, args=b, has_aux=True).aux["twice"])(1.0)
    assert np.isclose(grad, 4, rtol=1e-5)


arrays = lambda tree: eqx.filter(tree, eqx.is_array)
BATCH = jnp.asarray([0.1, 0.5, 0.9, 0.99])


@pytest.mark.optimised
@pytest.mark.parametrize("solver", [PICARD, deqjax.Reversible(rtol=1e-6, atol=1e-6, beta=0.5)])
def test_batch_mates_do_not_matter(solver):
    """Bit for bit: each problem stops by itself, and what it stops at is its own."""
    fn = lambda z, rate: {"a": rate * z["a"] + 1, "b": rate[:, None] * z["b"] + 2}
    z0 = lambda n: {"a": jnp.zeros(n), "b": jnp.zeros((n, 2))}
    many = solve(fn, solver, z0(4), BATCH, batched=True, max_steps=400)
    assert many.stats.pop("max_steps") == 400
    assert list(many.result == RESULTS.successful) == [True, True, True, False]
    assert many.stats["num_steps"].shape == many.stats["residual"].shape == (4,)
    assert len(set(many.stats["num_steps"].tolist())) == 4
    for i in range(4):
        one = solve(fn, solver, z0(1), BATCH[i : i + 1], batched=True, max_steps=400)
        del one.stats["max_steps"]
        pairs = zip(*map(jax.tree.leaves, map(arrays, (many, one))), strict=True)
        assert all(jnp.all(a[i] == b[0]) for a, b in pairs)


def test_one_bad_example_leaves_the_others_alone():
    fn = lambda z, a: a * z + 1
    sol = solve(fn, z0=jnp.zeros(3), args=jnp.asarray([0.5, jnp.nan, 4.0]), batched=True)
    codes = (RESULTS.successful, RESULTS.nonfinite, RESULTS.nonlinear_divergence)
    assert all((sol.result == code)[i] for i, code in enumerate(codes))
    assert np.isclose(sol.value[0], 2, rtol=1e-5)


def test_steps_per_problem():
    steps = jnp.asarray([0, 1, 2, 3])
    sol = solve(
        solver=FIXED, z0=jnp.zeros(4), args=jnp.ones(4), batched=True, steps=steps, max_steps=3
    )
    assert jnp.all(sol.stats["num_steps"] == steps)
    assert jnp.all(sol.value == jnp.asarray([0, 1, 1.5, 1.75]))
    assert jnp.all(sol.result == RESULTS.successful)


def test_throw():
    assert solve(throw=True).result == RESULTS.successful
    with pytest.raises(eqx.EquinoxRuntimeError, match="maximum number of steps"):
        jax.block_until_ready(solve(max_steps=2, throw=True).value)
    bad = jnp.asarray([0.5, jnp.nan])
    with pytest.raises(eqx.EquinoxRuntimeError, match="Nonfinite"):
        sol = solve(lambda z, a: a * z + 1, z0=jnp.zeros(2), args=bad, batched=True, throw=True)
        jax.block_until_ready(sol.value)


def test_through_optimistix():
    for solver in (optimistix.Newton(1e-6, 1e-6), optimistix.Chord(1e-6, 1e-6)):
        sol = solve(solver=solver, has_aux=True, fn=lambda z, b: (0.5 * z + b, z))
        assert np.isclose(sol.value, 2, rtol=1e-5)
        assert sol.aux == sol.value
        assert sol.stats["num_fn_evals"] == sol.stats["num_steps"] + 1
        assert sol.stats["residual"] < 1e-5


REFUSED = [
    (dict(fn=lambda z, _: (z, z)), "structure, shapes and dtypes of z0"),
    (dict(fn=lambda z, _: jnp.stack([z, z])), "structure, shapes and dtypes of z0"),
    (dict(fn=lambda z, _: z.astype(jnp.bfloat16)), "structure, shapes and dtypes of z0"),
    (dict(fn=lambda z, _: z, has_aux=True), "expects fn to return a pair"),
    (dict(z0=True), "floating-point arrays.* got a leaf of type bool"),
    (dict(z0=jnp.asarray([True])), "floating-point"),
    (dict(z0="0"), "floating-point"),
    (dict(z0={"a": 1.0, "f": jnp.tanh}), "floating-point"),
    (dict(z0=None), "at least one float array"),
    (dict(max_steps=0), "max_steps to be an int of at least 1, got 0"),
    (dict(max_steps=-3), "max_steps"),
    (dict(max_steps=2.0), "max_steps"),
    (dict(max_steps=True), "max_steps"),
    (dict(steps=1.0), "integer array"),
    (dict(steps=jnp.ones(2, int)), "integer array of shape"),
    (dict(steps=300), "0 <= steps <= max_steps=256"),
    (dict(steps=-1), "0 <= steps"),
    (dict(batched=True), "batch of the same length"),
    (dict(batched=True, z0={"a": jnp.zeros(3), "b": jnp.zeros(2)}), "batch of the same length"),
    (dict(adjoint=deqjax.ReversibleAdjoint()), "expects the solver deqjax.Reversible"),
    (dict(solver=optimistix.Newton(1e-3, 1e-3), steps=3), "Optimistix solver Newton"),
    (dict(solver=optimistix.Newton(1e-3, 1e-3), z0=jnp.ones(2), batched=True), "Optimistix solver"),
    (
        dict(solver=optimistix.Newton(1e-3, 1e-3), adjoint=deqjax.ReversibleAdjoint()),
        "expects the solver deqjax.Reversible",
    ),
    (dict(solver="anderson"), "a deqjax or an Optimistix solver"),
    (dict(adjoint="implicit"), "a deqjax or an Optimistix adjoint"),
]


@pytest.mark.parametrize("bad, sentence", REFUSED, ids=range(len(REFUSED)))
def test_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve(**bad)
    with pytest.raises(ValueError, match=sentence):
        jax.jit(lambda: solve(**bad).value)()


@pytest.mark.parametrize("field", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-3, float("nan")])
@pytest.mark.parametrize("wrap", [float, jnp.asarray])
def test_tolerances_refused(field, value, wrap):
    with pytest.raises(ValueError, match=f"tolerance of at least 0, got {field}="):
        deqjax.FixedPointIteration(**{field: wrap(value)})


@pytest.mark.parametrize("beta", [1.0, 0.0, 2.0, -0.5, 3.0, float("nan"), jnp.asarray(1.0)])
def test_beta_refused(beta):
    # An array of the exact mode is read as 1 - n/64.
    told = r"\(0, 2\) and not 1" if isinstance(beta, float) else r"\(0, 1\)"
    with pytest.raises(ValueError, match=f"relaxation in {told}, got beta="):
        deqjax.Reversible(beta=beta)
    sneaked_in = eqx.tree_at(lambda s: s.beta, deqjax.Reversible(), beta)
    with pytest.raises(ValueError, match=f"relaxation in {told}"):
        solve(solver=sneaked_in)


def test_array_fields_known_outside_jit():
    """A solver built outside, with arrays for fields, may be closed over by jit and scan."""
    solver = deqjax.Reversible(jnp.asarray(1e-5), beta=jnp.asarray(0.8), exact=False)
    run = lambda b: solve(solver=solver, args=b).value
    assert np.isclose(jax.jit(run)(1.0), 2, rtol=1e-4)
    assert np.isclose(jax.lax.scan(lambda c, b: (c, run(b)), 0, jnp.ones(2))[1][1], 2, rtol=1e-4)
    bad = eqx.tree_at(lambda s: s.beta, solver, jnp.asarray(1.0))
    with pytest.raises(ValueError, match="relaxation"):
        jax.jit(lambda b: solve(solver=bad, args=b).value)(1.0)


def test_empty_batch():
    options = dict(solver=deqjax.Reversible(), adjoint=deqjax.ReversibleAdjoint(), batched=True)
    loss = lambda b: jnp.sum(
        solve(z0=jnp.zeros(0), args=jnp.zeros(0), fn=lambda z, x: b * z, **options).value
    )
    assert jax.grad(loss)(0.5) == 0


@pytest.mark.x64
def test_mixed_dtypes_of_state():
    z0 = {"a": jnp.zeros(2, "float32"), "b": jnp.zeros(2), "c": jnp.zeros(2, "bfloat16")}
    fn = lambda z, b: jax.tree.map(lambda x: (0.5 * x + 1).astype(x.dtype), z)
    sol = solve(fn, z0=z0)
    assert sol.result == RESULTS.successful
    assert sol.stats["residual"].dtype == np.float64
    assert np.allclose(sol.value["b"], 2, rtol=1e-5)


def test_other_fields_refused():
    with pytest.raises(ValueError, match="damping factor below 1"):
        deqjax.FixedPointIteration(damp=1.0)
    with pytest.raises(ValueError, match="expects a scalar damp"):
        deqjax.FixedPointIteration(damp=jnp.full((2,), 0.5))
    with pytest.raises(ValueError, match="on_failure"):
        deqjax.ImplicitAdjoint(on_failure="ignore")
    with pytest.raises(ValueError, match="tolerance above 0"):
        deqjax.ImplicitAdjoint(tol=0.0)

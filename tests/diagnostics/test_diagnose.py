"""A diagnosis agrees with theory, in numbers and in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax

KEY = jax.random.key(0)
PICARD = deqjax.FixedPointIteration(1e-5, 1e-5)


def linear(z, a):
    return a * z + 1


def test_a_contraction_has_its_rate_and_one_point():
    a = jnp.asarray([0.2, 0.5, 0.9])
    found = deqjax.diagnose(linear, PICARD, jnp.zeros((3, 4)), a[:, None], key=KEY, batched=True)
    np.testing.assert_allclose(found.rate, a, rtol=0.02)
    np.testing.assert_allclose(found.spectral_radius.value, a, rtol=1e-4)
    assert jnp.all(found.agreeing == 1) and jnp.all(found.distance < 1e-2)
    assert jnp.all(found.result == deqjax.RESULTS.successful)
    assert found.advice() == []
    text = repr(found)
    assert (
        "3 successful" in text
        and "share that ends here 1, elsewhere 0" in text
        and "0.2 to 0.9" in text
    )


def test_an_example_does_not_depend_on_the_others():
    z0, a = jnp.zeros((3, 4)), jnp.asarray([0.2, 0.5, 0.9])[:, None]
    fn = lambda z, a: jnp.sin(3 * a * z) + a
    three = deqjax.diagnose(fn, PICARD, z0, a, key=KEY, batched=True, max_steps=30)
    two = deqjax.diagnose(fn, PICARD, z0[:2], a[:2], key=KEY, batched=True, max_steps=30)
    for name in ("rate", "residual", "agreeing", "elsewhere", "distance", "num_steps"):
        np.testing.assert_allclose(
            getattr(three, name)[:2], getattr(two, name), rtol=1e-4, err_msg=name
        )


WEIGHT = 0.5 * jnp.linalg.qr(jax.random.normal(KEY, (32, 32)))[0]
SAYS = {
    "slow": (lambda z: 0.999 * z + 1, PICARD, "falls, but slowly"),
    "no fixed point": (lambda z: z + 1 / (1 + z**2), PICARD, "may be no fixed point"),
    "a coarse state": (
        lambda z: 0.3 * z + 1e-4,
        deqjax.Reversible(1e-7, 1e-12, beta=0.75, fraction_bits=20),
        "as small as rounding",
    ),
    "a cycle": (lambda z: 1 - z, PICARD, "does not fall"),
    "growth": (lambda z: 30 * z + 1, PICARD, "grow without bound"),
    "not finite": (lambda z: jnp.log(z - 1), PICARD, "not finite"),
    "rounding": (
        lambda z: WEIGHT @ z + 1,
        deqjax.FixedPointIteration(1e-12, 1e-12),
        "as small as rounding",
    ),
    "left by plain steps": (lambda z: 4 - 3 * z, deqjax.Anderson(1e-4, 1e-4), "lead away"),
    "two points": (lambda z: jnp.tanh(3 * z), PICARD, "several fixed points"),
}


@pytest.mark.parametrize("case", SAYS)
def test_it_says_what_is_wrong(case):
    fn, solver, words = SAYS[case]
    found = deqjax.diagnose(lambda z, _: fn(z), solver, jnp.full(32, 0.4), key=KEY, max_steps=40)
    assert words in repr(found), repr(found)


SOLVERS = {
    "anderson": deqjax.Anderson(1e-3, 1e-3),
    "broyden": deqjax.Broyden(1e-3, 1e-3),
    "from the solution": PICARD,
}


@pytest.mark.parametrize("name", SOLVERS)
def test_one_fixed_point_is_not_called_several(name):
    """Fast solvers of a slow contraction, and a start from which no rate is to be seen."""
    matrix, one = 1.98 * WEIGHT, jnp.ones(32)
    at = jnp.linalg.solve(jnp.eye(32) - matrix, one)
    z0 = at if name == "from the solution" else jnp.zeros(32)
    fn = lambda z, _: matrix @ z + one
    found = deqjax.diagnose(fn, SOLVERS[name], z0, key=KEY, max_steps=2000)
    assert found.result == deqjax.RESULTS.successful
    assert found.elsewhere == 0 and "several" not in repr(found)


def test_nothing_is_said_of_other_starts_if_the_solve_fails():
    fn = lambda z, _: jnp.where(z < 0, jnp.nan, 0.5 * z + 1)
    found = deqjax.diagnose(fn, PICARD, jnp.full(3, -1.0), key=KEY)
    assert jnp.isnan(found.elsewhere) and jnp.isnan(found.agreeing) and "starts" not in repr(found)


def test_starts_that_fail_are_not_said_to_end_elsewhere():
    """sqrt has no value at a negative start. A pytree in two dtypes; no other start."""
    fn = lambda z, _: {"a": jnp.sqrt(z["a"]) + 1, "b": z["b"] / 2}
    z0 = {"a": jnp.ones(1), "b": jnp.ones(2, jnp.bfloat16)}
    solver = deqjax.FixedPointIteration(1e-2, 1e-2)
    found = deqjax.diagnose(fn, solver, z0, key=KEY, starts=16)
    assert 0 < found.agreeing < 1 and found.elsewhere == 0
    assert found.floor == 2.0**-7
    alone = deqjax.diagnose(fn, solver, z0, key=KEY, starts=0)
    assert alone.distance == 0 and "starts" not in repr(alone)


def test_under_jit_it_is_arrays():
    run = lambda a: deqjax.diagnose(linear, PICARD, jnp.zeros(4), a, key=KEY, starts=2)
    traced = []
    compiled = jax.jit(lambda a: traced.append(repr(run(a))) or run(a)[1:5])
    assert compiled(jnp.asarray(0.5))[0] == run(jnp.asarray(0.5)).num_steps
    assert traced == ["Diagnosis(traced)"]
    with pytest.raises(ValueError, match="starts"):
        deqjax.diagnose(linear, PICARD, jnp.zeros(4), 0.5, key=KEY, starts=-1)

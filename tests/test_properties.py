"""Any pytree, any float dtype, any batch, any number of steps left: against a Python loop."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings, strategies as st

import deqjax

SHAPES = st.lists(st.integers(0, 3), max_size=2).map(tuple)
TREES = st.recursive(
    SHAPES,
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
    max_leaves=3,
)
is_shape = lambda x: isinstance(x, tuple)


@st.composite
def problems(draw):
    batch = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    make = lambda shape: jnp.asarray(rng.uniform(-1, 1, (batch, *shape)), dtype)
    z0 = jax.tree.map(make, draw(TREES), is_leaf=is_shape)
    beta = draw(st.sampled_from([None, 0.5, 0.8, 1.2]))
    steps = draw(st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    return z0, beta, steps


@settings(max_examples=12, deadline=None, derandomize=True)
@given(problems())
def test_fixed_depth_is_a_python_loop(problem):
    z0, beta, steps = problem
    fn = lambda z, _: jax.tree.map(jnp.cos, z)
    if beta is None:
        solver = deqjax.FixedPointIteration(rtol=0.0, atol=0.0)
    else:
        solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, exact=False)
    sol = deqjax.fixed_point(
        fn, solver, z0, batched=True, max_steps=4, steps=jnp.asarray(steps, jnp.int32)
    )
    assert sol.stats["num_steps"].tolist() == steps
    assert bool(jnp.all(sol.result == deqjax.RESULTS.successful))
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(z0))
    for i, n in enumerate(steps):
        past = now = [np.asarray(x[i], np.float64) for x in jax.tree.leaves(z0)]
        for _ in range(n):
            mix = lambda p, z: np.cos(z) if beta is None else (1 - beta) * p + beta * np.cos(z)
            past, now = now, [mix(p, z) for p, z in zip(past, now, strict=True)]
        for x, y in zip(jax.tree.leaves(sol.value), now, strict=True):
            np.testing.assert_allclose(np.asarray(x[i], np.float64), y, atol=20 * eps)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(problems())
def test_reversal_finds_its_gradient(problem):
    """Every leaf's gradient, at every number of steps, is the checkpointed loop's, in float32."""
    z0, beta, steps = problem
    z0 = jax.tree.map(lambda x: x.astype(jnp.float32), z0)
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta or 0.6, exact=False)

    def loss(z0, scale, adjoint):
        fn = lambda z, _: jax.tree.map(lambda x: jnp.cos(scale * x), z)
        options = dict(batched=True, max_steps=4, steps=jnp.asarray(steps, jnp.int32))
        value = deqjax.fixed_point(fn, solver, z0, adjoint=adjoint, **options).value
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(value))

    grad = jax.grad(loss, (0, 1))
    ours = grad(z0, 0.9, deqjax.ReversibleAdjoint())
    truth = grad(z0, 0.9, deqjax.RecursiveCheckpointAdjoint())
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)

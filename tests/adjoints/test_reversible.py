"""The derivatives that ReversibleAdjoint has, and those that it refuses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error, tanh

import deqjax

pytestmark = pytest.mark.x64
STEPS = 9
with jax.enable_x64(True):
    PROBLEM = tanh(6, 0.9, dtype=np.float64)
    BETA = jnp.asarray(0.6)


def solve(beta, z0, args, adjoint, fn=PROBLEM.fn, **kwargs):
    solver = deqjax.Reversible(rtol=0.0, atol=0.0, beta=beta, exact=False)
    options = dict(max_steps=STEPS, adjoint=adjoint) | kwargs
    return deqjax.fixed_point(fn, solver, z0, args, **options)


def unrolled(beta, z0, args, fn=PROBLEM.fn, steps=STEPS):
    past = now = z0
    for _ in range(steps):
        mixed = lambda p, f: (1 - beta) * p + beta * f
        past, now = now, jax.tree.map(mixed, past, fn(now, args))
    return now


ADJOINTS = [deqjax.ReversibleAdjoint(), deqjax.RecursiveCheckpointAdjoint()]
each = pytest.mark.parametrize("adjoint", ADJOINTS, ids=["reversible", "checkpointed"])


@each
def test_beta_z0_and_args(adjoint):
    inputs = (BETA, jnp.linspace(-1.0, 1.0, 6), PROBLEM.args)
    loss = lambda inputs: jnp.sum(jnp.sin(solve(*inputs, adjoint=adjoint).value))
    truth = jax.grad(lambda inputs: jnp.sum(jnp.sin(unrolled(*inputs))))(inputs)
    assert relative_error(jax.grad(loss)(inputs), truth) < 1e-11


@each
def test_closed_over_tracers(adjoint):
    """revdeq and banax leak a tracer here."""
    w, x = PROBLEM.args

    def loss(w, x, run):
        return jnp.sum(run(0.6, jnp.zeros(6), None, fn=lambda z, _: jnp.tanh(w @ z + x)) ** 2)

    mine = lambda *a, fn: solve(*a, adjoint=adjoint, fn=fn).value
    truth = jax.grad(loss, (0, 1))(w, x, lambda *a, fn: unrolled(*a, fn=fn))
    assert (
        relative_error(jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(w, x, mine), truth) < 1e-11
    )


@each
def test_some_leaves_aux_and_residual(adjoint):
    """revdeq crashes on a loss of some leaves and drops the residual's gradient."""
    split = lambda z: {"a": z[:2], "b": z[2:]}
    join = lambda t: jnp.concatenate([t["a"], t["b"]])
    fn = lambda z, args: split(PROBLEM.fn(join(z), args))
    both = lambda z, args: (fn(z, args), jnp.sum(jnp.cos(join(z))))
    z0 = split(jnp.zeros(6))

    def loss(args):
        sol = solve(0.6, z0, args, adjoint, fn=both, has_aux=True)
        return jnp.sum(sol.value["b"] ** 2) + 3 * sol.aux + sol.stats["residual"]

    def truth(args):
        z = unrolled(0.6, z0, args, fn=fn)
        fz = join(fn(z, args))
        residual = jnp.linalg.norm(fz - join(z)) / jnp.linalg.norm(fz)
        return jnp.sum(z["b"] ** 2) + 3 * jnp.sum(jnp.cos(join(z))) + residual

    assert relative_error(jax.grad(loss)(PROBLEM.args), jax.grad(truth)(PROBLEM.args)) < 1e-11
    only_a = jax.grad(lambda args: jnp.sum(solve(0.6, z0, args, adjoint, fn=fn).value["a"]))
    only_a_truth = jax.grad(lambda args: jnp.sum(unrolled(0.6, z0, args, fn=fn)["a"]))
    assert relative_error(only_a(PROBLEM.args), only_a_truth(PROBLEM.args)) < 1e-11


@each
def test_integers_keys_and_none_pass_through(adjoint):
    w, x = PROBLEM.args
    fn = lambda z, a: jnp.tanh(a["w"][a["index"]] @ z + x + 0.1 * jax.random.normal(a["key"], (6,)))
    args = {
        "w": jnp.stack([w, -w]),
        "index": jnp.asarray(1),
        "key": jax.random.key(0),
        "none": None,
    }
    loss = lambda w, run: jnp.sum(run(0.6, jnp.zeros(6), args | {"w": w}, fn=fn))
    truth = jax.grad(loss)(args["w"], unrolled)
    grad = jax.grad(loss)(args["w"], lambda *a, fn: solve(*a, adjoint=adjoint, fn=fn).value)
    assert relative_error(grad, truth) < 1e-11


@each
@pytest.mark.parametrize("steps", [[0, 1, 5, 9], [3, 3, 3, 3], [0, 0, 0, 0]])
def test_each_example_reverses_its_own_steps(adjoint, steps):
    w, _ = PROBLEM.args
    xs = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)))
    z0 = jnp.asarray(np.random.default_rng(1).standard_normal((4, 6)))
    fn = lambda z, a: jnp.tanh(z @ a[0].T + a[1])

    def loss(beta, z0, w, xs):
        options = dict(fn=fn, batched=True, steps=jnp.asarray(steps))
        return jnp.sum(jnp.sin(solve(beta, z0, (w, xs), adjoint, **options).value))

    def truth(beta, z0, w, xs):
        ends = [unrolled(beta, z0[i], (w, xs[i]), steps=n) for i, n in enumerate(steps)]
        return jnp.sum(jnp.sin(jnp.stack(ends)))

    grad = jax.grad(loss, (0, 1, 2, 3))(BETA, z0, w, xs)
    expected = jax.grad(truth, (0, 1, 2, 3))(BETA, z0, w, xs)
    for a, b in zip(grad, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_one_evaluation_a_step():
    """The sweep evaluates f once a step, for the inversion and the VJP together."""
    loss = lambda args: jnp.sum(solve(0.6, jnp.zeros(6), args, ADJOINTS[0]).value)
    text = str(jax.make_jaxpr(jax.grad(loss))(PROBLEM.args))
    # In the forward loop, in the report at its end (dropped where it is not used), in the sweep.
    assert text.count(" tanh ") == 3


def test_another_solver_is_refused():
    """revdeq accepts a subclass of its solver and reverses it by the wrong rule."""

    class Fresh(deqjax.Reversible):
        def mix(self, z, fz, memory):
            return memory, fz

    for solver in (Fresh(), deqjax.FixedPointIteration()):
        with pytest.raises(ValueError, match=r"expects the solver deqjax\.Reversible, got F"):
            solve_with = dict(solver=solver, adjoint=deqjax.ReversibleAdjoint())
            deqjax.fixed_point(PROBLEM.fn, z0=PROBLEM.z0, args=PROBLEM.args, **solve_with)


@each
def test_forward_mode_and_higher_derivatives(adjoint):
    """Derivatives in beta, z0, parameters and input, in every order of modes."""
    primals = (BETA, jnp.linspace(-1.0, 1.0, 6), PROBLEM.args)
    tangents = jax.tree.map(jnp.cos, primals)
    mine = lambda *p: jnp.sum(jnp.sin(solve(*p, adjoint=adjoint).value))
    truth = lambda *p: jnp.sum(jnp.sin(unrolled(*p)))
    grad = lambda f: jax.grad(f, (0, 1, 2))
    push = lambda f: lambda *p: jax.jvp(f, p, tangents)[1]
    dot = lambda f: lambda *p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(f(*p)))
    for change in (
        push,
        lambda f: push(push(f)),
        lambda f: push(grad(f)),
        lambda f: grad(push(f)),
        lambda f: grad(dot(grad(f))),
    ):
        assert relative_error(change(mine)(*primals), change(truth)(*primals)) < 1e-11


@pytest.mark.optimised
def test_memory_does_not_grow_with_depth():
    def temporary(steps):
        textbook = deqjax.ReversibleAdjoint(segment=None)
        loss = lambda a: jnp.sum(solve(0.6, jnp.zeros(6), a, textbook, max_steps=steps).value)
        compiled = jax.jit(jax.grad(loss)).lower(PROBLEM.args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4) == temporary(400)


@pytest.mark.optimised
def test_float32_reversal_degrades_as_documented():
    """The docstring's figures: good to 1e-2 within the bound, not far beyond it."""
    rng = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(rng.standard_normal((16, 16)))
    args = jnp.asarray(0.98 * rotation, "float32"), jnp.asarray(rng.standard_normal(16), "float32")
    fn = lambda z, a: a[0] @ z + a[1]  # forgets slowly: a fast contraction would hide the noise

    textbook = deqjax.ReversibleAdjoint(segment=None)

    def error(steps, adjoint=textbook):
        def loss(args, adjoint):
            sol = solve(0.5, jnp.zeros(16, "float32"), args, adjoint, fn=fn, max_steps=steps)
            return jnp.sum(jnp.sin(sol.value))

        grad = jax.jit(jax.grad(loss), static_argnums=1)
        return relative_error(grad(args, adjoint), grad(args, ADJOINTS[1]))

    assert error(8) < 1e-4
    assert error(17) < 1e-2
    assert error(40) > 1e-2
    # The default starts anew from stored states before half of the digits are gone.
    assert error(40, deqjax.ReversibleAdjoint()) < 1e-4


def test_eqx_module_and_partial_training():
    """Only what is differentiated gets a cotangent; a module's static fields are left alone."""
    mlp = eqx.nn.MLP(6, 6, 8, 1, key=jax.random.key(0))
    mlp = jax.tree.map(lambda x: 0.5 * x if eqx.is_inexact_array(x) else x, mlp)
    train = jax.tree.map(lambda _: False, mlp)
    train = eqx.tree_at(lambda m: m.layers[0].weight, train, replace=True)
    moving, still = eqx.partition(mlp, train)

    def loss(moving, run):
        mlp = eqx.combine(moving, still)
        return jnp.sum(run(0.6, jnp.zeros(6), jnp.ones(6), fn=lambda z, x: mlp(z) + x))

    grad = eqx.filter_grad(loss)(moving, lambda *a, fn: solve(*a, adjoint=ADJOINTS[0], fn=fn).value)
    truth = eqx.filter_grad(loss)(moving, unrolled)
    assert relative_error(grad, truth) < 1e-11

"""A derivative rule is kept wherever JAX evaluates a part of a program by itself."""

import jax
import jax.numpy as jnp
import pytest

import deqjax
from deqjax._tree import attach, straight_through

from .helpers.registry import ADJOINTS, SOLVERS, names, slow

WAYS = {name: (SOLVERS[way.solver], way.adjoint) for name, way in ADJOINTS.items()}
WAYS["reversible-exact"] = SOLVERS["reversible-exact"], lambda _: deqjax.ReversibleAdjoint()
WAYS["checkpointed-exact"] = (
    SOLVERS["reversible-exact"],
    lambda _: deqjax.RecursiveCheckpointAdjoint(),
)
FEW = ("implicit", "checkpointed-exact", "reversible-exact")
ORDERS = {
    "forward over reverse": lambda loss, w: jax.jvp(jax.grad(loss), (w,), (w,))[1],
    "reverse over reverse": lambda loss, w: jax.grad(lambda w: jnp.vdot(w, jax.grad(loss)(w)))(w),
}


def twice(fn):
    """`fn` of its own output, in a loop."""
    return lambda z, *args: jax.lax.scan(lambda z, _: (fn(z, *args), None), z, length=2)[0]


def branch(fn):
    """`fn` behind a condition that differs in a batch, though not in its outcome."""
    return lambda z, *args: jax.lax.cond(jnp.sum(z) < 1e3, fn, lambda z, *_: z, z, *args)


@pytest.mark.x64
@pytest.mark.parametrize("order", names(ORDERS, "reverse over reverse"))
@pytest.mark.parametrize("name", [n if n in FEW else slow(n) for n in WAYS])
def test_second_derivatives_in_a_recomputed_part(name, order, getkey):
    solver, adjoint = (make(1e-13) for make in WAYS[name])
    draw = lambda *shape: jax.random.normal(getkey(), shape)
    w, x, z0, g = draw(3, 3) / 4, draw(2, 3), draw(2, 3), draw(2, 3)
    f = lambda z, args: jnp.tanh(args[0] @ z + args[1])

    def one(z, w, x):
        return jnp.sin(deqjax.fixed_point(f, solver, z, (w, x), adjoint=adjoint).value)

    def second(part, batch):
        solve = batch(twice(part(one)))
        return jax.jit(ORDERS[order], static_argnums=0)(lambda w: jnp.vdot(g, solve(z0, w, x)), w)

    by_one = lambda fn: lambda z, w, x: jnp.stack([fn(z[i], w, x[i]) for i in range(2)])
    by_map = lambda fn: jax.vmap(fn, (0, None, 0))
    expected = second(lambda fn: fn, by_one)
    for part in (jax.checkpoint, lambda fn: jax.checkpoint(branch(fn))):
        got = second(part, by_map)
        assert jnp.max(jnp.abs(got - expected)) <= 1e-9 * jnp.max(jnp.abs(expected))


@pytest.mark.parametrize("name", [n if n in FEW else slow(n) for n in WAYS])
def test_no_tracer_outlives_its_trace(name):
    solver, adjoint = (make(1e-3) for make in WAYS[name])
    f = lambda z, args: jnp.tanh(args[0] @ z + args[1])

    def loss(w, xs):
        solve = lambda x: deqjax.fixed_point(f, solver, x, (w, x), adjoint=adjoint, max_steps=8)
        return jnp.sum(jax.vmap(solve)(xs).value)

    with jax.checking_leaks():
        jax.jit(jax.grad(loss))(jnp.eye(3) / 4, jnp.ones((2, 3)))


def cubed(x):
    """x^3 as a value without a derivative, to which one is attached: 5 x^2."""
    return attach(x**3, x, lambda out, x, t: 5 * x**2 * t)


def test_an_attached_derivative_is_the_only_one():
    x = jnp.arange(1.0, 4.0)
    total = lambda x: jnp.sum(jax.checkpoint(jax.vmap(cubed))(x))
    assert jnp.array_equal(jax.grad(total)(x), 5 * x**2)
    assert jnp.array_equal(jnp.diag(jax.hessian(total)(x)), 10 * x)
    assert jnp.array_equal(jnp.diag(jax.jacfwd(jax.grad(total))(x)), 10 * x)
    rounded = lambda x: jnp.sum(straight_through(jnp.round(x), x**2))
    assert jnp.array_equal(jax.grad(rounded)(x + 0.2), 2 * (x + 0.2))


def test_an_attached_derivative_of_what_is_mapped_and_what_is_not():
    """The value is shared by the examples; its derivative is not, and sums over the batch."""
    tangent = lambda out, inputs, t: (inputs * jax.lax.psum(t, "batch"), None)
    value = lambda x: attach((jnp.ones(()), jnp.ones((), int)), x, tangent)
    mapped = jax.vmap(value, axis_name="batch", axis_size=3)
    x = jnp.arange(1.0, 4.0)
    out, moved = jax.jvp(lambda x: mapped(x)[0], (x,), (x,))
    assert jnp.array_equal(out, jnp.ones(3))
    assert jnp.array_equal(moved, 6 * x)
    assert jnp.array_equal(mapped(x)[1], jnp.ones(3, int))


def test_an_attached_derivative_of_constants_is_zero():
    out, moved = jax.jvp(lambda x: x * cubed(jnp.ones(())), (jnp.ones(()),), (jnp.ones(()),))
    assert (out, moved) == (1, 1)
    assert attach({"a": 2, "b": jnp.ones(2, int)}, (), lambda *_: None)["a"] == 2

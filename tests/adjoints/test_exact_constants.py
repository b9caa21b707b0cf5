"""Arrays that are inputs of one program and constants of another: reversed bit for bit.

XLA evaluates what depends on constants alone while it compiles, and takes out of a loop what does
not change in it; both to other bits than those of the program that ran the solve.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import relative_error
from registry import slow

import deqjax

pytestmark = pytest.mark.optimised
N, STEPS = 8, 16

# In each something depends on the parameters and not on z.
CELLS = {
    "input": lambda z, p: jnp.tanh(p[0] @ z + p[0] @ p[1]),
    "gram": lambda z, p: jnp.tanh(p[0] @ p[0].T @ z + p[1]),
    "solve": lambda z, p: jnp.tanh(jnp.linalg.solve(p[0] + 3 * jnp.eye(N), z + p[1])),
    "softmax": lambda z, p: jnp.tanh(jax.nn.softmax(p[0]) @ z + p[1]),
    "exp": lambda z, p: jnp.tanh(0.1 * jnp.exp(p[0]) @ z + p[1]),
    "norm": lambda z, p: jnp.tanh(0.8 * (p[0] / jnp.linalg.norm(p[0])) @ z + p[1]),
    "gate": lambda z, p: jax.nn.sigmoid(p[1]) * jnp.tanh(p[0] @ z) + jnp.log1p(jnp.exp(p[1])),
    "loop": lambda z, p: jax.lax.fori_loop(0, 2, lambda _, z: jnp.tanh(p[0] @ z + p[0] @ p[1]), z),
    "deep": lambda z, p: jax.lax.fori_loop(
        0, 2, lambda _, z: jnp.tanh(p[0] @ z + jnp.exp(p[0]) @ p[1]), z
    ),
}


def drawn():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return (0.2 * draw(N, N), draw(N)), draw(N), draw(N)


def apart(value, p, z0, g):
    """A pullback compiled by itself, in whose program the saved arrays are constants."""
    _, pull = jax.jit(lambda *a: jax.vjp(value, *a))(p, z0)
    return jax.jit(pull)(g)


def closed(value, p, z0, g):
    """The parameters are constants of the program of the solve, and inputs of that of the sweep."""
    pull = jax.jit(lambda z0: jax.vjp(value, p, z0)[1])(z0)
    return jax.jit(lambda pull, g: pull(g))(pull, g)


def mapped(value, p, z0, g):
    """Two cotangents of one solve."""
    pull = jax.jit(jax.vmap(jax.vjp(value, p, z0)[1]))
    return jax.tree.map(lambda x: x[1], pull(jnp.stack([2 * g, g])))


def batched(value, p, z0, g):
    """Two solves that share their parameters, the second with no cotangent."""
    many = jax.vmap(value, (None, 0))
    d_p, d_z0 = jax.jit(jax.vjp(many, p, jnp.stack([z0, -z0]))[1])(jnp.stack([g, 0 * g]))
    return d_p, d_z0[0]


def solved(f, p, z0):
    options = dict(max_steps=STEPS, adjoint=deqjax.ReversibleAdjoint())
    return deqjax.fixed_point(f, deqjax.Reversible(0.0, 0.0), z0, p, **options).value


def stored(f, p, z0):
    """The same steps in floating point, all states stored."""
    step = lambda s, _: ((s[1], 0.2 * s[0] + 0.8 * f(s[1], p)), None)
    return jax.lax.scan(step, (z0, z0), length=STEPS)[0][1]


MORE = "solve", "softmax", "norm", "gate", "deep"
CASES = [slow(name, apart) if name in MORE else (name, apart) for name in CELLS]
CASES += [("input", how) for how in (closed, mapped, batched)]
CASES += [slow("exp", how) for how in (closed, mapped, batched)]


@pytest.mark.parametrize("name, program", CASES)
def test_whatever_program_its_parameters_are_constants_of(name, program):
    f, (p, z0, g) = CELLS[name], drawn()
    out = program(lambda p, z0: solved(f, p, z0), p, z0, g)
    jax.config.update("jax_disable_most_optimizations", True)  # faster, until the next test
    truth = jax.jit(lambda p, z0, g: jax.vjp(lambda *a: stored(f, *a), p, z0)[1](g))(p, z0, g)
    assert relative_error(out, truth) < 1e-4


@pytest.mark.parametrize("z0", [jnp.zeros, jnp.ones])
@pytest.mark.parametrize("over", ["batched", "vmap"])
def test_a_start_that_is_constant_is_tested_at_run_time(z0, over):
    """XLA would fold the tests entry by entry: for most of the compilation of a large state."""
    shape = (3, 4) if over == "batched" else (4,)
    options = dict(max_steps=4, adjoint=deqjax.ReversibleAdjoint(), batched=over == "batched")
    f, solver = lambda z, x: x + jnp.cos(z), deqjax.Reversible(0.0, 0.0)
    solve = lambda x, z0: deqjax.fixed_point(f, solver, z0, x, **options).value
    solve = jax.vmap(solve, (0, None)) if over == "vmap" else solve

    def reductions(loss, *args):
        return jax.jit(jax.grad(loss)).lower(*args).compile().as_text().count(" reduce(")

    x = jnp.ones((3, 4))
    given = reductions(lambda x, z0: jnp.sum(solve(x, z0)), x, jnp.ones(shape))
    made = reductions(lambda x: jnp.sum(solve(x, z0(shape))), x)
    assert made == given

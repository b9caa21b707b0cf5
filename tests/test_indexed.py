"""`indexed=True`: f gets the step number, and a backward pass the same ones."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import ways
from problems import relative_error
from registry import slow

import deqjax

N, BATCH, STEPS = 4, 8, 10
Reversed, Stored = deqjax.ReversibleAdjoint, deqjax.RecursiveCheckpointAdjoint
Picard = ft.partial(deqjax.FixedPointIteration, rtol=0.0, atol=0.0)
Reversible = ft.partial(deqjax.Reversible, rtol=0.0, atol=0.0, beta=0.75)

# A solver, its beta (1 is a Picard step), and an adjoint.
KINDS = {
    "exact": (Reversible(), 0.75, Reversed()),
    "isolated": (Reversible(guard_bits=0), 0.75, Reversed()),
    "float": (Reversible(exact=False), 0.75, Reversed()),
    "last": (Reversible(), 0.75, Reversed(last=STEPS)),
    "stored": (Picard(), 1.0, Stored()),
    "stored-last": (Picard(), 1.0, Stored(last=STEPS)),
    "theirs": (Picard(), 1.0, optimistix.RecursiveCheckpointAdjoint()),
}
kinds = lambda *more: [slow(k, id=k) if k in more else k for k in KINDS]


def noise(z, a, step):
    """Drawn anew at each step."""
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), z.shape)
    return jnp.tanh(a[0] @ z + a[1] + drawn)


def embedding(z, a, step):
    """A learned vector per step, as rows of the weight."""
    return jnp.tanh(a[0] @ z + a[1] + a[0][step % N])


def schedule(z, a, step):
    """Shorter steps in depth."""
    return z + (jnp.tanh(a[0] @ z + a[1]) - z) / (1.0 + jnp.asarray(step, z.dtype))


CELLS = {"noise": noise, "embedding": embedding, "schedule": schedule}


def problem(batch=()):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return (draw(N, N) / 2, draw(*batch, N)), draw(*batch, N), draw(*batch, N)


def over_batch(cell):
    return lambda z, a, step: jax.vmap(cell, (0, (None, 0), 0))(z, a, step)


def steps(cell, args, z0, beta, n, first=0):
    past = now = z0
    for k in range(n):
        past, now = now, (1 - beta) * past + beta * cell(now, args, first + k)
    return now


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", kinds("isolated", "float", "last", "stored-last"))
def test_it_is_the_unrolled_loop(kind, cell):
    """Value, gradients, forward mode, second derivatives; each entry of f at its own step."""
    solver, beta, adjoint = KINDS[kind]
    args, z0, g = problem()

    def derivatives(value):
        loss = lambda a, z: g @ jnp.sin(value(a, z))
        first = jax.grad(loss, (0, 1))
        if kind == "theirs":  # their loop has no forward mode
            return value(args, z0), first(args, z0)
        return value(args, z0), *jax.jvp(first, (args, z0), (args, z0))

    options = dict(max_steps=STEPS, indexed=True, adjoint=adjoint)
    solve = lambda a, z: deqjax.fixed_point(CELLS[cell], solver, z, a, **options).value
    found = jax.jit(lambda: derivatives(solve))()
    truth = jax.jit(lambda: derivatives(lambda a, z: steps(CELLS[cell], a, z, beta, STEPS)))()
    assert relative_error(found, truth) < 1e-5


def test_a_step_without_its_row_has_no_gradient():
    """Rows of a table that no step reads have the gradient 0, and the others have not."""
    args, z0, g = problem()
    fn = lambda z, a, step: jnp.tanh(a[0] @ z + a[2][step])
    table = jnp.ones((STEPS, N))
    for solver, _, adjoint in KINDS.values():
        options = dict(max_steps=STEPS, steps=6, indexed=True, adjoint=adjoint)
        solve = lambda t, s=solver, o=options: deqjax.fixed_point(fn, s, z0, (*args, t), **o).value
        (d,) = jax.vjp(solve, table)[1](g)
        assert jnp.all(jnp.any(d[:6] != 0, -1)) and not jnp.any(d[6:])


@pytest.mark.parametrize("way", ways.WAYS.values(), ids=ways.WAYS)
@pytest.mark.parametrize("kind", ["exact", slow("isolated"), slow("float"), slow("stored")])
def test_under_every_transformation(way, kind):
    solver, beta, adjoint = KINDS[kind]
    args, z0, g = problem((BATCH,))

    def solve(args, z0, batched):
        fn = over_batch(noise) if batched else noise
        options = dict(max_steps=STEPS, indexed=True, adjoint=adjoint, batched=batched)
        return deqjax.fixed_point(fn, solver, z0, args, **options).value

    one = lambda w, x, z: steps(noise, (w, x), z, beta, STEPS)
    each = lambda a: jax.vmap(one, (None, 0, 0))(a[0], a[1], z0)
    truth = jax.vjp(each, args)[1](g)[0]
    assert relative_error(way(solve, args, z0, g), truth) < 1e-5


@pytest.mark.parametrize("kind", kinds("float", "stored-last"))
def test_each_problem_has_its_own_number(kind):
    """In a batch that stops apart, by a budget or a tolerance, under `batched` and `vmap`."""
    solver, beta, adjoint = KINDS[kind]
    args, z0, g = problem((BATCH,))
    budget = jnp.asarray([0, 1, 3, 4, 6, 7, 9, 10])

    def run(args, z0, budget, batched, solver=solver):
        fn = over_batch(noise) if batched else noise
        options = dict(max_steps=STEPS, steps=budget, batched=batched)
        solve = ft.partial(deqjax.fixed_point, fn, solver, indexed=True, adjoint=adjoint)
        sol = solve(z0, args, **options)
        return sol.value, (sol.stats["num_steps"], sol.stats["residual"])

    pull = lambda run: jax.vjp(run, args, z0, has_aux=True)
    value, pulled, (n, size) = pull(lambda a, z: run(a, z, budget, True))
    one = lambda a, z, n: run(a, z, n, False)
    v_value, v_pulled, (v_n, v_size) = pull(
        lambda a, z: jax.vmap(one, ((None, 0), 0, 0))(a, z, budget)
    )
    truth, t_pulled = jax.vjp(
        lambda a, z: jnp.stack([
            steps(noise, (a[0], x), z, beta, int(k))
            for k, x, z in zip(budget, a[1], z, strict=True)
        ]), args, z0,
    )  # fmt: skip
    np.testing.assert_array_equal(n, budget)
    np.testing.assert_array_equal(v_n, budget)
    fz = over_batch(noise)(truth, args, budget)
    gap = np.linalg.norm(fz - truth, axis=1) / np.linalg.norm(fz, axis=1)
    np.testing.assert_allclose(size, gap, rtol=1e-5)
    np.testing.assert_allclose(v_size, gap, rtol=1e-5)
    expected = (truth, t_pulled(g))
    assert relative_error((value, pulled(g)), expected) < 1e-5
    assert relative_error((v_value, v_pulled(g)), expected) < 1e-5


def test_a_tolerance():
    """Each problem stops at the step at which its own f is still, whatever the others do."""
    args, z0, _ = problem((BATCH,))
    fn = over_batch(schedule)
    scales = jnp.logspace(-3, 0, BATCH)[:, None]
    still = lambda z, a, _: jnp.tanh(a[0] @ z + a[1])
    near = jax.vmap(lambda x, z: steps(still, (args[0], x), z, 1.0, 80))
    z0 = near(args[1], z0) + scales
    options = dict(batched=True, max_steps=60, indexed=True, adjoint=Stored())
    sol = deqjax.fixed_point(fn, deqjax.FixedPointIteration(1e-3, 1e-3), z0, args, **options)
    assert len(set(sol.stats["num_steps"].tolist())) > 2
    for i in range(BATCH):
        z, k = z0[i], 0
        while True:
            fz = schedule(z, (args[0], args[1][i]), k)
            if jnp.max(jnp.abs(fz - z) / (1e-3 + 1e-3 * jnp.abs(fz))) < 1:
                break
            z, k = fz, k + 1
        assert sol.stats["num_steps"][i] == k
        np.testing.assert_allclose(sol.value[i], z, rtol=1e-5, atol=1e-6)


def test_the_best_iterate_has_its_own_number():
    """If the steps run out, residual and aux are those of the step from the iterate returned."""
    sizes = jnp.asarray([1.0, 0.5, 0.1, 2.0, 3.0, 4.0, 5.0])
    fn = lambda z, _, step: (z + sizes[step], step)
    options = dict(has_aux=True, max_steps=6, indexed=True, adjoint=Stored())
    solver = deqjax.FixedPointIteration(1e-9, 1e-9)
    sol = deqjax.fixed_point(fn, solver, jnp.zeros(()), **options)
    # 0.1 of 1.6 is the least, relative to the size of f(z).
    assert sol.aux == 2 and sol.stats["num_steps"] == 6
    np.testing.assert_allclose(sol.value, 1.5)
    np.testing.assert_allclose(sol.stats["residual"], 0.1 / 1.6, rtol=1e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_along_a_path(batched):
    """Counted through all segments, also by a segment that starts in the middle of a batch's."""
    args, z0, g = problem((BATCH,) if batched else ())
    fn = over_batch(noise) if batched else noise
    options = dict(indices=(2, 5), max_steps=STEPS, indexed=True, adjoint=Stored())
    budget = jnp.asarray([0, 1, 2, 3, 5, 6, 9, 10]) if batched else None

    def path(args):
        sols = deqjax.fixed_point_path(
            fn, Picard(), z0, args, batched=batched, steps=budget, **options
        )
        return [sol.value for sol in sols]

    def whole(args):
        if not batched:
            return [steps(noise, args, z0, 1.0, n) for n in (2, 5, STEPS)]
        problems = list(zip(budget.tolist(), args[1], z0, strict=True))
        one = lambda k, n, x, z: steps(noise, (args[0], x), z, 1.0, min(k, n))
        return [jnp.stack([one(k, *p) for p in problems]) for k in (2, 5, STEPS)]

    found, pull = jax.vjp(path, args)
    truth, t_pull = jax.vjp(whole, args)
    assert relative_error((found, pull([g] * 3)), (truth, t_pull([g] * 3))) < 1e-5


@pytest.mark.parametrize("last", [None, 4])
def test_reversible_vjp(last):
    args, z0, g = problem((BATCH,))
    budget = jnp.asarray([0, 1, 3, 4, 6, 7, 9, 10])
    adjoint = Reversed(last=last)
    options = dict(batched=True, max_steps=STEPS, steps=budget, indexed=True, adjoint=adjoint)
    fn = over_batch(noise)
    (_, *found), stats = deqjax.reversible_vjp(fn, Reversible(), z0, args, g, **options)
    solve = lambda a, z: deqjax.fixed_point(fn, Reversible(), z, a, **options)
    sol = solve(args, z0)
    truth = jax.vjp(lambda a, z: solve(a, z).value, args, z0)[1](g)
    assert relative_error(found, truth) < 1e-6
    assert jnp.all(stats["reversal_residual"] == 0)
    for name in ("num_steps", "residual"):
        np.testing.assert_allclose(stats[name], sol.stats[name], rtol=1e-6)


class Cell(eqx.Module):
    weight: jax.Array

    def __call__(self, z, x, step):
        return noise(z, (self.weight, x), step)


def test_a_layer():
    """`nn.DEQ`, for one example and a batch, also sharded over devices."""
    args, z0, g = problem((BATCH,))
    deq = deqjax.nn.DEQ(Cell(args[0]), Reversible(), Reversed(), max_steps=STEPS, indexed=True)
    one = lambda deq, x, z0, g: deq(x, z0)[0] @ g
    many = lambda deq, x, z0, g: jnp.vdot(deq(x, z0, batched=True)[0], g)
    each = lambda deq, x, z0, g: jnp.sum(jax.vmap(one, (None, 0, 0, 0))(deq, x, z0, g))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("data"))
    apart = deqjax.nn.shard_solves(deq, split)
    truth = jax.grad(
        lambda w: sum(
            steps(noise, (w, x), z, 0.75, STEPS) @ h for x, z, h in zip(args[1], z0, g, strict=True)
        )
    )(args[0])
    for loss, layer in (many, deq), (each, deq), (many, apart):
        found = eqx.filter_jit(eqx.filter_grad(loss))(layer, args[1], z0, g)
        assert relative_error(found.cell.weight, truth) < 1e-5


@pytest.mark.parametrize("adjoint", [
    deqjax.ImplicitAdjoint(), deqjax.PhantomAdjoint(), deqjax.NeumannPhantomAdjoint(),
    deqjax.JacobianFreeAdjoint(), deqjax.PositiveConcaveAdjoint(), optimistix.ImplicitAdjoint(),
    None,
], ids=lambda a: type(a).__name__)  # fmt: skip
def test_the_implicit_family_refuses(adjoint):
    args, z0, _ = problem()
    options = {} if adjoint is None else {"adjoint": adjoint}
    with pytest.raises(ValueError, match="an adjoint of the steps taken"):
        deqjax.fixed_point(noise, Picard(), z0, args, indexed=True, **options)


def test_an_adjoint_of_somebody_else_that_reads_the_residual():
    class Foreign(deqjax.AbstractAdjoint):
        def apply(self, primal_fn, rewrite_fn, inputs, tags):
            return rewrite_fn(inputs[2], None, inputs)

    args, z0, _ = problem()
    with pytest.raises(ValueError, match="reads the residual"):
        deqjax.fixed_point(noise, Picard(), z0, args, indexed=True, adjoint=Foreign())


def test_broyden_and_shine():
    args, z0, _ = problem()
    adjoint = deqjax.adjoints.BroydenAdjoint()
    with pytest.raises(ValueError, match="an adjoint of the steps taken"):
        deqjax.fixed_point(noise, deqjax.Broyden(), z0, args, indexed=True, adjoint=adjoint)


@pytest.mark.parametrize("solver", [
    deqjax.PositiveConcaveSolver(), deqjax.Bracketing(upper=1.0), optimistix.Newton(1e-3, 1e-3),
], ids=lambda s: type(s).__name__)  # fmt: skip
def test_solvers_of_one_f_refuse(solver):
    args, z0, _ = problem()
    with pytest.raises(ValueError, match="indexed=True"):
        deqjax.fixed_point(noise, solver, z0, args, indexed=True, adjoint=Stored())

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

# A solver, its beta (1 is a Picard step), an adjoint, and the number of steps it differentiates.
KINDS = {
    "exact": (Reversible(), 0.75, Reversed(), STEPS),
    "isolated": (Reversible(guard_bits=0), 0.75, Reversed(), STEPS),
    "float": (Reversible(exact=False), 0.75, Reversed(), STEPS),
    "last": (Reversible(), 0.75, Reversed(last=4), 4),
    "stored": (Picard(), 1.0, Stored(), STEPS),
    "stored-last": (Picard(), 1.0, Stored(last=4), 4),
    "theirs": (Picard(), 1.0, optimistix.RecursiveCheckpointAdjoint(), STEPS),
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


def steps(cell, args, z0, beta, n, last=STEPS):
    past = now = z0
    for k in range(n):
        if k < n - last:
            past, now = jax.lax.stop_gradient((now, (1 - beta) * past + beta * cell(now, args, k)))
        else:
            past, now = now, (1 - beta) * past + beta * cell(now, args, k)
    return now


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", kinds("isolated", "float", "stored-last"))
def test_it_is_the_unrolled_loop(kind, cell):
    """Value, gradients, forward mode, second derivatives; each evaluation of f at its own step."""
    solver, beta, adjoint, last = KINDS[kind]
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
    truth = jax.jit(lambda: derivatives(lambda a, z: steps(CELLS[cell], a, z, beta, STEPS, last)))()
    assert relative_error(found, truth) < 1e-5


def test_a_step_without_its_row_has_no_gradient():
    """Rows of a table that no step reads have the gradient 0, and the others have not."""
    args, z0, g = problem()
    fn = lambda z, a, step: jnp.tanh(a[0] @ z + a[2][step])
    table = jnp.ones((STEPS, N))
    for solver, _, adjoint, last in (KINDS["last"], KINDS["stored"]):
        options = dict(max_steps=STEPS, steps=6, indexed=True, adjoint=adjoint)
        solve = lambda t, s=solver, o=options: deqjax.fixed_point(fn, s, z0, (*args, t), **o).value
        (d,) = jax.vjp(solve, table)[1](g)
        seen = jnp.any(d != 0, -1).tolist()
        assert seen == [6 - last <= k < 6 for k in range(STEPS)]


@pytest.mark.parametrize("way", ways.WAYS.values(), ids=ways.WAYS)
@pytest.mark.parametrize("kind", ["exact", slow("isolated"), slow("float"), slow("stored")])
def test_under_every_transformation(way, kind):
    solver, beta, adjoint, _ = KINDS[kind]
    args, z0, g = problem((BATCH,))

    def solve(args, z0, batched):
        fn = over_batch(noise) if batched else noise
        options = dict(max_steps=STEPS, indexed=True, adjoint=adjoint, batched=batched)
        return deqjax.fixed_point(fn, solver, z0, args, **options).value

    one = lambda w, x, z: steps(noise, (w, x), z, beta, STEPS)
    each = lambda a: jax.vmap(one, (None, 0, 0))(a[0], a[1], z0)
    truth = jax.vjp(each, args)[1](g)[0]
    assert relative_error(way(solve, args, z0, g), truth) < 1e-5


@pytest.mark.parametrize("kind", kinds("isolated", "float", "theirs"))
@pytest.mark.parametrize("cell", [schedule, slow(noise)])
def test_each_problem_has_its_own_number(kind, cell):
    """In a batch that stops apart, under `batched` and `vmap`; a schedule has no step -1."""
    solver, beta, adjoint, last = KINDS[kind]
    args, z0, g = problem((BATCH,))
    budget = jnp.asarray([0, 1, 3, 4, 6, 7, 9, 10])

    def run(args, z0, budget, batched):
        fn = over_batch(cell) if batched else cell
        solve = ft.partial(deqjax.fixed_point, fn, solver, indexed=True, adjoint=adjoint)
        sol = solve(z0, args, max_steps=STEPS, steps=budget, batched=batched)
        return sol.value, (sol.stats["num_steps"], sol.stats["residual"])

    @ft.partial(jax.jit, static_argnums=0)
    def pulled_back(run):
        value, pull, found = jax.vjp(run, args, z0, has_aux=True)
        return value, pull(g), found

    one = lambda a, z, n: run(a, z, n, False)
    value, pulled, (n, size) = pulled_back(lambda a, z: run(a, z, budget, True))
    v_value, v_pulled, (v_n, v_size) = pulled_back(
        lambda a, z: jax.vmap(one, ((None, 0), 0, 0))(a, z, budget)
    )
    truth, t_pulled = jax.vjp(
        lambda a, z: jnp.stack([
            steps(cell, (a[0], x), z, beta, int(k), last)
            for k, x, z in zip(budget, a[1], z, strict=True)
        ]), args, z0,
    )  # fmt: skip
    np.testing.assert_array_equal(n, budget)
    np.testing.assert_array_equal(v_n, budget)
    fz = over_batch(cell)(truth, args, budget)
    gap = np.linalg.norm(fz - truth, axis=1) / np.linalg.norm(fz, axis=1)
    np.testing.assert_allclose(size, gap, rtol=1e-5)
    np.testing.assert_allclose(v_size, gap, rtol=1e-5)
    expected = (truth, t_pulled(g))
    assert relative_error((value, pulled), expected) < 1e-5
    assert relative_error((v_value, v_pulled), expected) < 1e-5


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
    """The number is counted through all segments, and aux and residual are of the next step."""
    args, z0, g = problem((BATCH,) if batched else ())
    fn = over_batch(noise) if batched else noise
    options = dict(indices=(2, 5), max_steps=STEPS, indexed=True, adjoint=Stored(), has_aux=True)
    budget = jnp.asarray([0, 1, 2, 3, 5, 6, 9, 10]) if batched else jnp.asarray(STEPS)

    def path(args):
        numbered = lambda z, a, step: (fn(z, a, step), step)
        sols = deqjax.fixed_point_path(
            numbered, Picard(), z0, args, batched=batched, steps=budget, **options
        )
        found = [(sol.aux, sol.stats["residual"]) for sol in sols]
        return [sol.value for sol in sols], found

    def whole(args):
        def one(x, z, n):
            return [steps(noise, (args[0], x), z, 1.0, min(k, int(n))) for k in (2, 5, STEPS)]

        if not batched:
            return one(args[1], z0, budget)
        each = [one(*p) for p in zip(args[1], z0, budget, strict=True)]
        return [jnp.stack(values) for values in zip(*each, strict=True)]

    values, pulled, found = jax.jit(
        lambda a: (lambda v, pull, found: (v, pull([g] * 3), found))(
            *jax.vjp(path, a, has_aux=True)
        )
    )(args)
    truth, t_pull = jax.vjp(whole, args)
    assert relative_error((values, pulled), (truth, t_pull([g] * 3))) < 1e-5
    for k, z, (aux, size) in zip((2, 5, STEPS), truth, found, strict=True):
        np.testing.assert_array_equal(aux, np.minimum(budget, k))
        fz = fn(z, args, jnp.minimum(budget, k))
        gap = np.linalg.norm(fz - z, axis=-1) / np.linalg.norm(fz, axis=-1)
        np.testing.assert_allclose(size, gap, rtol=1e-4)


def test_along_a_path_that_stops():
    """A problem that meets its tolerance on the way counts no further."""
    rates = jnp.asarray([0.05, 0.5, 0.9])[:, None]
    fn = lambda z, rate, step: (rate * z + 1, step)
    options = dict(batched=True, indexed=True, has_aux=True, indices=(4, 8), max_steps=12)
    solver = deqjax.FixedPointIteration(1e-3, 1e-3)
    sols = deqjax.fixed_point_path(
        fn, solver, jnp.zeros((3, 1)), rates, adjoint=Stored(), **options
    )
    count = sols[0].stats["num_steps"] + sols[1].stats["num_steps"]
    assert count[0] < 4 < count[1] <= 8 == count[2]
    np.testing.assert_array_equal(sols[1].aux, count)
    assert sols[2].aux[0] == count[0]


@pytest.mark.x64
@pytest.mark.parametrize("batched", [False, True])
def test_the_step_is_an_int32(batched):
    """One for each problem, also with float64, and with a key in args."""
    args, z0, g = problem((BATCH,) if batched else ())
    seen = set()

    def fn(z, a, step):
        seen.add((step.dtype.name, step.shape))
        drawn = jax.random.normal(jax.random.fold_in(a[1], step.ravel()[0]), z.shape)
        return jnp.tanh(z @ a[0][0].T + a[0][1] + drawn.astype(z.dtype))

    options = dict(max_steps=6, indexed=True, batched=batched)
    inputs = (Reversible(), z0, (args, jax.random.key(3)), g)
    (_, (d_args, _), _), stats = deqjax.reversible_vjp(fn, *inputs, **options)
    assert jnp.all(stats["reversal_residual"] == 0) and jnp.all(jnp.isfinite(d_args[0]))
    assert seen == {("int32", (BATCH,) if batched else ())}


@pytest.mark.x64
@pytest.mark.parametrize("solver", [deqjax.Anderson(0.0, 0.0), deqjax.Broyden(0.0, 0.0)])
def test_solvers_that_remember(solver):
    """Each step's own f goes into the memory; derivatives agree with finite differences."""
    args, z0, g = jax.tree.map(lambda x: x.astype(jnp.float64), problem())
    options = dict(max_steps=5, indexed=True, adjoint=Stored())
    loss = jax.jit(
        lambda x: g @ deqjax.fixed_point(noise, solver, z0, (args[0], x), **options).value
    )
    slope = (loss(args[1] + 1e-6 * g) - loss(args[1] - 1e-6 * g)) / 2e-6
    np.testing.assert_allclose(jax.grad(loss)(args[1]) @ g, slope, rtol=1e-6)


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
    with pytest.raises(ValueError, match="got Foreign, which reads f"):
        deqjax.fixed_point(noise, Picard(), z0, args, indexed=True, adjoint=Foreign())


def test_a_layer_refuses_when_made():
    with pytest.raises(ValueError, match="an adjoint of the steps taken"):
        deqjax.nn.DEQ(Cell(jnp.eye(3)), deqjax.Anderson(), indexed=True)


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
    with pytest.raises(ValueError, match="the same f at each step|expects a deqjax solver"):
        deqjax.fixed_point(noise, solver, z0, args, indexed=True, adjoint=Stored())

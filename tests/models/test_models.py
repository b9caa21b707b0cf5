import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from registry import names, slow

import deqjax
from deqjax.models import ImplicitResNet, PositiveConcaveNet
from deqjax.models._base import adaptive_average_pool, average_pool, max_pool

SMALL = {
    "resnet": (ImplicitResNet, {"channels": 8, "groups": 2}),
    "linear": (PositiveConcaveNet.linear, {"size": 10}),
    "single": (PositiveConcaveNet.single, {"channels": 6}),
    "multi": (PositiveConcaveNet.multi, {"channels": (3, 4, 5)}),
}
models = pytest.mark.parametrize("name", SMALL)


def build(name, shape, key, **options):
    make, small = SMALL[name]
    return eqx.nn.make_with_state(make)(shape, 10, **small, **options, key=key)


@pytest.mark.parametrize(
    ("make", "shape", "options", "count"),
    [
        (ImplicitResNet, (32, 32, 3), {}, 24_682),
        (PositiveConcaveNet.linear, (28, 28, 1), {}, 70_410 - 80),
        (PositiveConcaveNet.single, (28, 28, 1), {}, 69_136 - 82),
        (PositiveConcaveNet.multi, (28, 28, 1), {}, 41_278 - 84),
        (PositiveConcaveNet.multi, (32, 32, 3), {"channels": (20, 50, 80)}, 130_950 - 150),
        (PositiveConcaveNet.multi, (32, 32, 3), {"channels": (100, 120, 140)}, 661_470 - 360),
        (PositiveConcaveNet.single, (32, 32, 3), {"channels": 125}, 164_760 - 125),
    ],
)
def test_parameter_counts(make, shape, options, count, getkey):
    """The counts of the papers, less one weight-norm gain per unit or channel."""
    build = lambda key: eqx.nn.delete_init_state(make(shape, 10, **options, key=key))
    leaves = jax.tree.leaves(eqx.filter_eval_shape(build, getkey()))
    assert sum(x.size for x in leaves if isinstance(x, jax.ShapeDtypeStruct)) == count


@models
@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 7, 2), (1, 1, 1)])
def test_any_image(name, shape, getkey):
    model, state = build(name, shape, getkey())
    images = jax.random.uniform(getkey(), (3, *shape))
    logits, new, solves = eqx.filter_jit(model)(images, state)
    assert logits.shape == (3, 10) and logits.dtype == jnp.float32
    assert jnp.all(jnp.isfinite(logits))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert len(solves) == len(model.deqs) == (3 if name == "multi" else 1)
    for deq, (x, sol) in zip(model.deqs, solves, strict=True):
        assert sol.stats["num_steps"].shape == (3,)
        again, _ = eqx.filter_jit(deq.batch)(x)
        np.testing.assert_allclose(again, sol.value, rtol=1e-5, atol=1e-6)


@models
def test_every_solve_is_successful(name, getkey):
    model, state = build(name, (8, 8, 1), getkey())
    _, _, solves = eqx.filter_jit(model)(jax.random.uniform(getkey(), (4, 8, 8, 1)), state)
    for _, sol in solves:
        codes = jax.vmap(lambda code: code == deqjax.RESULTS.successful)(sol.result)
        assert jnp.all(codes)
        if name == "resnet":
            assert jnp.all(sol.stats["num_steps"] == 4)


@models
def test_no_batch_norm_inside_a_solve(name, getkey):
    model, _ = build(name, (8, 8, 1), getkey())
    is_norm = lambda x: isinstance(x, eqx.nn.BatchNorm)
    count = lambda tree: sum(map(is_norm, jax.tree.leaves(tree, is_leaf=is_norm)))
    assert count(model) > 0 and count(model.deqs) == 0


@pytest.mark.parametrize("name", names(SMALL, "multi"))
@pytest.mark.optimised
def test_inference_ignores_batch_mates(name, getkey):
    model, state = build(name, (8, 8, 1), getkey())
    images = jax.random.uniform(getkey(), (4, 8, 8, 1))
    _, state, _ = eqx.filter_jit(model)(images, state)  # fills the running statistics
    infer = eqx.filter_jit(eqx.nn.inference_mode(model))
    others = images.at[1:].set(5 * images[1:])
    (one, same, _), (two, _, _) = infer(images, state), infer(others, state)
    np.testing.assert_array_equal(one[0], two[0])
    assert jnp.any(one[1] != two[1])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(same), jax.tree.leaves(state))


@models
def test_one_step_decreases_the_loss(name, getkey):
    model, state = build(name, (8, 8, 1), getkey())
    images, labels = jax.random.uniform(getkey(), (8, 8, 8, 1)), jnp.arange(8)
    sgd = optax.sgd(0.01)

    @eqx.filter_jit
    def step(model):
        @eqx.filter_value_and_grad
        def loss(model):
            logits = model(images, state)[0]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        value, grads = loss(model)
        updates, _ = sgd.update(grads, sgd.init(eqx.filter(model, eqx.is_inexact_array)))
        return eqx.apply_updates(model, updates), value, grads

    after, before, grads = step(model)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
    for deq in grads.deqs:
        assert all(jnp.any(g != 0) for g in jax.tree.leaves(deq.cell))
    assert step(after)[1] < before


@pytest.mark.x64  # float32 reversal amplifies the rounding by which two layouts differ
@pytest.mark.parametrize("name", ["resnet", slow("multi")])
def test_data_parallel(name, getkey):
    model, state = build(name, (4, 4, 1), getkey())
    # Away from the initial parameters of the residual cell: with all shifts zero its relu is at its
    # kink at z0 = 0, and the rounding of the reversed z0 decides which side's derivative counts.
    model = jax.tree.map(lambda p: p + 0.1 if eqx.is_inexact_array(p) else p, model)
    images = jax.random.uniform(getkey(), (16, 4, 4, 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    place = lambda tree, *spec: eqx.filter_shard(tree, NamedSharding(mesh, P(*spec)))

    @eqx.filter_jit
    def gradient(model, state, images):
        return eqx.filter_grad(lambda m: jnp.sum(jnp.sin(m(images, state)[0])))(model)

    one = gradient(model, state, images)
    eight = gradient(place(model), place(state), place(images, "data"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9 * float(jnp.max(jnp.abs(a)) + 1))


def test_a_new_model_does_not_compile_anew(getkey):
    traces = []
    run = eqx.filter_jit(lambda model, *args: traces.append(None) or model(*args)[0])
    for value in (1.0, 2.0):
        model, state = build("single", (4, 4, 1), getkey())
        logits = run(model, jnp.full((2, 4, 4, 1), value), state)
        assert jnp.all(jnp.isfinite(logits))
    assert len(traces) == 1


def test_half_precision(getkey):
    model, state = build("resnet", (4, 4, 1), getkey(), dtype=jnp.bfloat16)
    logits, _, _ = eqx.filter_jit(model)(jnp.ones((2, 4, 4, 1), jnp.bfloat16), state)
    assert logits.dtype == jnp.bfloat16


@models
def test_bad_input_raises(name, getkey):
    model, state = build(name, (4, 4, 1), getkey())
    for images in (jnp.ones((4, 4, 1)), jnp.ones((2, 1, 4, 4)), jnp.ones((2, 4, 4, 1), jnp.int32)):
        with pytest.raises(ValueError, match=r"batch of floating-point images of .*4, 4, 1"):
            model(images, state)
    with pytest.raises(ValueError, match=r"image_shape=\(height, width, channels\)"):
        build(name, (4, 4), getkey())


def test_pools(getkey):
    x = jax.random.normal(getkey(), (28, 13, 2))
    whole = np.asarray(x[:24, :8]).reshape(3, 8, 1, 8, 2).mean((1, 3))
    np.testing.assert_allclose(average_pool(x, 8), whole, atol=1e-6)
    np.testing.assert_allclose(average_pool(x, 99)[0, 0], jnp.mean(x, (0, 1)), atol=1e-6)

    quarters = np.asarray(x).reshape(4, 7, 13, 2).mean(1)
    columns = [quarters[:, a:b].mean(1) for a, b in ((0, 4), (3, 7), (6, 10), (9, 13))]
    np.testing.assert_allclose(adaptive_average_pool(x, 4), np.stack(columns, 1), atol=1e-6)
    np.testing.assert_array_equal(adaptive_average_pool(x[:3, :2], 4), x[:3, :2])

    padded = np.pad(np.asarray(x), ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = [padded[a : a + 28, b : b + 13] for a in range(3) for b in range(3)]
    np.testing.assert_array_equal(max_pool(x), np.max(windows, 0))


@pytest.mark.parametrize("nonnegative", [jax.nn.softplus, None])
def test_three_ways_to_nonnegative_weights(getkey, nonnegative):
    """The same network at the start, up to rounding; a plain weight is what `project` finds."""
    image = jnp.ones((2, 8, 8, 1))
    key = getkey()
    for make, size in ((PositiveConcaveNet.linear, {"size": 8}),
                       (PositiveConcaveNet.multi, {"channels": (2, 3)})):  # fmt: skip
        build = eqx.nn.make_with_state(make)
        default, state = build((8, 8, 1), 10, **size, key=key)
        model, _ = build((8, 8, 1), 10, **size, nonnegative=nonnegative, key=key)
        np.testing.assert_allclose(model(image, state)[0], default(image, state)[0], atol=1e-4)
        lowered = jax.tree.map(lambda x: x - 1 if eqx.is_inexact_array(x) else x, model)
        for deq in deqjax.positive.project(lowered).deqs:
            assert jnp.all(paramax.unwrap(deq.cell).weight >= 0)

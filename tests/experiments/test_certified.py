"""`experiments/images/certified.py` against points drawn from its boxes."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.models import PositiveConcaveNet

from images import certified
from images.certified import Box, certified_predictions, last_box, measure, wins

# So loose that the enclosures are wide, and some predictions open.
LOOSE = {"linear": 0.3, "multi": 0.01}


def make(name, *args, key):
    solves = {"solver": deqjax.FixedPointIteration(rtol=LOOSE[name], atol=0.0), "max_steps": 50}
    if name == "linear":
        return PositiveConcaveNet.linear(*args, size=12, **solves, key=key)
    solves["activation"] = jax.nn.soft_sign
    return PositiveConcaveNet.multi(*args, channels=(3, 4, 5), **solves, key=key)


@pytest.fixture(params=LOOSE)
def net(request):
    """A net at rest, its batch-norm state, images, and its loose tolerance."""
    make_net = eqx.nn.make_with_state(partial(make, request.param))
    model, norms = make_net((8, 8, 1), 6, key=jax.random.key(0))
    weights = lambda net: [stage.deq.cell.weight.args[0] for stage in net.stages]
    model = eqx.tree_at(weights, model, replace_fn=lambda v: 4 * v)  # W is v^2
    images = jax.random.normal(jax.random.key(1), (64, 8, 8, 1))
    train = eqx.filter_jit(lambda norms: model(images, norms)[1])
    for _ in range(30):
        norms = train(norms)
    return eqx.nn.inference_mode(model), norms, images, LOOSE[request.param]


@eqx.filter_jit
def after_the_first_solve(model, norms, z):
    """The classes that the rest of the network predicts from z, its solves made exactly."""
    exact = deqjax.FixedPointIteration(rtol=1e-6, atol=0.0)
    first, *later = model.stages
    y = certified._at_rest(first.norm_after, norms, jax.vmap(first.after)(z))
    for stage in later:
        x = certified._at_rest(stage.norm_before, norms, jax.vmap(stage.lift)(y))
        z, _ = eqx.tree_at(lambda deq: deq.solver, stage.deq, exact).batch(x)
        y = certified._at_rest(stage.norm_after, norms, jax.vmap(stage.after)(z))
    y = jax.vmap(model.pool)(y).reshape(len(y), -1)
    return jnp.argmax(jax.vmap(model.head)(y), -1)


def test_no_point_of_the_enclosure_changes_a_certified_prediction(net, getkey):
    model, norms, images, loose = net
    logits, _, ((x, sol), *_) = model(images, norms)
    sure = certified_predictions(model, norms, images, loose)
    assert 0 < jnp.mean(sure, dtype=jnp.float32) < 1  # else there would be nothing to tell
    deq = model.stages[0].deq
    at = certified.enclose(deq, x, deq.batch(x, z0=sol.value)[0])
    for corner in (False, True):
        for _ in range(8):
            share = jax.random.uniform(getkey(), sol.value.shape)
            share = jnp.round(share) if corner else share
            z = at.lower + share * (at.upper - at.lower)
            same = after_the_first_solve(model, norms, z) == jnp.argmax(logits, -1)
            assert jnp.all(same | ~sure)


def test_the_last_box_holds_what_the_head_sees(net):
    model, norms, images, loose = net
    _, box, holds = last_box(model, norms, images, loose)
    exact = deqjax.FixedPointIteration(rtol=1e-6, atol=0.0)
    solvers = lambda net: [stage.deq.solver for stage in net.stages]
    model = eqx.tree_at(solvers, model, replace_fn=lambda _: exact)
    y, norms_ = images, norms
    for stage in model.stages:
        y, norms_, _ = stage(y, norms_)
    y = jax.vmap(model.pool)(y).reshape(len(y), -1)
    inside = jnp.all((box.lower <= y) & (y <= box.upper), -1)
    assert jnp.all(inside | ~holds) and jnp.sum(holds) > 50


def test_wins_is_exact(getkey):
    """A linear head takes its least margin at a corner, and all corners are looked at."""
    head = eqx.nn.Linear(4, 3, key=getkey())
    centre = jax.random.normal(getkey(), (200, 4))
    radius = jax.random.uniform(getkey(), (200, 4), maxval=0.5)
    classes = jnp.argmax(jax.vmap(head)(centre), -1)
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 4), -1).reshape(16, 1, 4).astype(np.float32)
    corners = jax.vmap(jax.vmap(head))(centre[None] + signs * radius[None])
    expected = jnp.all(jnp.argmax(corners, -1) == classes[None], 0)
    assert 0 < jnp.sum(expected) < 200
    box = Box(centre - radius, centre + radius)
    np.testing.assert_array_equal(wins(head, classes, box), expected)


@pytest.mark.parametrize("fault", ["wide", "open", "nan"])
def test_an_enclosure_that_says_little_certifies_nothing(net, fault, monkeypatch):
    model, norms, images, _ = net
    certify = deqjax.certify

    def faulty(fn, z, *args, **options):
        at = certify(fn, z, *args, **options)
        match fault:
            case "wide":
                return at._replace(lower=0 * at.lower, upper=at.upper + 100)
            case "open":
                return at._replace(holds=jnp.zeros_like(at.holds))
            case _:
                return at._replace(upper=jnp.full_like(at.upper, jnp.nan))

    monkeypatch.setattr(deqjax, "certify", faulty)
    classes, box, holds = last_box(model, norms, images, 1e-5)
    assert not jnp.any(holds & wins(model.head, classes, box))


def test_a_tighter_solve_certifies_more(net):
    model, norms, images, loose = net
    few, more = (certified_predictions(model, norms, images, rtol) for rtol in (loose, 1e-5))
    assert jnp.all(more | ~few) and jnp.sum(more) > jnp.sum(few)


def test_measure_brackets_the_spectral_radius(net):
    model, norms, images, _ = net
    _, _, solves = model(images, norms)
    lines = measure(model.deqs, solves)
    for i, (deq, (x, sol)) in enumerate(zip(model.deqs, solves, strict=True)):
        at = certified.enclose(deq, x, sol.value)
        lower, upper = lines["spectral_radius"][i]
        assert 0 < lower <= upper < 1
        median, largest = lines["certified_error"][i]
        assert largest == jnp.max(at.relative_error) >= median > 0
        assert lines["solve_evaluations"][i] == jnp.mean(sol.stats["num_fn_evals"], dtype=float)

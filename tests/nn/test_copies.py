"""A copy of a layer or a model is that layer: same structure, same output, same program."""

import copy
import io
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax import models, nn
from deqjax.positive import PROPERTIES, Power, Shifted, properties, qualify

KEY = jax.random.key(0)
SOLVER = (deqjax.FixedPointIteration(rtol=1e-6), deqjax.ImplicitAdjoint())
MONOTONE = nn.MonotoneLinear(4, key=KEY)
VECTOR, IMAGE, TOKENS = jnp.ones(4), jnp.ones((4, 4, 4)), jnp.ones((3, 4))
NET = ((8, 8, 1), 3)


def model(make, **options):
    net, state = eqx.nn.make_with_state(make)(*NET, **options, key=KEY)
    return eqx.nn.inference_mode(net), (jnp.ones((2, *NET[0])), state)


# name: the layer or model, and what it is called with.
PAIR = (VECTOR, VECTOR)
CELLS = {
    "positive concave": (nn.PositiveConcaveLinear(4, key=KEY), PAIR),
    "softplus": (nn.PositiveConcaveLinear(4, nonnegative=jax.nn.softplus, key=KEY), PAIR),
    "plain": (nn.PositiveConcaveLinear(4, Power(0.5), nonnegative=None, key=KEY), PAIR),
    "convolution": (nn.PositiveConcaveConv2d(4, 3, jax.nn.relu6, key=KEY), (IMAGE, IMAGE)),
    "subhomogeneous": (nn.SubhomogeneousLinear(4, key=KEY), PAIR),
    "normalised": (
        nn.SubhomogeneousConv2d(4, 3, Shifted(jnp.tanh, 1.603), normalise=True, key=KEY),
        (IMAGE, IMAGE),
    ),
    "monotone": (MONOTONE, PAIR),
    "Peaceman and Rachford": (MONOTONE.peaceman_rachford(), PAIR),
    "forward-backward": (MONOTONE.forward_backward(), PAIR),
    "linear": (nn.Linear(4, 4, key=KEY), (VECTOR,)),
    "convolution of signs": (nn.Conv2d(4, 4, key=KEY), (IMAGE,)),
    "attention": (nn.CausalAttention(4, 2, key=KEY), (TOKENS,)),
    "transformer": (nn.TransformerCell(4, 2, (4,), key=KEY), (TOKENS, TOKENS)),
    "norm": (nn.GroupNorm(2, 4), (IMAGE,)),
    "dropout": (nn.VariationalDropout((4,)), (VECTOR,)),
}
MODELS = {
    "net": lambda: model(models.PositiveConcaveNet.multi, channels=(2, 3)),
    "resnet": lambda: model(models.ImplicitResNet, channels=(8, 16)),
    "language": lambda: (
        models.ReversibleTransformer(5, 3, width=4, heads=2, hidden=(4,), key=KEY),
        (jnp.zeros((1, 3), jnp.int32),),
    ),
}


def check(module, args):
    traces = itertools.count()

    @eqx.filter_jit
    def call(module, args):
        next(traces)
        return jax.tree.leaves(eqx.filter(module(*args), eqx.is_array))

    expected = call(module, args)
    path = io.BytesIO()
    eqx.tree_serialise_leaves(path, module)
    path.seek(0)
    copied = copy.deepcopy(module)
    assert jax.tree.structure(copied) == jax.tree.structure(module)
    for other in (
        copied,
        jax.tree.map(lambda x: x, module),
        eqx.tree_deserialise_leaves(path, copied),
    ):
        for a, b in zip(call(other, args), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert next(traces) == 1
    arrays, others = (jax.tree.leaves(eqx.filter(x, eqx.is_array)) for x in (module, copied))
    assert all(a is not b for a, b in zip(arrays, others, strict=True))


@pytest.mark.parametrize("name", CELLS)
def test_a_layer(name):
    check(*CELLS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name):
    check(*MODELS[name]())


@pytest.mark.parametrize("cell", ["positive concave", "normalised"])
def test_a_deq(cell):
    cell, (x, _) = CELLS[cell]
    deq = nn.DEQ(cell, *SOLVER)
    check(deq, (x,))
    copied = copy.deepcopy(deq)
    z, sol = copied(x)
    assert copied.certify(x, sol.value).holds
    assert z.shape == x.shape


def test_an_activation():
    """A copy of one with a record has it; one of JAX's own is no longer known, and needs not be."""
    for activation in (Shifted(jnp.tanh, 1.2), Power(0.5, 0.1)):
        copied = copy.deepcopy(activation)
        assert copied == activation and properties(copied) == properties(activation)
    for activation in PROPERTIES:
        known = properties(activation)
        if known.concave and known.sublinear:
            cell = copy.deepcopy(nn.PositiveConcaveLinear(2, activation, key=KEY))
            assert cell.known == known and qualify(cell.activation).kind == known.kind
            assert jnp.all(cell.inject(-jnp.ones(2)) >= 0)

"""Layers and models are given, and give, what their signatures say, shapes included."""

import subprocess
import sys

PROGRAM = """
import jaxtyping
rooms = ["deqjax.nn", "deqjax.models", "deqjax.positive"]
jaxtyping.install_import_hook(rooms, "beartype.beartype")
import equinox as eqx, jax, jax.numpy as jnp
from deqjax.models import ImplicitResNet, PositiveConcaveNet
key, images = jax.random.key(0), jnp.ones((2, 5, 4, 3))
nets = [
    (ImplicitResNet, dict(channels=(8, 16))),
    (PositiveConcaveNet.linear, dict(size=3)),
    (PositiveConcaveNet.multi, dict(channels=(2, 3))),
]
for make, options in nets:
    model, state = eqx.nn.make_with_state(make)((5, 4, 3), 7, **options, key=key)
    logits, state, solves = model(images, state)
    assert logits.shape == (2, 7)
    z, sol = model.deqs[0](solves[0][0][0])
    assert z.shape == solves[0][1].value[0].shape
try:
    model(images[0], state)
except jaxtyping.TypeCheckError:
    print("checked")
"""


def test_annotations_are_true():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert ran.stdout == "checked\n", ran.stderr

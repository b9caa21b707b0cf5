"""`experiments/kernels.py`: it runs, and what it compares are the same numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.slow
def test_smoke(tmp_path):
    run = measured(EXPERIMENTS / "kernels.py", tmp_path, XLA_FLAGS="")
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out"
    assert (out / "table.md").read_text() in run.stdout
    results = json.loads((out / "results.json").read_text())
    assert {"convolution", "attention", "concave"} < results.keys()
    steps = {row["way"]: row["steps"] for row in results["concave"]["peer"]}
    assert steps["Anderson of depth 2, default adjoint"] < steps["Picard, series"]


@pytest.mark.x64
def test_the_ways_of_a_reversal_agree(module):
    ways = module("bench.kernels.attention")
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = module("bench.blocks").attention_shapes(8)
    params = {
        n: 0.2 * jax.random.normal(k, s) for (n, s), k in zip(shapes.items(), keys, strict=False)
    }
    x = jax.random.normal(keys[4], (2, 4, 8))
    fn = lambda z, args: ways.block(z, args, heads=2)
    found = []
    for solve in (ways.by_hand, lambda *a: ways.ours(*a, exact=False)):
        loss = lambda p, x, solve=solve: jnp.sum(jnp.sin(solve(fn, 3, p, x)))
        found.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    jax.tree.map(same, *found)

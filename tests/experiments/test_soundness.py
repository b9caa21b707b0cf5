"""`experiments/soundness.py`: it runs, its references are right, and it can find what is false."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import measured

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.slow
def test_smoke(tmp_path):
    run = measured(EXPERIMENTS / "soundness.py", tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "table.md").read_text() in run.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lines = {line["claim"]: line for line in results["claims"]}
    for begin in ("certify, arrays of both", "normalised cells", "gradients lost", "finite impl",
                  "compilations", "maps of memory"):  # fmt: skip
        (line,) = (line for claim, line in lines.items() if claim.startswith(begin))
        assert line["holds"] is True, line
    assert not any("short of" in claim for claim in lines)  # promised of a full run alone


@pytest.mark.x64
def test_the_two_forms_of_a_family_agree_at_its_fixed_point(module):
    """In float64, up to what cancels of k <= 4096; so z* is that of the f that is certified."""
    certificates = module("bench.soundness.certificates")
    mixed = 0
    for i, f in enumerate(certificates.FAMILIES):
        arrays, truth = certificates.drawn(f, "float64", 6, [0, i])
        assert truth.known.all(), f.name
        value = jax.vmap(f.fn)(jnp.asarray(truth.z.astype(float)), arrays)
        np.testing.assert_allclose(value, truth.z.astype(float), rtol=1e-6, err_msg=f.name)
        negative = any(np.any(x < 0) for x in arrays.values())
        assert negative <= f.mixed or "p" in arrays, f.name
        mixed += f.mixed
    assert len(certificates.FAMILIES) - mixed >= 12 and mixed >= 12


def test_references(module):
    """Closed forms, and where there is no fixed point."""
    reference = module("bench.soundness.reference")
    x = np.array([[0.5], [3.0], [1e-4]])
    root = lambda z, a: np.sqrt(2 * z + a["x"])
    found = reference.solved(root, {"x": x}, 1)
    truth = 1 + np.sqrt(1 + x.astype(np.longdouble))
    assert found.known.all() and np.all(np.abs(found.z / truth - 1) <= found.doubt + 1e-18)
    grows = reference.solved(lambda z, a: z * 2 + a["x"], {"x": x}, 1)
    assert not grows.known.any()
    rng = np.random.default_rng(0)
    a = rng.standard_normal((3, 5, 5))
    inverse = reference.eliminated(a, np.broadcast_to(np.eye(5), a.shape)).astype(float)
    np.testing.assert_allclose(inverse @ a, np.broadcast_to(np.eye(5), a.shape), atol=1e-12)


def test_false_certificates_are_counted(module):
    """A tenth off where a millionth is claimed; an enclosure beside z*; a missed tolerance."""
    certificates = module("bench.soundness.certificates")
    Reference = module("bench.soundness.reference").Reference
    z = np.ones((4, 2), np.longdouble)
    truth = Reference(z, np.full(z.shape, 1e-15), np.array([True, True, True, False]))
    said = {"lower": 0.9 * z, "upper": 1.1 * z, "relative error": np.full(4, 0.2)}
    held = np.ones(4, bool)
    row = certificates.judged(truth, 1.1 * z, held, said)
    assert (row["tried"], row["held"], row["unknown"], row["false"]) == (3, 3, 1, 0)
    wrong = certificates.judged(truth, 1.1 * z, held, said | {"relative error": np.full(4, 1e-6)})
    assert wrong["false"] == 3 and wrong["worst"][0]["what"] == ["relative error"]
    beside = certificates.judged(truth, z, held, said | {"lower": 1.01 * z})
    assert beside["false"] == 3 and beside["worst"][0]["what"] == ["lower end"]
    assert certificates.judged(truth, z, ~held, said | {"lower": 1.01 * z})["false"] == 0
    # A solver's bounds count whatever its result; its tolerance, where it succeeds.
    assert certificates.judged(truth, z, ~held, said | {"lower": 1.01 * z}, 0.1)["false"] == 3
    assert certificates.judged(truth, 1.1 * z, held, said, 0.05)["false"] == 3
    assert certificates.judged(truth, 1.1 * z, ~held, said, 0.05)["false"] == 0


def test_lost_and_wrong_gradients_are_counted(module):
    reversal, implicit = module("bench.soundness.reversal"), module("bench.soundness.implicit")
    truth = [(np.ones(3),), np.ones((1, 2)), 1e-9 * np.ones((1, 2))]
    assert reversal._error([(np.ones(3),), None, truth[2]], truth) == 0
    assert reversal._error([(1.1 * np.ones(3),), None, None], truth) > 0.09
    assert reversal._error([(np.full(3, np.nan),), None, None], truth) == math.inf
    y, said = np.array([1.0, 2.0]), {"error_estimate": 0.01, "residual": 0.0, "condition": 1.0}
    assert not implicit.judged([1.05 * y], [y], said, 1.0)["false"]
    assert implicit.judged([y, 1e-9 * 1.2 * y], [y, 1e-9 * y], said, 1.0)["false"]
    assert not implicit.judged([np.nan * y], [y], said, 1.0)["false"]

"""CONTRIBUTING.md, followed: a solver of thirty lines in a file, through the conformance suite."""

import importlib.util

import jax.numpy as jnp
import pytest
import registry
from conformance import check

import deqjax

SOLVER = '''
from collections.abc import Callable
from typing import Any

import jax
import optimistix
from deqjax import AbstractSolver
from jaxtyping import PyTree


class Averaged(AbstractSolver):
    """z <- (1 - weight) f(z) + weight f(z of the step before)."""

    rtol: float = 1e-4
    atol: float = 1e-6
    norm: Callable[[PyTree], Any] = optimistix.max_norm
    weight: float = 0.1

    def __check_init__(self):
        self.check()

    def requirements(self):
        inside = lambda x: (x >= 0) & (x < 0.5)
        return [*super().requirements(), ("weight", self.weight, inside, "a weight in [0, 0.5)")]

    def blank(self, z0):
        return z0

    def mix(self, z, fz, memory):
        w = self.weight
        return jax.tree.map(lambda now, before: (1 - w) * now + w * before, fz, memory), fz
'''


@pytest.fixture
def averaged(tmp_path, monkeypatch):
    """The solver, in the registry as well."""
    assert len(SOLVER.strip().splitlines()) <= 35
    path = tmp_path / "averaged.py"
    path.write_text(SOLVER)
    spec = importlib.util.spec_from_file_location("averaged", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(registry.SOLVERS, "averaged", lambda tol: module.Averaged(tol, tol))
    monkeypatch.setattr(registry, "CONTRACTIVE", registry.CONTRACTIVE | {"averaged"})
    return module.Averaged


@pytest.mark.x64
def test_a_solver_passes_the_conformance_suite(averaged):
    check(deqjax.fixed_point, "averaged", 1e-10, jnp.float64, "affine")


def test_its_fields_are_checked(averaged):
    with pytest.raises(ValueError, match="Averaged expects a weight in .* got weight=0.7"):
        averaged(weight=0.7)
    sol = deqjax.fixed_point(lambda z, _: 0.5 * z + 1, averaged(1e-6, 1e-6), jnp.zeros(2))
    assert jnp.allclose(sol.value, 2)

"""Every solver on every family of problems, in both front doors: values, and implicit gradients.

A relative residual r leaves an error of at most cond(I - J) r; the gradient is made at that point,
and passes through (I - J)^-1 once more. What has a contraction in it gets contractions only.
"""

import jax.numpy as jnp
import optimistix
import pytest
from conformance import FAMILIES, check
from registry import SOLVERS, names

import deqjax

# Further cases: a method with another option, or one like another of Optimistix.
MORE = "damped", "anderson-mixed", "broyden-search", "chord", "dogleg", "newton-krylov"
each = pytest.mark.parametrize("name", names(SOLVERS, *MORE))


@pytest.mark.x64
@pytest.mark.parametrize("family", FAMILIES)
@each
def test_float64(name, family):
    check(deqjax.fixed_point, name, 1e-10, jnp.float64, family)


@pytest.mark.x64
@each
def test_through_the_door_of_optimistix(name):
    check(optimistix.fixed_point, name, 1e-10, jnp.float64, "tree")


@each
def test_float32(name):
    check(deqjax.fixed_point, name, 1e-5, jnp.float32, "curved", limit=20)

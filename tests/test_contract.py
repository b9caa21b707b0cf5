"""Names that were promised, old ones that warn, and what prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax import RESULTS, nn

W = 0.5 * jnp.eye(3)


def fn(z, x):
    return jnp.tanh(z @ W + x)


def solve(x, **options):
    solver = deqjax.FixedPointIteration(rtol=1e-5, atol=1e-5)
    return deqjax.fixed_point(fn, solver, jnp.zeros_like(x), x, **options)


def test_old_names_warn():
    with pytest.warns(DeprecationWarning, match=r"Broyden\(memory=...\) is depth=") as seen:
        assert deqjax.Broyden(memory=3).depth == 3
    assert seen[0].filename == __file__, "it warns where the old name is written"
    with pytest.warns(DeprecationWarning, match=r"check=...\) is on_failure="):
        assert deqjax.ReversibleAdjoint(check="off").on_failure == "keep"
    with pytest.warns(DeprecationWarning, match=r"is deqjax.Bracketing now"):
        assert deqjax.positive.Bracketing is deqjax.Bracketing
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        deqjax.positive.Nothing  # noqa: B018


def test_adjoints_exports_adjoints():
    public = [x for name, x in vars(deqjax.adjoints).items() if name[0].isupper()]
    assert len(public) >= 10
    assert all(issubclass(x, deqjax.AbstractAdjoint) for x in public)
    with pytest.warns(DeprecationWarning, match=r"is deqjax.implicit_vjp now"):
        assert deqjax.adjoints.implicit_vjp is deqjax.implicit_vjp


def test_a_layer_by_its_defaults(getkey):
    deq = nn.DEQ(nn.PositiveConcaveLinear(3, key=getkey()), deqjax.Anderson())
    assert isinstance(deq.adjoint, deqjax.ImplicitAdjoint)
    xs = jax.random.normal(getkey(), (4, 3))
    (z, sol), (same, _) = deq(xs, batched=True), deq.batch(xs)
    np.testing.assert_array_equal(z, same)
    assert jnp.all(sol.result == RESULTS.successful) and sol.stats["max_steps"] == 256
    with pytest.raises(ValueError, match=r"expects a splitting.*peaceman_rachford\(\)"):
        nn.DEQ(nn.MonotoneLinear(3, key=getkey()), deqjax.Anderson())


def test_an_adjoint_of_another_solver_is_refused_without_a_gradient():
    with pytest.raises(ValueError, match="expects the solver deqjax.Broyden, got FixedPoint"):
        solve(jnp.ones(3), adjoint=deqjax.BroydenAdjoint())


def test_a_reversible_backward_pass_tells_how_the_solve_went():
    x, solver = jnp.ones(3), deqjax.Reversible(rtol=1e-5, atol=1e-5)
    sol = deqjax.fixed_point(fn, solver, 0 * x, x, max_steps=50)
    _, stats = deqjax.reversible_vjp(fn, solver, 0 * x, x, x, max_steps=50)
    np.testing.assert_array_equal(stats["value"], sol.value)
    assert stats["result"] == sol.result == RESULTS.successful
    for name in ("num_steps", "num_fn_evals", "residual", "overflow", "max_steps"):
        np.testing.assert_array_equal(stats[name], sol.stats[name])
    _, stats = deqjax.reversible_vjp(fn, solver, 0 * x, x, x, max_steps=2)
    assert stats["result"] == RESULTS.nonlinear_max_steps_reached


def test_solutions_print_in_words():
    x = jnp.arange(12.0).reshape(4, 3)
    one, several = solve(x[1]), solve(x, batched=True, max_steps=3)
    assert repr(one).startswith("Solution(value=f32[3], successful, num_steps=")
    said = str(several)
    codes = np.asarray(several.result == RESULTS.successful)
    assert 0 < codes.sum() < 4
    assert f"{codes.sum()} successful, {4 - codes.sum()} nonlinear_max_steps_reached" in said
    assert "num_steps=1 to 3" in said and len(said) < 200
    shown = []
    jax.jit(lambda x: shown.append(str(solve(x))))(x[0])
    assert shown == ["Solution(value=f32[3], traced)"]


def test_enclosures_print_in_words():
    x = jnp.arange(1, 7.0).reshape(2, 3)
    certify = lambda z, x, **kw: deqjax.certify(fn, z, x, **kw)
    good = solve(x, batched=True).value
    assert "holds, relative_error=" in repr(certify(good[0], x[0]))
    assert "no proof" in repr(deqjax.certify(lambda z, x: 3 * z + x, good[0], x[0]))
    said = repr(certify(good, x, batched=True))
    assert said.startswith("Enclosure(f32[2,3], holds for 2 of 2, relative_error=")

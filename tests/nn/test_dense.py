"""The product primitive against `jnp.matmul`, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from deqjax._bilinear import dense
from deqjax._traced import trace
from deqjax.nn import Linear


def stock(x, w):
    return jnp.matmul(x, w)


def problem(getkey, *batch):
    return jax.random.normal(getkey(), (*batch, 5, 3)), jax.random.normal(getkey(), (3, 4))


def loss(product, x, w):
    """Nonlinear on both sides of the product, so that no second derivative is zero."""
    return jnp.sum(jnp.sin(product(jnp.tanh(x), jnp.sin(w))))


def agree(ours, theirs, tolerance=1e-12):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


def derivatives(product, x, w, dx, dw):
    f = lambda x, w: loss(product, x, w)
    g = jax.grad(f, (0, 1))
    dot = lambda x, w: sum(jnp.vdot(a, b) for a, b in zip(g(x, w), (dx, dw), strict=True))
    return {
        "value and gradient": jax.value_and_grad(f, (0, 1))(x, w),
        "jvp": jax.jvp(f, (x, w), (dx, dw)),
        "forward over reverse": jax.jvp(g, (x, w), (dx, dw)),
        "reverse over reverse": jax.grad(dot, (0, 1))(x, w),
        "remat": jax.grad(jax.checkpoint(f))(x, w),
    }


@pytest.mark.x64
def test_derivatives(getkey):
    (x, w), (dx, dw) = problem(getkey, 2), problem(getkey, 2)
    ours, theirs = (
        jax.jit(derivatives, static_argnums=0)(product, x, w, dx, dw) for product in (dense, stock)
    )
    agree(ours, theirs)


@pytest.mark.x64
@pytest.mark.parametrize("axes", [(0, None), (1, None), (None, 0), (0, 2), (1, 0)])
def test_vmap(getkey, axes):
    x, w = jax.random.normal(getkey(), (6, 6, 3)), jax.random.normal(getkey(), (3, 4))
    if axes[0] is None:
        x = x[0]
    if axes[1] is not None:
        w = jnp.stack([w * (i + 1) for i in range(6)], axes[1])

    def both(product):
        mapped = jax.vmap(lambda x, w: loss(product, x, w), axes)
        grad = lambda x, w: jax.grad(lambda x, w: jnp.sum(mapped(x, w)), (0, 1))(x, w)
        each = jax.vmap(jax.grad(lambda x, w: loss(product, x, w), (0, 1)), axes)
        return mapped(x, w), grad(x, w), each(x, w)

    agree(both(dense), both(stock))


def test_vmap_merges_the_rows(getkey):
    """One product of matrices each way: nothing of three axes, and no copy of the weight."""
    x, w = problem(getkey, 7)
    f = lambda x, w: jnp.sum(jnp.sin(jax.vmap(dense, (0, None))(x, w)))
    text = jax.jit(jax.grad(f, (0, 1))).lower(x, w).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 3 and not any("batching" in line for line in products)
    for line in products:
        shapes = line.split(" : ")[1]
        assert all(part.count("x") == 2 for part in shapes.split("tensor<")[1:]), line


@pytest.mark.parametrize("out", [None, jnp.float32])
def test_mixed_precision(getkey, out):
    """Products in the dtype of x, the cotangent of a float32 weight in float32."""
    x, w = problem(getkey, 2)
    half = x.astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, w: dense(x, w, out), half, w)
    assert y.dtype == (out or jnp.bfloat16)
    g = jax.random.normal(getkey(), y.shape).astype(y.dtype)
    dx, dw = pull(g)
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
    wide = lambda v: np.asarray(v.astype(jnp.bfloat16), np.float64)
    rows = lambda v: wide(v).reshape(-1, v.shape[-1])
    np.testing.assert_allclose(wide(y), wide(half) @ wide(w), atol=0.05, rtol=0.02)
    # Not rounded to bfloat16: the sum itself, to float32.
    np.testing.assert_allclose(dw, rows(half).T @ rows(g), rtol=1e-5, atol=1e-5)


def test_shardings(getkey):
    """Rows split over devices, by jit and inside shard_map; the weight's cotangent is the sum."""
    x, w = problem(getkey, 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    f = lambda x, w: jnp.sum(jnp.sin(dense(x, w)))
    expected = jax.value_and_grad(f, (0, 1))(x, w)
    split = jax.device_put(x, NamedSharding(mesh, P("data")))
    agree(jax.jit(jax.value_and_grad(f, (0, 1)))(split, w), expected, 1e-6)
    body = lambda x, w: jax.lax.psum(f(x, w), "data")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    agree(jax.value_and_grad(mapped, (0, 1))(x, w), expected, 1e-6)


def test_shapes_that_do_not_fit_are_refused(getkey):
    x, w = problem(getkey)
    with pytest.raises(ValueError, match=r"expects x of shape \(\.\.\., 4\).*got \(5, 3\)"):
        dense(x, w.T)


def test_linear(getkey):
    layer = Linear(3, 4, scale=2.0, key=getkey())
    x = jax.random.normal(getkey(), (2, 5, 3))
    agree(layer(x), x @ layer.weight + layer.bias[None, None], 1e-6)
    assert Linear(3, 4, use_bias=False, key=getkey()).bias is None
    wide = Linear(1000, 50, scale=2.0, key=getkey()).weight
    assert abs(float(jnp.std(wide)) * 1000**0.5 - 2.0) < 0.05


def test_products_of_a_function_that_are_replaced():
    """Products of floats in their own dtype, whichever operand is the matrix; no others."""
    x, w = jnp.ones((2, 3, 4)), jnp.ones((4, 5))
    half = x.astype(jnp.float16), jnp.full((4, 5), 1e-4, jnp.float16)
    named = lambda fn, *inputs: str(jax.make_jaxpr(trace(fn, *inputs))(*inputs))
    assert "deqjax_dense" in named(lambda x, w: x @ w, x, w)
    assert "deqjax_dense" in named(lambda x, w: jnp.einsum("ji,bli->blj", w.T, x), x, w)
    assert "deqjax_dense" in named(jax.jit(lambda x, w: jnp.einsum("bli,ij->jbl", x, w)), x, w)
    assert "deqjax_dense" not in named(lambda x, w: x @ w, jnp.ones((2, 4), int), w.astype(int))
    wide = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)
    assert "deqjax_dense" not in named(wide, *half)
    # The cotangent is beyond float16.
    grads = jax.grad(lambda x: jnp.sum(trace(wide, *half)(x, half[1]) * 1e5))(half[0])
    np.testing.assert_allclose(grads.astype(jnp.float32), 50, rtol=1e-2)
    pair = ("highest", "default")
    mixed = lambda w, x: jax.lax.dot_general(w, x, (((0,), (2,)), ((), ())), precision=pair)
    assert "deqjax_dense" not in named(mixed, w, x)


def explicit_mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))


@pytest.mark.parametrize(
    "spec", [(P("data"), P()), (P(), P(None, "data"))], ids=["rows", "columns"]
)
def test_a_sharding_in_the_type_is_left_to_jax(spec):
    x, w = jnp.linspace(-1, 1, 128).reshape(8, 16), jnp.linspace(1, 2, 256).reshape(16, 16)
    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(stock(x, w))), (0, 1))(x, w)
    with jax.set_mesh(explicit_mesh()):
        split = [jax.device_put(a, s) for a, s in zip((x, w), spec, strict=True)]
        both = (dense, trace(stock, *split))
        found = [
            jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1)))(*split)
            for f in both
        ]
        for got in found:
            for a, s in zip(got, spec, strict=True):
                assert jax.typeof(a).sharding.spec == P(*s, *[None] * (2 - len(s)))
            agree(tuple(map(np.asarray, got)), tuple(map(np.asarray, expected)), 1e-5)


@pytest.mark.parametrize("kind", ["out", "in", "arrays of its own"])
def test_a_nested_jit_keeps_its_shardings(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, P(None, "data"))
    x, w, c = jnp.ones((8, 16)), jnp.ones((16, 16)), jnp.ones((1, 16))
    inner = {
        "out": jax.jit(lambda x, w: x @ w, out_shardings=columns),
        "in": jax.jit(lambda x, w: x @ w, in_shardings=(None, columns)),
        "arrays of its own": jax.jit(lambda x, w: x @ w + c, out_shardings=columns),
    }[kind]
    y = jax.jit(lambda x, w: trace(inner, x, w)(x, w))(x, w)
    assert y.sharding.is_equivalent_to(columns, 2)


def test_what_is_called_often_is_lowered_once():
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))

    def lines(n):
        def f(x, w):
            for _ in range(n):
                x = layer(x, w)
            return x

        x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
        traced = trace(f, x, w)
        lowered = jax.jit(lambda x, w: traced(traced(x, w), w)).lower(x, w).as_text()
        return len(lowered.splitlines())

    assert lines(20) - lines(10) <= 2 * 10


def test_a_replaced_product_stays_in_its_scope():
    def f(x, w):
        with jax.named_scope("projection"):
            return x @ w

    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    (eqn,) = jax.make_jaxpr(trace(f, x, w))(x, w).eqns
    assert eqn.primitive.name == "deqjax_dense"
    assert str(eqn.source_info.name_stack) == "projection"


def test_a_checkpoint_policy_by_name_saves_products():
    x, w = jnp.ones((2, 3)), jnp.ones((3, 3))
    f = lambda x, w: jnp.sum(jnp.sin(jnp.sin(dense(jnp.sin(dense(x, w)), w))))

    def products(policy):
        grad = jax.grad(jax.checkpoint(f, policy=policy), (0, 1))
        return str(jax.make_jaxpr(grad)(x, w)).count("deqjax_dense[")

    by_name = lambda p, *_, **__: p.name.startswith("deqjax_")
    recomputed = products(jax.checkpoint_policies.nothing_saveable)
    assert products(jax.checkpoint_policies.dots_saveable) == recomputed
    assert products(by_name) == recomputed - 2

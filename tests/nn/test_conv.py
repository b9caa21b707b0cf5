"""The convolution primitive against `jax.lax`'s own, under every transformation."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from deqjax.nn import Conv2d
from deqjax.nn._convolution import conv2d
from deqjax.positive._rounding import rounding


def stock(x, kernel, stride=1):
    pad = [(k // 2, k // 2) for k in kernel.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, pad, dimension_numbers=layout)


def loss(conv, stride, kernel, x):
    """Nonlinear on both sides of the convolution, so that no second derivative is zero."""
    return jnp.sum(jnp.sin(conv(jnp.tanh(x), jnp.sin(kernel), stride)))


def problem(getkey, size=(6, 5), kernel=3, batch=4):
    x = jax.random.normal(getkey(), (batch, *size, 2))
    return jax.random.normal(getkey(), (kernel, kernel, 2, 3)), x


WIDE = 33  # channels: by minimal filtering


def agree(ours, theirs, tolerance=1e-12):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        scale = np.max(np.abs(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


strides = pytest.mark.parametrize("stride", [1, 2])


def filtered(getkey, size, batch=2):
    """As `problem`, of a kind that is computed by minimal filtering."""
    x = jax.random.normal(getkey(), (batch, *size, WIDE))
    return jax.random.normal(getkey(), (3, 3, WIDE, WIDE + 1)), x


@pytest.mark.x64
@pytest.mark.parametrize("size", [(8, 10), (9, 8), (11, 9)])
def test_minimal_filtering(getkey, size):
    w, x = filtered(getkey, size)
    g = jax.random.normal(getkey(), (2, *size, WIDE + 1))

    @partial(jax.jit, static_argnums=0)
    def both(conv, w, x, g):
        y, pull = jax.vjp(lambda w, x: conv(x, w), w, x)
        return y, pull(g)

    agree(both(conv2d, w, x, g), both(stock, w, x, g))
    assert "convolution" not in jax.jit(conv2d).lower(x, w).as_text()


@pytest.mark.x64
def test_derivatives_of_minimal_filtering(getkey):
    w, x = filtered(getkey, (8, 9), batch=1)
    dw, dx = (jax.random.normal(getkey(), a.shape) for a in (w, x))
    run = jax.jit(derivatives, static_argnums=(0, 1))
    ours, theirs = (run(c, 1, w, x, dw, dx) for c in (conv2d, stock))
    for name in theirs:
        agree(ours[name], theirs[name], 1e-11)


def test_minimal_filtering_is_as_right_as_the_sums(getkey):
    w, x = filtered(getkey, (14, 14))
    g = jax.random.normal(getkey(), (2, 14, 14, WIDE + 1))

    def all_three(conv, *arrays):
        y, pull = jax.vjp(conv, *arrays[:2])
        return y, *pull(arrays[2])

    with jax.enable_x64():
        exact = all_three(stock, *(jnp.asarray(np.float64(a)) for a in (x, w, g)))
    exact = list(map(np.asarray, exact))
    error = lambda a, b: np.max(np.abs(np.float64(a) - b)) / np.max(np.abs(b))
    off = lambda conv: list(map(error, all_three(conv, x, w, g), exact))
    # The value, the cotangent of the kernel, that of the image.
    for ours, theirs, times in zip(off(conv2d), off(stock), (1.5, 3.0, 1.5), strict=True):
        assert ours < times * theirs < 1e-5


def test_the_highest_precision_asks_for_the_sums_as_they_are(getkey):
    w, x = filtered(getkey, (8, 8))
    with jax.default_matmul_precision("highest"):
        text = jax.jit(conv2d).lower(x, w).as_text()
        # Far from the one entry that is not 0 every sum is 0, and no other number.
        z = jnp.zeros_like(x).at[0, 1, 1].set(x[0, 1, 1])
        assert jnp.all(jax.jit(conv2d)(z, w)[:, 3:] == 0)
    assert "convolution" in text


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@strides
def test_stock_rules_on_accelerators(getkey, stride, platform):
    w, x = filtered(getkey, (8, 8))
    step = lambda conv: jax.jit(jax.grad(partial(loss, conv, stride), (0, 1)))
    lower = lambda conv: step(conv).trace(w, x).lower(lowering_platforms=(platform,)).as_text()
    kinds = lambda text: sorted(re.findall(r"dim_numbers = (.*?->\[.*?\])", text))
    assert len(kinds(lower(conv2d))) == 3 and kinds(lower(conv2d)) == kinds(lower(stock))


@pytest.mark.x64
@strides
@pytest.mark.parametrize(
    ("kernel", "size"),
    [(3, (6, 8)), (3, (7, 5)), (3, (8, 7)), (3, (1, 2)), (5, (3, 4)), (1, (4, 3))],
)
def test_value_and_cotangents(getkey, stride, kernel, size):
    w, x = problem(getkey, size, kernel)
    g = jax.random.normal(getkey(), (4, *(-(-n // stride) for n in size), 3))

    @partial(jax.jit, static_argnums=0)
    def both(conv, w, x):
        y, pull = jax.vjp(lambda w, x: conv(x, w, stride), w, x)
        return y, pull(g)

    agree(both(conv2d, w, x), both(stock, w, x))


@strides
def test_float32_without_jit(getkey, stride):
    w, x = problem(getkey)
    ours, theirs = (jax.grad(partial(loss, c, stride), (0, 1))(w, x) for c in (conv2d, stock))
    agree(ours, theirs, 3e-6)


def derivatives(conv, stride, w, x, dw, dx):
    f = partial(loss, conv, stride)
    g = jax.grad(f, (0, 1))
    dot = lambda w, x: sum(jnp.vdot(a, b) for a, b in zip(g(w, x), (dw, dx), strict=True))
    return {
        "jvp": jax.jvp(f, (w, x), (dw, dx)),
        "jvp in the kernel": jax.jvp(lambda w: f(w, x), (w,), (dw,)),
        "linearize": jax.linearize(f, w, x)[1](dw, dx),
        "forward over reverse": jax.jvp(g, (w, x), (dw, dx)),
        "reverse over reverse": jax.grad(dot, (0, 1))(w, x),
        "remat": jax.grad(jax.checkpoint(f))(w, x),
        "third": jax.jvp(jax.grad(dot), (w, x), (dw, dx))[1],
    }


@pytest.mark.x64
@strides
def test_derivatives_of_any_order(getkey, stride):
    w, x = problem(getkey, batch=2)
    dw, dx = (jax.random.normal(getkey(), a.shape) for a in (w, x))
    run = jax.jit(derivatives, static_argnums=(0, 1))
    ours, theirs = (run(c, stride, w, x, dw, dx) for c in (conv2d, stock))
    for name in theirs:
        agree(ours[name], theirs[name])


def maps(conv, stride, w, x, ws):
    one = lambda w, x: loss(conv, stride, w, x[None])  # one example
    per_example = jax.vmap(jax.grad(one), (None, 0))
    shared = lambda w, x: jnp.sum(jax.vmap(one, (None, 0))(w, x))
    pairs = lambda ws, x: jnp.sum(jax.vmap(one)(ws, x))
    tangents = lambda w, x, d: jax.jvp(lambda w: one(w, x), (w,), (d,))[1]
    return {
        "grad(vmap)": jax.grad(shared, (0, 1))(w, x),
        "vmap(grad)": per_example(w, x),
        "vmap(hvp)": jax.vmap(lambda x, d: jax.jvp(lambda w: jax.grad(one)(w, x), (w,), (d,)))(
            x, ws
        ),
        "vmap(jvp)": jax.vmap(tangents, (None, 0, 0))(w, x, ws),
        "vmap over the last axis": jax.vmap(lambda x: conv(x, w, stride), -1, -1)(x[..., None]),
        "nested vmap": jax.vmap(per_example, (None, 0))(w, x.reshape(2, 2, *x.shape[1:])),
        "kernel and image": jax.grad(pairs, (0, 1))(ws, x),
        "kernel alone": jax.vmap(jax.grad(partial(loss, conv, stride)), (0, None))(ws, x),
        "hessian": jax.jacrev(jax.jacfwd(lambda v: one(w, x[0] * v)))(jnp.ones(())),
    }


@pytest.mark.x64
@strides
def test_vmap(getkey, stride):
    w, x = problem(getkey)
    ws = jax.random.normal(getkey(), (4, *w.shape))
    run = jax.jit(maps, static_argnums=(0, 1))
    ours, theirs = (run(c, stride, w, x, ws) for c in (conv2d, stock))
    for name in theirs:
        agree(ours[name], theirs[name])


@pytest.mark.x64
@strides
def test_vmap_of_grad_sums_to_the_gradient(getkey, stride):
    w, x = problem(getkey)
    one = lambda w, x: loss(conv2d, stride, w, x[None])
    each = jax.vmap(jax.grad(one), (None, 0))(w, x)
    total = jax.grad(lambda w: jnp.sum(jax.vmap(one, (None, 0))(w, x)))(w)
    agree(jnp.sum(each, 0), total)


@strides
def test_a_shared_kernel_has_one_cotangent(getkey, stride):
    w, x = problem(getkey, batch=11)
    layer = lambda w, x: conv2d(x[None], w, stride)[0]
    total = lambda w: jnp.sum(jnp.sin(jax.vmap(layer, (None, 0))(w, x)))
    text = str(jax.make_jaxpr(jax.grad(total))(w))
    assert "deqjax_conv2d" in text
    assert "[11,3,3,2,3]" not in text and "[11,2,3]" not in text
    assert "conv_general_dilated" not in text


@strides
def test_every_convolution_is_of_the_fast_kind(getkey, stride):
    w, x = problem(getkey)
    step = lambda conv: jax.jit(jax.grad(partial(loss, conv, stride), (0, 1))).lower(w, x).as_text()
    layouts = lambda text: set(re.findall(r"dim_numbers = (\S+ *\S*\S*?->\[.*?\])", text))
    fast = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    found = re.findall(r"dim_numbers = (.*?->\[.*?\])", step(conv2d))
    assert set(found) == {fast} and len(found) == 2
    assert "lhs_dilate = [2" not in step(conv2d)
    assert layouts(step(stock)) != {fast}  # else the primitive is no longer needed


@pytest.mark.x64
def test_inside_a_loop(getkey):
    w = 0.2 * jax.random.normal(getkey(), (3, 3, 2, 2))
    x = jax.random.normal(getkey(), (4, 6, 5, 2))

    def run(conv, w, x):
        step = lambda z, _: (jnp.tanh(conv(z, w) + x), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros_like(x), None, length=5)[0])

    agree(*(jax.jit(jax.grad(partial(run, c), (0, 1)))(w, x) for c in (conv2d, stock)))


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.x64
@pytest.mark.parametrize(("stride", "jit"), [(1, jax.jit), (2, jax.jit), (2, lambda f: f)])
def test_shard_map(getkey, stride, jit):
    w, x = problem(getkey, batch=16)

    def step(conv, w, x):
        return jax.lax.psum(loss(conv, stride, w, x), "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    sharded = jax.shard_map(partial(step, conv2d), mesh=mesh(), **specs)
    truth = partial(loss, stock, stride)
    agree(jit(sharded)(w, x), truth(w, x))
    agree(jit(jax.grad(sharded, (0, 1)))(w, x), jax.grad(truth, (0, 1))(w, x))
    tangents = jax.random.normal(getkey(), w.shape), jax.random.normal(getkey(), x.shape)
    agree(jit(lambda *a: jax.jvp(sharded, *a))((w, x), tangents), jax.jvp(truth, (w, x), tangents))


@pytest.mark.x64
def test_shard_map_of_vmap_with_a_sharded_kernel(getkey):
    w, x = problem(getkey, batch=3)
    ws = jax.random.normal(getkey(), (8, *w.shape))

    def each(ws, x):  # not the gradient in x, which inside shard_map is that of all devices
        return jax.vmap(jax.grad(partial(loss, conv2d, 2)), (0, None))(ws, x)

    sharded = jax.shard_map(each, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"))
    agree(jax.jit(sharded)(ws, x), jax.jit(each)(ws, x))


@pytest.mark.x64
@strides
def test_named_sharding(getkey, stride):
    w, x = problem(getkey, batch=16)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh(), P(*spec)))
    step = jax.jit(jax.grad(partial(loss, conv2d, stride), (0, 1)))
    dw, dx = step(place(w), place(x, "data"))
    assert dx.sharding.spec[0] == "data" and dw.sharding.is_fully_replicated
    agree((dw, dx), jax.grad(partial(loss, stock, stride), (0, 1))(w, x))


def test_bfloat16_accumulates_in_float32():
    # 2048 ones: a bfloat16 sum stops growing at 256.
    x, w = jnp.ones((8, 16, 16, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 3), jnp.bfloat16)
    y, pull = jax.vjp(conv2d, x, w)
    dx, dw = pull(jnp.ones_like(y))
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.all(dw[1, 1] == 2048)
    agree((y, dx), (stock(x, w), jnp.full_like(dx, 27).at[:].set(pull(jnp.ones_like(y))[0])), 0)


@strides
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_layer(getkey, stride, dtype):
    conv = Conv2d(2, 3, 5, stride, dtype=dtype, key=getkey())
    x = jax.random.normal(getkey(), (7, 6, 2), dtype)
    y = conv(x)
    assert y.dtype == dtype and y.shape == (-(-7 // stride), 6 // stride, 3)
    assert conv.bias is not None
    agree(y, stock(x[None], conv.kernel, stride)[0] + conv.bias.reshape(1, 1, 3), 0)
    bound = 1 / np.sqrt(2 * 25)
    assert 0.9 * bound < float(jnp.max(jnp.abs(conv.kernel))) <= float(jnp.asarray(bound, dtype))
    unbiased = Conv2d(2, 3, 5, stride, use_bias=False, dtype=dtype, key=getkey())
    assert unbiased.bias is None and not jnp.any(unbiased(jnp.zeros_like(x)))


def test_the_layer_is_traced_once(getkey):
    traces = []
    step = eqx.filter_jit(lambda conv, x: traces.append(None) or jax.vmap(conv)(x))
    for _ in range(2):
        step(Conv2d(2, 3, key=getkey()), jnp.ones((4, 5, 5, 2)))
    assert len(traces) == 1


def test_bad_input_raises(getkey):
    with pytest.raises(ValueError, match=r"odd kernel_size, got 2.*next odd"):
        Conv2d(1, 1, 2, key=getkey())
    with pytest.raises(ValueError, match="stride 1 or 2, got 3"):
        Conv2d(1, 1, stride=3, key=getkey())  # pyright: ignore
    conv = Conv2d(1, 2, key=getkey())
    with pytest.raises(ValueError, match=r"1 channels.*got \(1, 1, 5, 5\)"):
        conv(jnp.ones((1, 5, 5)))  # channels first
    mixed = Conv2d(1, 2, compute_dtype=jnp.bfloat16, key=getkey())
    for dtype in (jnp.bfloat16, int):
        for each in (conv, mixed):
            with pytest.raises(ValueError, match=r"float32.*(bfloat16|int32)"):
                each(jnp.ones((5, 5, 1), dtype))
    with pytest.raises(ValueError, match="channels last"):
        conv(jnp.ones((2, 5, 5, 1)))  # a batch


def test_compute_dtype_is_that_of_the_products_alone(getkey):
    conv = Conv2d(2, 3, compute_dtype=jnp.bfloat16, key=getkey())
    x = jax.random.normal(getkey(), (4, 5, 2))
    y = conv(x) - conv.bias.reshape(1, 1, 3)
    narrow = stock(x[None].astype(jnp.bfloat16), conv.kernel.astype(jnp.bfloat16))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, narrow[0].astype(jnp.float32), atol=1e-6)

    # 300 evaluations of cotangent 1: in bfloat16 the sum would stop at 256.
    def total(kernel):
        one = eqx.tree_at(lambda conv: conv.kernel, conv, kernel)
        body = lambda sum, _: (sum + jnp.sum(one(jnp.ones((1, 1, 2)))), None)
        return jax.lax.scan(body, jnp.zeros(()), length=300)[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(conv.kernel)[1, 1], 300)


def test_no_image_and_no_channel():
    empty = lambda *shape: jnp.ones(shape)
    y, pull = jax.vjp(jax.jit(conv2d), empty(0, 8, 8, WIDE), empty(3, 3, WIDE, WIDE))
    assert y.shape == (0, 8, 8, WIDE)
    assert [a.shape for a in pull(y)] == [y.shape, (3, 3, WIDE, WIDE)]
    mapped = jax.vmap(conv2d, (0, None))
    assert mapped(empty(2, 3, 4, 4, 0), empty(3, 3, 0, 2)).shape == (2, 3, 4, 4, 2)
    assert mapped(empty(2, 3, 0, 4, 2), empty(3, 3, 2, 2)).shape == (2, 3, 0, 4, 2)


def test_rounding_is_bounded_of_the_sums_alone():
    w, x = jnp.full((3, 3, WIDE, WIDE), 1e-3), jnp.full((1, 8, 8, WIDE), 0.3)
    transposed = lambda z, w: jax.linear_transpose(lambda z: conv2d(z, w), z)(z)[0]
    for conv in (conv2d, transposed):
        fn = lambda z, w, conv=conv: (jnp.tanh(conv(z, w) + x), None)
        for fan_in in (None, 9 * WIDE):
            assert jnp.isinf(rounding(fn, x, w, fan_in))
            for precision in ("highest", "float32"):
                with jax.default_matmul_precision(precision):
                    assert 9 * WIDE * 2.0**-24 < rounding(fn, x, w, fan_in) < 1e-3


def test_a_sharding_in_the_type_is_left_to_jax(getkey):
    """The cotangent of the image; JAX's own cotangent of the kernel asks for a sharding there."""
    w, x = problem(getkey, batch=8)
    f = lambda conv, w, x: jnp.sum(jnp.sin(conv(x, w)))
    expected = jax.value_and_grad(f, 2)(stock, w, x)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))):
        split = jax.device_put(x, P("data"))
        got = jax.jit(jax.value_and_grad(partial(f, conv2d), 1))(w, split)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-5)

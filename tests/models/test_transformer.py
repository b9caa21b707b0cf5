"""The language models: against NumPy in float64, and their own slow ways of doing the same."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest

import deqjax
from deqjax.models import ReversibleTransformer, Transformer
from deqjax.nn import CausalAttention

SMALL = {"width": 16, "heads": 2, "hidden": (24,), "max_steps": 4}
SIZE, LENGTH = 11, 12
RETENTION = paramax.Parameterize(jax.nn.sigmoid, jnp.linspace(-1.0, 1.0, 16))
both_positions = pytest.mark.parametrize("rotary", [False, True])


def build(key, cls=ReversibleTransformer, **options):
    options = SMALL | options
    if cls is Transformer:
        del options["max_steps"]
    return cls(SIZE, LENGTH, key=key, **options)


def tokens(key, n=3, length=LENGTH):
    return jax.random.randint(key, (n, length), 0, SIZE)


def count(model):
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    return sum(x.size for x in leaves)


def test_parameters_of_the_paper(getkey):
    paper = eqx.filter_eval_shape(lambda key: ReversibleTransformer.paper(key=key), getkey())
    sizes = [x.size for x in jax.tree.leaves(paper) if isinstance(x, jax.ShapeDtypeStruct)]
    w, hidden, v, length = 768, 3072, 50_304, 448
    attention, mlp = 4 * w * w, 2 * w * hidden + hidden**2 + 2 * hidden + w
    assert sum(sizes) == 2 * v * w + length * w + attention + mlp + 3 * 2 * w == 94_137_600


def test_the_explicit_twin_has_as_many(getkey):
    assert count(build(getkey())) == count(build(getkey(), Transformer, blocks=1))


def reference(model, tokens, beta=0.5, steps=4):
    """Logits of one sequence by NumPy in float64, with loops for what is a mask in the model."""
    wide = lambda x: np.asarray(x, np.float64)
    ends, cell = model.vocabulary, model.deq.cell
    heads, rotary = cell.attention.heads, cell.attention.rotary

    def norm(layer, x):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + layer.eps)
        return x * wide(layer.weight) + wide(layer.bias)

    def turn(x, place):
        half = len(x) // 2
        angle = place * 10_000.0 ** (-np.arange(half) / half)
        number = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([number.real, number.imag])

    def attend(x):
        q, k, v = np.split(x @ wide(cell.attention.qkv.weight), 3, -1)
        d, out = q.shape[1] // heads, np.zeros_like(q)
        for head in range(heads):
            part = slice(head * d, (head + 1) * d)
            for i in range(len(x)):
                a, b = q[i, part], k[: i + 1, part]
                if rotary:
                    a, b = turn(a, i), np.stack([turn(row, j) for j, row in enumerate(b)])
                weight = np.exp(b @ a / np.sqrt(d))
                out[i, part] = weight @ v[: i + 1, part] / weight.sum()
        return out @ wide(cell.attention.out.weight)

    def gelu(x):
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def f(z, x):
        h = z + attend(norm(cell.norm1, z + x))
        y = norm(cell.norm2, h)
        for layer in cell.mlp[:-1]:
            y = gelu(y @ wide(layer.weight) + wide(layer.bias))
        return h + y @ wide(cell.mlp[-1].weight) + wide(cell.mlp[-1].bias)

    x = math.sqrt(ends.table.shape[1]) * wide(ends.table)[np.asarray(tokens)]
    if ends.positions is not None:
        x = x + wide(ends.positions)[: len(tokens)]
    before = z = np.zeros_like(x)
    for _ in range(steps):
        before, z = z, (1 - beta) * before + beta * f(z, x)
    return norm(ends.norm, z) @ wide(ends.table.T if ends.head is None else ends.head)


@both_positions
@pytest.mark.parametrize("tied", [False, True])
def test_against_numpy(getkey, rotary, tied):
    model = build(getkey(), rotary=rotary, tied=tied)
    batch = tokens(getkey(), length=9)
    logits, ((_, sol),) = eqx.filter_jit(model)(batch)
    assert np.all(sol.stats["num_steps"] == 4) and not np.any(sol.stats["overflow"])
    expected = np.stack([reference(model, row) for row in batch])
    # Four steps of a spacing of 2^-20, that is 1e-6.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def test_rotary_positions_are_relative(getkey):
    """Attention depends on how far back a token is: shifting all positions changes nothing."""
    attention = CausalAttention(16, 2, rotary=True, key=getkey())
    x = jax.random.normal(getkey(), (5, 16))
    cache = jnp.zeros((40, 2, 8))
    here = attention(x)
    moved, _ = attention.extend(x, deqjax.nn.AttentionCache(cache, cache), jnp.asarray(0))
    np.testing.assert_allclose(here, moved, atol=1e-6)
    q, k, _ = attention._project(x, 0)
    q2, k2, _ = attention._project(x, 30)
    scores = lambda q, k: jnp.einsum("ihd,jhd->hij", q, k)
    np.testing.assert_allclose(scores(q, k), scores(q2, k2), atol=1e-4)
    assert not np.allclose(scores(q, k), scores(q, k2), atol=1e-2)


@both_positions
def test_later_tokens_and_batch_mates_change_nothing(getkey, rotary):
    model = eqx.filter_jit(build(getkey(), rotary=rotary))
    batch = tokens(getkey())
    logits, _ = model(batch)
    changed, _ = model(batch.at[0, 7].add(1).at[1].set(0) % SIZE)
    np.testing.assert_array_equal(logits[0, :7], changed[0, :7])
    assert np.abs(logits[0, 7:] - changed[0, 7:]).max(-1).min() > 1e-4
    np.testing.assert_array_equal(logits[2], changed[2])


def loss_and_gradient(model, batch):
    def mean(model):
        logits, _ = model(batch[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return jnp.mean(losses)

    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention in bfloat16 is not strict
        loss, grads = eqx.filter_jit(eqx.filter_value_and_grad(mean))(model)
    return loss, jax.flatten_util.ravel_pytree(eqx.filter(grads, eqx.is_inexact_array))[0]


@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
def test_the_gradient_is_that_of_the_steps_taken(getkey, compute_dtype):
    """To float32's rounding of autodiff through the same steps, in bfloat16 too."""
    key, batch = getkey(), tokens(getkey())
    options = {"compute_dtype": compute_dtype, "max_steps": 12}
    loss, ours = loss_and_gradient(build(key, **options), batch)
    stored = build(key, adjoint=deqjax.RecursiveCheckpointAdjoint(), **options)
    again, theirs = loss_and_gradient(stored, batch)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    # In bfloat16 both round alike but for sums of residuals, taken in another order. No entry is
    # NaN: the reversal ended at z0, bit for bit.
    bound = 3e-6 if compute_dtype is None else 2e-2
    assert jnp.linalg.norm(ours - theirs) < bound * jnp.linalg.norm(theirs)
    if compute_dtype is not None:
        _, wide = loss_and_gradient(build(key, max_steps=12), batch)
        assert jnp.linalg.norm(ours - wide) < 0.05 * jnp.linalg.norm(wide)


@pytest.mark.optimised
@pytest.mark.parametrize(("max_steps", "steps"), [(1, None), (2, 1)])
def test_a_single_step_is_reversed(getkey, max_steps, steps):
    """XLA knows that such a loop has one trip, and would make it part of what surrounds it."""
    solver = deqjax.Reversible(beta=2 / 3, rtol=0.0, atol=0.0, fraction_bits=20)
    sizes = {"width": 32, "heads": 1, "hidden": (32,), "tied": True}
    model = ReversibleTransformer(5, 7, **sizes, solver=solver, max_steps=max_steps, key=getkey())
    batch = jax.random.randint(getkey(), (3, 7), 0, 5)
    loss = lambda model: jnp.sum(model(batch, steps=steps)[0] ** 2)
    grads = eqx.filter_jit(eqx.filter_grad(loss))(model)
    finite = jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), eqx.filter(grads, eqx.is_array))
    assert all(jax.tree.leaves(finite))


def test_the_state_has_room(getkey):
    """The cell adds to z without normalising it: at 20 bits there is ten times the room, still."""
    solver = deqjax.Reversible(beta=0.5, rtol=0.0, atol=0.0, fraction_bits=20)
    model = build(getkey(), width=64, heads=4, hidden=(256,), max_steps=32, solver=solver)
    _, ((_, sol),) = eqx.filter_jit(model)(tokens(getkey()))
    assert 0 < jnp.max(jnp.abs(sol.value)) < 2.0**11 / 10


def test_leaving_the_range_is_reported(getkey):
    narrow = deqjax.Reversible(beta=0.5, rtol=0.0, atol=0.0, fraction_bits=30)  # +-2
    model = build(getkey(), solver=narrow)
    batch = tokens(getkey())
    _, ((_, sol),) = eqx.filter_jit(model)(batch)
    assert jnp.all(sol.result == deqjax.RESULTS.nonlinear_divergence)
    assert jnp.all(sol.stats["overflow"])
    assert jnp.all(model.generate(batch[0, :4], 3) == -1)
    assert jnp.any(jnp.isnan(loss_and_gradient(model, batch)[1]))


def slow(model, prompt, length):
    """The whole sequence again for each token; what stands after it cannot matter."""
    model, row = eqx.filter_jit(model), np.zeros((1, LENGTH), np.int32)
    row[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + length):
        row[0, i] = jnp.argmax(model(row)[0][0, i - 1])
    return row[0, len(prompt) : len(prompt) + length]


@pytest.mark.parametrize("options", [
    {}, {"rotary": True}, {"cls": Transformer, "blocks": 2},
    {"solver": deqjax.FixedPointIteration(rtol=0.0, atol=0.0), "adjoint": deqjax.PhantomAdjoint()},
    {"solver": deqjax.Reversible(rtol=0.0, atol=0.0, beta=RETENTION)},
], ids=["learned", "rotary", "explicit", "picard", "retention"])  # fmt: skip
def test_a_cached_prefix_changes_no_token(getkey, options):
    model, prompt = build(getkey(), **options), tokens(getkey())[0, :5]
    found = model.generate(prompt, 7)
    np.testing.assert_array_equal(found, slow(model, prompt, 7))


def test_sampling_follows_the_distribution(getkey):
    model, prompt = build(getkey()), tokens(getkey())[0, :5]
    logits, _ = model(prompt[None])
    draw = lambda key: model.generate(prompt, 1, temperature=2.0, key=key)[0]
    drawn = jax.vmap(draw)(jax.random.split(getkey(), 4000))
    share = np.bincount(np.asarray(drawn), minlength=SIZE) / 4000
    expected = jax.nn.softmax(logits[0, -1] / 2.0)
    # Five standard deviations of each share.
    assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000))


def test_a_budget_of_steps(getkey):
    """`steps` may be traced, and fewer of them are another model of the same parameters."""
    key, batch = getkey(), tokens(getkey())
    model = build(key)
    logits, ((_, sol),) = eqx.filter_jit(lambda n: model(batch, steps=n))(jnp.asarray(2))
    assert jnp.all(sol.stats["num_steps"] == 2)
    short, _ = build(key, max_steps=2)(batch)
    np.testing.assert_allclose(logits, short, atol=1e-5)


def test_checkpointed_blocks_have_the_same_gradient(getkey):
    key, batch = getkey(), tokens(getkey())
    plain, again = (
        loss_and_gradient(build(key, Transformer, blocks=2, checkpoint=c), batch)[1]
        for c in (False, True)
    )
    np.testing.assert_allclose(plain, again, atol=1e-6)


def test_errors_say_what_to_do(getkey):
    model, prompt = build(getkey()), jnp.arange(5)
    tolerant = build(getkey(), solver=deqjax.Reversible(beta=0.5))
    for call, words in (
        (lambda: model(prompt), r"\(batch, at most 12\), at least one token, got \(5,\)"),
        (lambda: model(jnp.zeros((1, 13), int)), r"at most 12\).*got \(1, 13\)"),
        (lambda: model(jnp.zeros((1, 4))), "integer tokens"),
        (lambda: model.generate(prompt, 8), r"at most 12 positions.*rotary=True"),
        (lambda: model.generate(prompt[:0], 1), "at least one token, got"),
        (lambda: model.generate(prompt[None], 1), "use jax.vmap"),
        (lambda: build(getkey(), Transformer, blocks=0), "at least one block"),
        (lambda: model.generate(prompt, 1, temperature=1.0), "expects a key"),
        (lambda: model.generate(prompt, 1, temperature=-1.0), "number of at least 0"),
        (lambda: tolerant.generate(prompt, 1), "fixed number of steps"),
        (lambda: build(getkey(), heads=3), "heads to divide width"),
        (lambda: model(jnp.zeros((1, 0), int)), "at least one token"),
        (lambda: ReversibleTransformer(0, 5, key=getkey()), "size to be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()

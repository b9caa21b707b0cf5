"""The paper's blocks and models at a size, and what one evaluation of a block has to multiply."""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from deqjax.models import ImplicitResNet, ReversibleTransformer, Transformer
from deqjax.nn import TransformerCell

from bench.blocks import Args, Cell
from bench.gradients import ADJOINTS, solver
from bench.ways import DType, Variant


def unrolled(fn: Callable, params: Sequence[PyTree], z: Array, x: Array, checkpoint: bool) -> Array:
    """Applies so many blocks one after the other, each with its own parameters."""
    one = jax.checkpoint(fn) if checkpoint else fn
    for each in params:
        z = one(z, (each, x))
    return z


def distinct(params: PyTree, count: int) -> tuple[PyTree, ...]:
    """Copies in memory of their own."""
    return tuple(jax.tree.map(jnp.copy, params) for _ in range(count))


class Stack(eqx.Module):
    """Stands where a DEQ does: as many cells as that evaluates one, each with its parameters."""

    cells: tuple[eqx.Module, ...]
    checkpoint: bool = eqx.field(static=True)

    def batch(self, xs: Float[Array, "b h w c"]) -> tuple[Float[Array, "b h w c"], None]:
        fn = lambda z, args: jax.vmap(args[0])(z, args[1])
        return unrolled(fn, self.cells, jnp.zeros_like(xs), xs, self.checkpoint), None


@dataclasses.dataclass(frozen=True)
class Language:
    """`ReversibleTransformer` and its block."""

    width: int
    heads: int
    hidden: tuple[int, ...]
    length: int
    vocabulary: int
    d: int = 2  # 1 - beta = 1/2, as in the paper
    unit: str = "tokens"

    def __str__(self) -> str:
        hidden = "-".join(map(str, self.hidden))
        return f"width {self.width}, {self.heads} heads, MLP {hidden}, length {self.length}"

    def units(self, batch: int) -> int:
        return batch * self.length

    def cells(self, batch: int, dtype: DType, key: PRNGKeyArray) -> list[Cell]:
        k1, k2 = jax.random.split(key)
        options = {"compute_dtype": compute(dtype), "key": k1}
        block = TransformerCell(self.width, self.heads, self.hidden, **options)
        return [_cell("block", block, (batch, self.length, self.width), k2)]

    def flop(self, batch: int) -> list[float]:
        """The products of one f; those of attention are formed whole, above the diagonal too."""
        w = self.width
        sizes = (w, *self.hidden, w)
        weights = 4 * w**2 + sum(i * o for i, o in pairwise(sizes))
        return [2.0 * self.units(batch) * (weights + 2 * self.length * w)]

    def model(self, variant: Variant, n: int, batch: int, dtype: DType, key: PRNGKeyArray) -> Any:
        """`(fn, *inputs)`: the loss of a batch of tokens and its gradient in the parameters."""
        k1, k2 = jax.random.split(key)
        options = {"width": self.width, "heads": self.heads, "hidden": self.hidden, "key": k1}
        options["compute_dtype"] = compute(dtype)
        if variant in ADJOINTS:
            how = {"solver": solver(variant, self.d), "adjoint": ADJOINTS[variant]}
            make, options = ReversibleTransformer, {**options, **how, "max_steps": n}
        else:
            make, options = Transformer, {**options, "blocks": n, "checkpoint": "," in variant}
        params, static = eqx.partition(
            make(self.vocabulary, self.length, **options), eqx.is_inexact_array
        )
        tokens = jax.random.randint(k2, (batch, self.length + 1), 0, self.vocabulary)

        def loss(params: PyTree, tokens: Array) -> Array:
            logits, _ = eqx.combine(params, static)(tokens[:, :-1])
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            return jnp.mean(cross_entropy(logits, tokens[:, 1:]))

        return jax.value_and_grad(loss), params, tokens


@dataclasses.dataclass(frozen=True)
class Images:
    """`ImplicitResNet.multi` and its blocks, one per scale."""

    channels: tuple[int, ...]
    widths: tuple[int, ...]
    pixels: int
    classes: int = 10
    d: int = 5  # 1 - beta = 1/5, as in the paper
    unit: str = "images"

    def __str__(self) -> str:
        channels, widths = ("/".join(map(str, x)) for x in (self.channels, self.widths))
        return f"channels {channels}, widths {widths}, {self.pixels} x {self.pixels} pixels"

    def units(self, batch: int) -> int:
        return batch

    @property
    def _scales(self) -> list[tuple[int, int, int]]:
        """Pixels a side, channels, width."""
        sides = (-(-self.pixels // 2**i) for i in range(len(self.channels)))
        return list(zip(sides, self.channels, self.widths, strict=True))

    def _net(self, dtype: DType, key: PRNGKeyArray, **how: Any) -> tuple[ImplicitResNet, Any]:
        return eqx.nn.make_with_state(ImplicitResNet)(
            (self.pixels, self.pixels, 3),
            self.classes,
            channels=self.channels,
            width=self.widths,
            compute_dtype=compute(dtype),
            key=key,
            **how,
        )

    def cells(self, batch: int, dtype: DType, key: PRNGKeyArray) -> list[Cell]:
        net, _ = self._net(dtype, key)
        made = []
        for i, (side, channels, _) in enumerate(self._scales):
            name, shape = f"{side} x {side}, {channels} channels", (batch, side, side, channels)
            made.append(_cell(name, net.deqs[i].cell, shape, jax.random.fold_in(key, i)))
        return made

    def flop(self, batch: int) -> list[float]:
        """The products of one f of each scale as sums, those with the zeros around an image too."""
        return [2.0 * batch * s**2 * 2 * 9 * c**2 * width for s, c, width in self._scales]

    def model(self, variant: Variant, n: int, batch: int, dtype: DType, key: PRNGKeyArray) -> Any:
        """`(fn, *inputs)`: the loss of a batch of images and its gradient in the parameters."""
        k1, k2, k3 = jax.random.split(key, 3)
        how = {}
        if variant in ADJOINTS:
            how = {"solver": solver(variant, self.d), "adjoint": ADJOINTS[variant], "max_steps": n}
        net, state = self._net(dtype, k1, **how)
        if variant not in ADJOINTS:
            stacks = [Stack(distinct(deq.cell, n), "," in variant) for deq in net.deqs]
            net = eqx.tree_at(lambda net: list(net.deqs), net, stacks)
        params, static = eqx.partition(net, eqx.is_inexact_array)
        images = jax.random.normal(k2, (batch, *net.image_shape))
        labels = jax.random.randint(k3, (batch,), 0, self.classes)

        def loss(params: PyTree, state: Any, images: Array, labels: Array) -> Array:
            logits, _, _ = eqx.combine(params, static)(images, state)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        return jax.value_and_grad(loss), params, state, images, labels


def compute(dtype: DType) -> Any:
    return None if dtype == "float32" else jnp.bfloat16


def _cell(name: str, block: Callable, shape: tuple[int, ...], key: PRNGKeyArray) -> Cell:
    params, static = eqx.partition(block, eqx.is_inexact_array)

    def fn(z: Array, args: Args) -> Array:
        params, x = args
        return jax.vmap(eqx.combine(params, static))(z, x)

    x, cotangent = jax.random.normal(key, (2, *shape))
    return Cell(name, fn, jnp.zeros(shape), (params, x), cotangent)

"""Small models and batches, their gradients by any method, and how two gradients are compared."""

import math
import re
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import Decoder, UniformConfig
from streamjax.models.config import expanded
from streamjax.training import METHODS

ORDERS = ("layer", "chunk")
TWO_METHODS = ("remat", "chunk")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
CONFIG = UniformConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, tie_embeddings=True
)


def random_model(config, dtype="float64", *, stacked=False, seed=0):
    """A decoder whose every parameter is drawn, norms around 1."""
    random = np.random.default_rng(seed)
    make = partial(Decoder, config, dtype=jnp.dtype(dtype), scan_layers=stacked)
    shapes = jax.eval_shape(make, jax.random.key(0))

    def draw(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path) and "weight" in jax.tree_util.keystr(path)
        value = 0.25 * random.standard_normal(leaf.shape) + (norm and 1.0 - expanded(config).norm.offset)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(vocab_size, rows, length, *, packed=False, seed=0):
    """Drawn tokens and weights, some weights 0 and some targets ignored; packed rows hold documents of any length."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
    weights = random.uniform(0.2, 2.0, (rows, length)).astype(np.float32)
    weights[0, : length // 3] = 0.0
    targets = tokens[:, 1:].copy()
    targets[-1, length // 2 : length // 2 + 2 if length > 2 else 0] = -100
    batch = {"tokens": tokens[:, :-1], "targets": targets, "weights": weights}
    if packed:
        ids = np.sort(random.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
        starts = np.stack([np.searchsorted(row, row) for row in ids])
        batch |= {"segment_ids": ids, "positions": (np.arange(length) - starts).astype(np.int32)}
    return batch


def compiled(model, batch, method, **options):
    """A program for loss and gradient, traced anew at each call."""
    found = jax.jit(partial(sj.training.loss_and_grad, method=method, **options))
    return found.lower(model, batch).compile()


def gradient(model, batch, method, **options):
    """Loss and gradient."""
    return compiled(model, batch, method, **options)(model, batch)


def assert_same(found, expected, dtype="float64"):
    """The loss agrees, and each leaf of the gradient, relative to its largest element.

    A leaf whose gradient is nothing but rounding (queries that see one key each) must be so in both.
    """
    assert jax.tree.structure(found[1]) == jax.tree.structure(expected[1])
    assert found[0].dtype == expected[0].dtype
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=TOLERANCE[dtype])
    rights = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected[1])]
    nothing = 100 * np.finfo(dtype).eps * max(np.max(np.abs(right)) for right in rights)
    for (path, mine), leaf, right in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), rights, strict=True
    ):
        assert (mine.dtype, mine.shape) == (leaf.dtype, leaf.shape)
        largest, error = np.max(np.abs(right)), np.max(np.abs(np.asarray(mine, np.float64) - right))
        allowed = TOLERANCE[dtype] * largest if largest > nothing else nothing
        assert error <= allowed, f"{jax.tree_util.keystr(path)}: {error:.1e} of {largest:.1e}"


@lru_cache(maxsize=1)  # what is checked twice in turn is compared with one program
def whole_sequence(config, length, rows, packed, stacked, dtype):
    """A model, a batch, and the loss and gradient of the whole sequence at once."""
    with jax.enable_x64(dtype == "float64"):
        model = random_model(config, dtype, stacked=stacked)
        batch = random_batch(config.vocab_size, rows, length, packed=packed)
        return model, batch, gradient(model, batch, "full")


def check(config, length, *, rows=2, packed=False, stacked=False, dtype="float64", orders=ORDERS, **options):
    """Chunked backprop with `options` gives the gradient of the whole sequence, for a model with `config`."""
    model, batch, expected = whole_sequence(config, length, rows, packed, stacked, dtype)
    with jax.enable_x64(dtype == "float64"):
        for order in orders:
            assert_same(gradient(model, batch, order, **options), expected, dtype)


def largest_array(program):
    """Elements of the largest array in a compiled program."""
    shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
    return max(math.prod(int(size) for size in shape.split(",")) for shape in shapes)


def check_objective(objective, plain, batch, methods=METHODS):
    """By these methods an objective gives the loss and gradient of `plain(logits, batch)`, without all logits.

    Sizes are such that all logits together are larger than everything else. What differs between methods is in "remat",
    which differentiates the loss of a part of the logits, and in "chunk", which writes its derivative out: an objective
    that asks nothing new of them is tried with those two.
    """
    config = CONFIG.replace(vocab_size=401, num_layers=1)
    with jax.enable_x64(True):
        model = random_model(config)
        batch = {name: jnp.asarray(x) for name, x in batch(config.vocab_size).items()}

        def loss(model):
            return plain(sj.forward(model, batch["tokens"]), batch)

        whole = jax.jit(jax.value_and_grad(loss)).lower(model).compile()
        expected, all_logits = whole(model), batch["tokens"].size * config.vocab_size
        assert largest_array(whole) >= all_logits
        for method in methods:
            cut = {"chunk_size": 7} if method in ORDERS else {}
            program = compiled(model, batch, method, objective=objective, logits_chunk=3, **cut)
            assert largest_array(program) < all_logits
            assert_same(program(model, batch), expected)

"""How chunked backprop cuts: the sequence, the logits, the layers; and the dtypes of what it sums over the pieces."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, ORDERS, assert_same, check, gradient, random_batch, random_model


@pytest.fixture(autouse=True)
def always_small_blocks(small_blocks):
    pass


@cache
def whole_sequence():
    """A model with layers of two kinds, stacked but for the last; a batch of packed rows; their gradient."""
    config = CONFIG.replace(num_layers=5, windows=(5, None, 5, None, 5), sinks=1)
    with jax.enable_x64(True):
        model, batch = random_model(config, stacked=True), random_batch(config.vocab_size, 2, 17, packed=True)
        return model, batch, gradient(model, batch, "full")


@cache
def one_layer():
    """A model with one layer, a batch, and their gradient."""
    with jax.enable_x64(True):
        model, batch = random_model(CONFIG.replace(num_layers=1)), random_batch(CONFIG.vocab_size, 2, 17)
        return model, batch, gradient(model, batch, "full")


def same_when_cut(order, *, given=whole_sequence, **options):
    model, batch, expected = given()
    with jax.enable_x64(True):
        assert_same(gradient(model, batch, order, **options), expected)


def test_chunks_of_one_token():
    same_when_cut("layer", given=one_layer, chunk_size=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "chunk_size"),
    [
        ("layer", 1),
        ("chunk", 1),
        ("layer", 16),
        ("chunk", 16),
        ("layer", None),
        ("chunk", None),
    ],
)
def test_chunk_sizes(order, chunk_size):
    """17 tokens in chunks of one, with one token left over, and in one chunk, as by default."""
    same_when_cut(order, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_logits_of_a_part_of_a_chunk(order):
    same_when_cut(order, chunk_size=9, logits_chunk=4)


@pytest.mark.parametrize("segment", rest_slow([2, 4], 2))
def test_segments(segment):
    """Segments of one row and of all rows of layers of two kinds; logits of a part of a chunk at a time."""
    same_when_cut("layer", chunk_size=9, segment=segment, logits_chunk=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "stacked", "segment"),
    [
        pytest.param(7, True, 3, marks=pytest.mark.slow),
        pytest.param(7, True, 50, marks=pytest.mark.slow),
        (3, False, 2),
    ],
)
def test_segments_of_layers_of_one_kind(layers, stacked, segment):
    """Segments that do not divide the layers, and one of more layers than there are."""
    check(CONFIG.replace(num_layers=layers), 7, chunk_size=4, orders=("layer",), segment=segment, stacked=stacked)


@pytest.mark.covering
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("option", "part"), [("kv_grad_dtype", "mixer_norm"), ("grad_dtype", "norm")])
def test_sums_over_chunks_have_the_dtype_that_was_asked_for(order, option, part):
    """In a float64 model the error is as large as float32's rounding, and no larger."""
    with jax.enable_x64(True):
        model, batch, (_, expected) = one_layer()
        _, found = gradient(model, batch, order, chunk_size=5, **{option: jnp.float32})
        errors = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(a))), expected, found)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(found))
        leaves = jax.tree_util.tree_leaves_with_path(errors)
        assert 1e-9 < max(error for path, error in leaves if part in jax.tree_util.keystr(path)) < 1e-6

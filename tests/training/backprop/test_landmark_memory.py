"""Gradients of models with a chunk memory: the same by every method, and through the encoder and the choice too."""

from functools import cache

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import HSAConfig, ModelConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, GatedDeltaConfig, SSDConfig
from streamjax.training.backprop.log_probs import token_log_probs
from tests.covering import rest_slow
from tests.training.gradient_checks import CONFIG, assert_same, gradient, random_batch, random_model

SHARED = CONFIG.replace(
    num_layers=3, windows=(5,) * 3, hsa=HSAConfig(layers=(1, 2), memory_layers=(0,), chunk_size=4, top_k=2)
)
TWO_READERS = SHARED.replace(
    num_layers=2, windows=(5,) * 2, hsa=HSAConfig(layers=(0, 1), memory_layers=(0,), chunk_size=4, top_k=2)
)
OWN = CONFIG.replace(
    num_layers=3,
    windows=(4, None, 4),
    parallel_residual=True,
    hsa=HSAConfig(layers=(0, 1, 2), memory_layers=(0, 2), chunk_size=3, top_k=9, encoder_layers=2),
)
MLP = DenseConfig(24)
RAMBA = ModelConfig(  # recurrent layers that remember and read, without an MLP and with one
    31,
    16,
    (
        BlockConfig(SSDConfig(4, 2, head_dim=4, state_dim=4), None),
        BlockConfig(GatedDeltaConfig(4, 2, key_dim=4, value_dim=4), MLP),
    ),
    hsa=HSAConfig((0, 1), (0,), chunk_size=4, top_k=2, attention=AttentionConfig(4, 2, 4), mlp=MLP),
)


@cache
def whole_sequence(config, packed):
    """A model, a batch, and their gradient in float64."""
    with jax.enable_x64(True):
        model, batch = random_model(config), random_batch(31, 2, 29, packed=packed)
        return model, batch, gradient(model, batch, "full")


@pytest.mark.parametrize(
    ("config", "method", "chunk_size", "packed"),
    [
        pytest.param(SHARED, "remat", None, False, marks=pytest.mark.slow),
        pytest.param(SHARED, "layer", 8, False, marks=pytest.mark.slow),
        pytest.param(SHARED, "chunk", 8, False, marks=pytest.mark.slow),
        pytest.param(SHARED, "chunk", 8, True, marks=pytest.mark.slow),
        (TWO_READERS, "layer", 11, True),
        pytest.param(SHARED, "layer", 11, True, marks=pytest.mark.slow),
        pytest.param(SHARED, "chunk", 29, True, marks=pytest.mark.slow),
        pytest.param(OWN, "layer", 6, False, marks=pytest.mark.slow),
        pytest.param(RAMBA, "chunk", 8, True, marks=pytest.mark.slow),
        pytest.param(RAMBA, "layer", 8, True, marks=pytest.mark.slow),
        pytest.param(OWN, "chunk", 6, True, marks=pytest.mark.slow),
    ],
)
def test_every_method_gives_the_gradient(config, method, chunk_size, packed):
    """In float64, for chunks that do and do not hold whole pages, and lengths that end inside a page."""
    with jax.enable_x64(True):
        model, batch, expected = whole_sequence(config, packed)
        assert_same(gradient(model, batch, method, chunk_size=chunk_size), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"segment": 2}, {"segment": 3, "offload": "host", "offload_fraction": 0.5}])
def test_segments_and_offload_keep_the_gradient(options):
    with jax.enable_x64(True):
        model, batch, expected = whole_sequence(SHARED, False)
        assert_same(gradient(model, batch, "layer", chunk_size=8, **options), expected)


def test_the_gradient_reaches_every_part_of_the_memory():
    """No array of the encoder and of the readers is left out."""
    _, _, (_, grads) = whole_sequence(TWO_READERS, True)
    for block in grads.layers:
        for part in (block.encoder, block.reader):
            for path, leaf in jax.tree_util.tree_leaves_with_path(part):
                assert np.abs(leaf).max() > 1e-8, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", rest_slow([None, 6], 6))
def test_log_probabilities_are_those_of_the_whole_sequence(chunk_size):
    """What DPO and GRPO compare with."""
    with jax.enable_x64(True):
        model, batch = random_model(OWN), random_batch(31, 2, 29, packed=True)
        batch["weights"] *= batch["targets"] >= 0
        found = token_log_probs(model, batch, chunk_size=chunk_size)
        logits = sj.forward(model, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        logp = jax.nn.log_softmax(logits)
        right = np.take_along_axis(np.asarray(logp), np.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(found, np.where(batch["weights"] != 0, right, 0), atol=1e-10)

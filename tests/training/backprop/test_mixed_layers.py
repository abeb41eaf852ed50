"""Layers with dense MLPs and layers with experts in one model: counted, saved, trained in every order."""

import jax
import pytest

import streamjax as sj
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, ModelConfig
from tests.training import gradient_checks

DENSE, SPARSE = DenseConfig(12), ExpertsConfig(4, 2, 6, shared=DenseConfig(5), shared_gate=True)
ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
MIXED = ModelConfig(
    vocab_size=31,
    d_model=8,
    blocks=tuple(BlockConfig(mixer=ATTENTION, mlp=mlp) for mlp in (DENSE, SPARSE, DENSE, SPARSE)),
)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stacked", [False, True])
def test_layers_of_both_kinds_in_one_model(stacked):
    config = MIXED if stacked else MIXED.replace(blocks=MIXED.blocks[:2])
    assert config.period == 2
    model = sj.Decoder(config, jax.random.key(0), scan_layers=stacked)
    assert config.parameter_count == sum(leaf.size for leaf in jax.tree.leaves(model))
    assert ModelConfig.from_json_dict(config.to_json_dict()) == config
    gradient_checks.check(config, 13, packed=True, stacked=stacked, orders=("remat",))
    gradient_checks.check(config, 13, packed=True, stacked=stacked, chunk_size=6)

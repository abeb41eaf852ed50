"""Streams of models with experts, or with latent attention: dense ones give `forward`, the others follow the published
algorithm."""

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.architectures import tiny_config
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream

LENGTH = 25


@pytest.mark.slow  # tests/models/families/test_streams.py compares the same
@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_streams(case):
    model = build(tiny_config(case))
    tokens = random_tokens(2, LENGTH) % model.config.vocab_size
    dense = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=2)
    _, logits = read_stream(model, dense, tokens, [1, 9])
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4, rtol=0)
    bounded = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=5))
    _, logits = read_stream(model, bounded, tokens[:1], [1, 9])
    np.testing.assert_allclose(logits[0], oracle.run(model, tokens[0], oracle.Rule(2, 5)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "shared"),
    [
        ("dense", {"capacity": 40}, True),
        ("streaming_llm", {"sinks": 4, "window": 36}, True),
        ("quest", {"sinks": 2, "window": 8, "page": 4, "top_k": 2, "capacity": 40}, False),
    ],
)
def test_a_cache_of_latents_keeps_one_key_a_token(name, options, shared):
    """Its rotary channels and its latent, which is the value too; tiers of pages keep it twice."""
    config = tiny_config("deepseek_v3")
    mixer = config.blocks[0].mixer
    state = sj.init_state(build(config), sj.kv.preset(name, **options))
    slots = state.caches[0].slots
    wide = sum(x.size for x in jax.tree.leaves(state.layers[0]) if x.ndim == 4)
    channels, apart = mixer.rope_dim + mixer.kv_rank, options.get("sinks", 0)  # first tokens wait beside the ring
    assert wide <= (slots + apart) * channels if shared else wide >= 2 * slots * channels

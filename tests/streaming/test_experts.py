"""Streams of models with experts: dense ones give `forward`, the others follow the published algorithm."""

import numpy as np
import pytest

import streamjax as sj
from tests.architectures import tiny_config
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream

LENGTH = 25


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_streams(case):
    model = build(tiny_config(case))
    tokens = random_tokens(2, LENGTH) % model.config.vocab_size
    dense = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=2)
    _, logits = read_stream(model, dense, tokens, [1, 9])
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4, rtol=0)
    bounded = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=5))
    _, logits = read_stream(model, bounded, tokens[:1], [1, 9])
    np.testing.assert_allclose(logits[0], oracle.run(model, tokens[0], oracle.Rule(2, 5)), atol=1e-4, rtol=0)

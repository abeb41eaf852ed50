"""Streams of every architecture: dense ones are `forward`, sinks and a window are the oracle's StreamingLLM."""

import numpy as np
import pytest

import streamjax as sj
from tests.architectures import CASES, changes_with_length, tiny_config
from tests.covering import rest_slow
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import build, random_tokens, read_stream

LENGTH, SINKS, WINDOW = 24, 2, 6
WIDTHS = [5, 1]  # chunks, and single tokens in between
# The layouts of older families are those of the oracle's own tests (tests/streaming/test_oracle.py).
OLDER = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "falcon", "mpt")
# The layers of qwen3_next, mamba2, gpt_oss, deepseek_v3 and gemma4.
REPEATED = ("qwen3_5", "granitemoehybrid", "mixtral", "qwen3_moe", "deepseek_v2", "olmo3", "exaone4", "cohere2")
REPEATED += ("granite", "ministral3", "glm4", "starcoder2", "smollm3", "lfm2_moe", "qwen3_5_moe", "olmo_hybrid")
REPEATED += ("nemotron_h", "qwen2_moe", "falcon_h1", "kimi_linear", "olmo2")
REPEATED += ("rwkv7", "gla")  # tests/models/mixers/test_linear_mixers.py
SLOW = {"gemma4-experts", "gemma4-shared", *(case for case in CASES if case.split("-")[0] in OLDER + REPEATED)}
DENSE = ("gemma4", "llama4", "gpt_oss")  # keys that are values, chunks, and windows with sinks beside a dense cache
ALL = [case for case in CASES if not changes_with_length(tiny_config(case))]
NAMES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in ALL]


@pytest.mark.parametrize("case", NAMES)
def test_sinks_and_a_window_are_the_oracles(case):
    config = tiny_config(case)
    model, tokens = build(config), random_tokens(1, LENGTH) % config.vocab_size
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=SINKS, window=WINDOW))
    _, logits = read_stream(model, state, tokens, WIDTHS)
    expected = oracle.run(model, tokens[0], oracle.Rule(SINKS, WINDOW))
    np.testing.assert_allclose(logits[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", rest_slow(ALL, *DENSE))
def test_a_dense_stream_is_the_whole_sequence(case):
    config = tiny_config(case)
    model, tokens = build(config), random_tokens(2, LENGTH) % config.vocab_size
    dense = sj.init_state(model, sj.kv.preset("dense", capacity=LENGTH), batch_size=2)
    _, logits = read_stream(model, dense, tokens, [6])
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4, rtol=0)

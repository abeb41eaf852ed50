"""Streams against the published algorithm, written out slowly in float64 (tests/oracles/streaming_llm.py)."""

import numpy as np
import pytest

import streamjax as sj
from tests.oracles import streaming_llm as oracle
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, PARTIAL, build, random_tokens, read_stream

MODELS = {"gqa": GQA, "local": LOCAL, "alibi": ALIBI, "partial": PARTIAL}
SINKS, WINDOW, LENGTH = 3, 8, 39
FUSED = sj.kv.preset("streaming_llm", sinks=SINKS, window=WINDOW)
PLAIN = sj.kv.Cascade(sj.kv.Sink(SINKS), sj.kv.Window(WINDOW), fuse=False)
STREAMING = oracle.Rule(SINKS, WINDOW)
CASES = [
    pytest.param("gqa", FUSED, STREAMING, 1, marks=pytest.mark.quick),
    pytest.param("alibi", FUSED, STREAMING, 1, marks=pytest.mark.slow),
    ("alibi", PLAIN, STREAMING, 13),
    ("partial", FUSED, STREAMING, 13),
    ("local", FUSED, STREAMING, 1),
    pytest.param("gqa", sj.kv.preset("window", window=WINDOW), oracle.Rule(0, WINDOW), 1, marks=pytest.mark.slow),
    ("gqa", sj.kv.Cascade(sj.kv.Sink(SINKS), sj.kv.Window(3), sj.kv.Window(WINDOW - 3)), STREAMING, 13),
    pytest.param(
        *("partial", sj.kv.Cascade(sj.kv.Window(5), sj.kv.Full(LENGTH - 5)), oracle.DENSE, 13), marks=pytest.mark.slow
    ),
]


@pytest.fixture(scope="module")
def case():
    """Models and oracle runs, each made once."""
    models, runs = {}, {}
    tokens = random_tokens(1, LENGTH)

    def get(name: str, rule: oracle.Rule):
        if name not in models:
            models[name] = build(MODELS[name])
        if (name, rule) not in runs:
            runs[name, rule] = oracle.run(models[name], tokens[0], rule)
        return models[name], tokens, runs[name, rule]

    return get


@pytest.mark.parametrize(("name", "cache", "rule", "chunk"), CASES)
def test_stream_follows_the_published_algorithm(case, name, cache, rule, chunk):
    model, tokens, expected = case(name, rule)
    _, logits = read_stream(model, sj.init_state(model, cache), tokens, [chunk])
    np.testing.assert_allclose(logits[0], expected, atol=1e-4, rtol=0)


@pytest.mark.quick
@pytest.mark.parametrize("name", list(MODELS))
def test_the_comparison_would_notice_small_differences(case, name):
    """A window longer or shorter by one, a sink more, sinks at their true distance: each moves logits by over 1e-2."""
    _, _, expected = case(name, STREAMING)
    longer, shorter = oracle.Rule(SINKS, WINDOW + 1), oracle.Rule(SINKS, WINDOW - 1)
    for other in (longer, shorter, oracle.Rule(SINKS + 1, WINDOW), oracle.Rule(SINKS, WINDOW, shift=False)):
        _, _, logits = case(name, other)
        assert np.abs(logits - expected)[SINKS + WINDOW + 2 :].max() > 1e-2

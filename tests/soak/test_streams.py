"""Millions of tokens through one process, which neither grows nor keeps an array."""

import os

import pytest

from tests.streaming.test_memory import drift, memory_of_a_stream

# One of each kind: sinks and a ring, a ring alone, pages that queries choose, a score that collects, clusters.
STREAMS = {
    "streaming_llm": 12_000_000,
    "window": 2_100_000,
    "quest:capacity=2048": 2_100_000,
    "h2o:window=64,size=448": 2_100_000,
    "retro_infer:capacity=2048": 2_100_000,
}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SOAK"), reason="make soak has these; weekly a million tokens of every preset")
@pytest.mark.parametrize("cache", STREAMS)
def test_a_stream_of_millions_leaves_memory_flat(tmp_path, cache):
    """A model of one layer. Keeping the scores of its stretches, 33 kB each, would add 4 MB."""
    figures = memory_of_a_stream(tmp_path, cache, STREAMS[cache], "--tiny")
    assert len(set(figures["arrays"])) == 1
    assert drift(figures["resident"]) < 500_000
    if None not in figures["heap"]:
        assert drift(figures["heap"]) < 100_000

"""States of one row: parked and resumed, put and taken, and forked at the borders of chunks, all bit for bit."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.serving.batch import Batch
from streamjax.serving.row_states import put_row, take_row
from tests.architectures import tiny_config
from tests.covering import rest_slow
from tests.serving.engines import bytes_model
from tests.streaming.tiny_models import build, random_tokens
from tests.streaming.tiny_sessions import CACHE

CHUNK = 8
SMALL = {
    "streaming_llm": {"window": 14, "sinks": 2},
    "dense": {"capacity": 40},
    "h2o": {"size": 8, "window": 6, "every": 4},
    "quest": {"capacity": 32},
    "staircase": {},
}


def bits(state) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def check(model, cache) -> None:
    """A stream that is read whole, parked at a border, in a row beside another one: the same bits everywhere."""
    batch = Batch(model, cache, rows=2, chunk_size=CHUNK, block=1)
    ids = random_tokens(3 * CHUNK + 5) % model.config.vocab_size
    fresh, parked = batch.parking.empty, []
    for start in range(0, len(ids), CHUNK):
        fresh, _ = batch.read(fresh, ids[start : start + CHUNK])
        parked.append(batch.parking.park(fresh))
        assert bits(batch.parking.resume(parked[-1])) == bits(fresh)
    assert parked[0].nbytes <= parked[-1].nbytes <= fresh.cache_bytes
    fork = batch.parking.resume(parked[1])
    for start in range(2 * CHUNK, len(ids), CHUNK):
        fork, _ = batch.read(fork, ids[start : start + CHUNK])
    assert bits(fork) == bits(fresh)
    other = batch.parking.resume(parked[0])
    both = put_row(put_row(batch.state, np.int32(1), fresh), np.int32(0), other)
    assert bits(take_row(both, np.int32(1))) == bits(fresh)
    assert bits(take_row(both, np.int32(0))) == bits(other)


def test_streams_of_sinks_and_windows():
    check(bytes_model(), CACHE)


@pytest.mark.parametrize("case", rest_slow(["qwen3_next", "llama4"], "qwen3_next"))
def test_streams_of_recurrent_and_chunked_layers(case):
    check(build(tiny_config(case)), CACHE)


@pytest.mark.parametrize("name", rest_slow(SMALL, "streaming_llm", "dense"))
def test_streams_of_presets(name):
    check(bytes_model(), sj.kv.preset(name, **SMALL[name]))


def test_a_short_stream_takes_little():
    batch = Batch(bytes_model(), sj.kv.preset("dense", capacity=2048), rows=1, chunk_size=CHUNK, block=1)
    state, _ = batch.read(batch.parking.empty, np.arange(8, dtype=np.int32))
    assert batch.parking.park(state).nbytes < batch.cache_bytes / 50

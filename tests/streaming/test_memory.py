"""Constant memory: the compiled step and the state are the same at token 10 and at token 10,000,000, and no cache is
copied when a token is read."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from benchmarks.caches.a_million_by_preset import endless_presets
from benchmarks.caches.million_tokens import CACHES as CACHES_OF_A_MILLION
from benchmarks.caches.million_tokens import quarters, tiny_model
from tests.streaming.tiny_models import GQA, build, random_tokens

SLOTS = 1024
CACHES = {
    "fused": sj.kv.preset("streaming_llm", sinks=4, window=SLOTS - 4),
    "plain": sj.kv.Cascade(sj.kv.Sink(4), sj.kv.Window(SLOTS - 4), fuse=False),
    "window": sj.kv.preset("window", window=SLOTS),
    "chunk": sj.kv.CurrentChunk(SLOTS),
    "dense": sj.kv.preset("dense", capacity=SLOTS),
    "pages": sj.kv.Cascade(sj.kv.Window(32), sj.kv.Pages(16, SLOTS, 8)),
    "noted": sj.kv.Cascade(sj.kv.Window(SLOTS), sj.kv.Pages(16, SLOTS, 8, sj.kv.Representative(2))),
    "content": sj.kv.Cascade(sj.kv.Window(32), sj.kv.ContentPages(16, SLOTS, 8, sj.kv.EndTokens((3, 7)))),
    "scored": sj.kv.Cascade(sj.kv.Window(32), sj.kv.Scored(SLOTS - 64, sj.kv.H2O())),
    "evicted once": sj.kv.Cascade(
        sj.kv.Window(32),
        sj.kv.StaticEviction(32, sj.kv.H2O()),
        sj.kv.Pages(16, SLOTS, 8, sj.kv.BlendedBounds(), coarse=sj.kv.Coarse(8)),
    ),
    "key norms": sj.kv.Cascade(sj.kv.Window(32), sj.kv.Scored(SLOTS - 64, sj.kv.KNorm())),
    "clusters": sj.kv.Cascade(sj.kv.Window(32), sj.kv.Clusters(32, SLOTS, 4, 4)),
    "shared front": (
        sj.kv.SharedFront(
            2,
            ((1,), sj.kv.Cascade(sj.kv.Sink(4, 2**30), sj.kv.Window(SLOTS - 4), sj.kv.Pages(16, SLOTS, 8))),
            ((0,), sj.kv.Cascade(sj.kv.Sink(4, 2**30), sj.kv.Window(SLOTS - 4))),
        ),
    ),
}

# Of scored slots the compiler counts what a choice reads too, every 64 tokens: notes, or keys once more.
BYTES_ACCESSED = {"fused": 1.45, "plain": 1.45, "dense": 1.45, "scored": 1.7, "key norms": 2.0}


@pytest.fixture(scope="module")
def model():
    """Heads wide enough that a cache is far larger than one token's logits over its slots."""
    return build(GQA.replace(head_dim=32, num_layers=1))


def state_bytes(state) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def at(state: sj.StreamState, token: int) -> sj.StreamState:
    """A stream that stands at `token`."""
    return dataclasses.replace(
        state, seen=jnp.full_like(state.seen, token), position=jnp.full_like(state.position, token)
    )


REPEATED = ("plain", "key norms", "evicted once")  # as "fused", "scored" and "pages"


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        *(
            pytest.param(name, 1, marks=pytest.mark.slow if name in REPEATED else ())
            for name in CACHES
            if name != "window"
        ),
        *((name, 3) for name in ("fused", "chunk", "pages", "clusters", "scored")),
    ],
)
def test_a_decode_step_keeps_its_donated_caches_in_place(model, untyped, name, batch):
    """Every byte of the state is aliased, no instruction copies a cache, and what else the step needs is small."""
    state = sj.init_state(model, CACHES[name], batch_size=batch)
    cache = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    compiled = sj.step.lower(model, state, np.zeros((batch, 1), np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == state_bytes(state)
    assert memory.temp_size_in_bytes < cache / (1 if name == "clusters" else 2)
    made = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|concatenate|pad|convert)\(", compiled.as_text())
    assert made, "the pattern should find some instructions"
    assert max(4 * np.prod([int(n) for n in shape.split(",")]) for shape in made) < cache / 2
    if batch == 1 and name in BYTES_ACCESSED:  # of a few pages the compiler counts all that they are of
        # weights and slots once, and the logits over the slots: a copy of keys or of values would add 2/2
        read = state_bytes(state) + state_bytes(model)
        assert compiled.cost_analysis()["bytes accessed"] < BYTES_ACCESSED[name] * read


def test_a_chunk_is_written_without_copying_a_cache(model, untyped):
    """Also where a run wraps around the end of a ring: two writes to each buffer."""
    state = sj.init_state(model, CACHES["window"])
    cache = max(leaf.nbytes for leaf in jax.tree.leaves(state))
    compiled = sj.step.lower(model, state, np.zeros((1, 4), np.int32)).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == state_bytes(state)
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(4 * np.prod([int(n) for n in shape.split(",")]) < cache / 2 for shape in copied)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["fused", "plain", "chunk", "pages"])
def test_token_ten_million_runs_the_program_of_token_ten(model, name):
    """One compiled program and one size of state, at token 10, at 10,000,000 and across 2^32; inputs are consumed."""
    state, token = sj.init_state(model, CACHES[name]), np.ones((1, 1), np.int32)
    size = state_bytes(state)
    state, _ = sj.step(model, at(state, 10), token)
    programs = sj.step._cache_size()
    for where in (10, 10_000_000, 2**30):
        before = at(state, where)
        state, logits = sj.step(model, before, token)
        assert np.isfinite(logits).all()
        assert state_bytes(state) == size
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert sj.step._cache_size() == programs


@pytest.mark.quick
def test_a_stream_of_any_lengths_compiles_a_handful_of_programs():
    """`read` pads to powers of two: dozens of lengths, few programs."""
    from streamjax.streaming.by_layer.layerwise import layer_over

    model = build(GQA.replace(num_layers=2))
    state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=9))
    layer_over.clear_cache()  # another test may have read such chunks
    lengths = *range(1, 10), 31, 32
    for length in lengths:
        state = sj.read(model, state, random_tokens(1, length), 4)
    assert 0 < layer_over._cache_size() <= 3  # widths 1, 2 and 4, both layers alike
    assert int(state.seen[0]) == sum(lengths)


def memory_of_a_stream(tmp_path: pathlib.Path, cache: str, tokens: int, *options: str) -> dict:
    """What `benchmarks.caches.million_tokens` notes after every stretch of one stream, in a process of its own."""
    root, file = pathlib.Path(__file__).parents[2], tmp_path / "million_tokens.json"
    command = [sys.executable, "-m", "benchmarks.caches.million_tokens", "--caches", cache, "--tokens", str(tokens)]
    command += [*options, "--output", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # optimised: it runs long
    subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    figures = json.loads(file.read_text())["bytes_after_stretches"][cache]
    assert figures["tokens_seen"] == figures["tokens"] >= tokens
    assert np.isfinite(figures["nats_per_token"])
    return figures


def drift(series: list[int]) -> float:
    """From the second to the last quarter."""
    medians = quarters(series)
    return medians[3] - medians[1]


@pytest.mark.slow
def test_stretches_of_a_stream_leave_nothing_behind(tmp_path):
    """No array, and next to nothing on the C library's heap."""
    figures = memory_of_a_stream(tmp_path, "streaming_llm", tokens=1)
    assert len(set(figures["arrays"])) == 1
    if None not in figures["heap"]:
        assert drift(figures["heap"]) < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("cache", CACHES_OF_A_MILLION)
def test_a_million_tokens_leave_resident_memory_flat(tmp_path, cache):
    """Half a million tokens after the first quarter add less than half a megabyte to the process, and no array.

    Keeping the scores of the stretches, 33 kB each, would add 2 MB.
    """
    figures = memory_of_a_stream(tmp_path, cache, 10**6)
    assert figures["tokens"] > 10**6
    assert len(set(figures["arrays"])) == 1
    assert drift(figures["resident"]) < 500_000
    if None not in figures["heap"]:
        assert drift(figures["heap"]) < 100_000


@pytest.mark.slow
@pytest.mark.parametrize("cache", endless_presets())
def test_a_million_tokens_under_every_endless_preset(tmp_path, cache):
    """Of a model of one layer: no array is left behind, and the process does not grow."""
    figures = memory_of_a_stream(tmp_path, cache, 10**6, "--tiny")
    assert len(set(figures["arrays"])) == 1
    assert drift(figures["resident"]) < 500_000
    name, options = sj.kv.parse_preset(CACHES_OF_A_MILLION.get(cache, cache))
    assert figures["cache_bytes"] == sj.kv.describe(sj.kv.preset(name, **options), tiny_model()).total

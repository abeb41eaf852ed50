"""Memory in use against caches of just that size, and the process's against an array."""

import subprocess
import sys

import jax

import streamjax as sj
from streamjax.evaluation import SlotMemory, memory, peak_resident_bytes
from streamjax.streaming.state import empty_state
from tests.architectures import tiny_config

CONFIG = sj.UniformConfig(
    vocab_size=8, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, windows=(6, None)
)
MODEL = jax.jit(lambda key: sj.Decoder(CONFIG, key))(jax.random.key(0))


def test_a_cache_in_use_takes_what_a_cache_of_that_size_takes():
    memory = SlotMemory.from_state(sj.init_state(MODEL, sj.kv.preset("dense", capacity=1000), batch_size=3))
    assert memory.slots == (5, 1000)
    for tokens in (1, 5, 100, 1000):
        exact = 0
        for slots in (min(tokens, 5), tokens):
            exact += slots * (2 * 4 * 4 + 4)  # keys and values of one head, float32, and the position
        assert abs(memory.in_use(tokens) - exact) <= 2 * 8  # a share of two counters a layer
    assert memory.in_use(0) == 0
    assert memory.in_use(5000) == memory.in_use(1000) == memory.allocated


def test_what_is_allocated_is_what_the_layers_hold():
    state = sj.init_state(MODEL, sj.kv.preset("streaming_llm", sinks=2, window=30), batch_size=1)
    total = sum(leaf.nbytes for layer in state.layers for leaf in jax.tree.leaves(layer))
    assert abs(SlotMemory.from_state(state).allocated - total) <= 1


def test_the_peak_is_never_below_what_there_is(monkeypatch):
    """The kernel notes it late: a summary said 366 MB, at most 365 MB."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 10**15)
    assert peak_resident_bytes() == 10**15


FOLLOWING = """
import numpy as np
from streamjax.evaluation import peak_resident_bytes, resident_bytes
before = resident_bytes()
array = np.ones(100_000_000, np.uint8)
assert 90e6 < resident_bytes() - before < 150e6
assert peak_resident_bytes() >= resident_bytes() * 0.95
del array
assert resident_bytes() - before < 50e6
"""


def test_resident_memory_follows_an_array():
    """In a process of its own: what other tests left in this one comes and goes meanwhile."""
    subprocess.run([sys.executable, "-c", FOLLOWING], check=True)


def test_a_recurrent_state_is_there_from_the_first_token_on():
    """And a layer that reads another's keys holds nothing."""

    def state_of(case):
        shapes = jax.eval_shape(lambda: sj.Decoder(tiny_config(case), jax.random.key(0)))
        return empty_state(shapes, sj.kv.preset("dense", capacity=100))

    state = state_of("mamba2")
    held, memory = sum(leaf.nbytes for leaf in jax.tree.leaves(state.layers)), SlotMemory.from_state(state)
    assert (memory.in_use(0), memory.in_use(1), memory.in_use(100), memory.allocated) == (0, held, held, held)
    assert SlotMemory.from_state(state_of("gemma4-shared")).slots == (5, 100)

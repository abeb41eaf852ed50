"""How much of layers' inputs can be moved to the host's memory without costing time."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.tiny import get_config
from streamjax.models.config import UniformConfig
from streamjax.training import BackpropConfig, train
from streamjax.training.backprop.planning import host_transfers
from streamjax.training.backprop.planning.host_transfers import Rates, hidden_fraction, measure_rates
from streamjax.training.run import loop

QWEN = UniformConfig(
    vocab_size=151_936, d_model=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64, mlp_dim=4864
)
V5E = Rates(to_host=3e10, from_host=3e10, flops=2e14)
ROOM = 1e15


def fraction(rates=V5E, length=32_768, config=QWEN, **options):
    return hidden_fraction(config, rates, batch_size=1, length=length, host_bytes=ROOM, **options)


def test_it_follows_from_bytes_bandwidth_and_compute_time():
    """By hand: one layer's forward pass in operations, its input in bytes."""
    tokens, chunk = 32_768, 2048
    parameters = 896 * 64 * (14 + 2 * 2) + 14 * 64 * 896 + 3 * 896 * 4864 + 2 * 896
    flops = 2 * tokens * parameters + 4 * 14 * 64 * tokens * (tokens + 1) / 2
    expected = flops / 2e14 * 3e10 / (tokens * 896 * 2)
    assert expected > 0.1
    assert fraction() == min(1.0, int(expected * tokens / chunk) / (tokens / chunk))
    slow = Rates(to_host=3e9, from_host=3e10, flops=2e14)
    assert fraction(slow) == int(expected / 10 * 16) / 16
    assert (
        fraction(Rates(3e10, 2e9, 2e14)) == int(expected / 15 * 1.5 * 16) / 16
    )  # fetched twice in three times as long


@given(st.floats(1e8, 1e12), st.floats(1e8, 1e12), st.floats(1e11, 1e16), st.integers(1, 300_000), st.integers(1, 8))
def test_more_bandwidth_more_tokens_and_slower_compute_never_move_less(to_host, from_host, flops, length, rows):
    rates = Rates(to_host, from_host, flops)
    known = {"batch_size": rows, "host_bytes": ROOM, "chunk_size": min(64, length)}
    found = hidden_fraction(QWEN, rates, length=length, **known)
    chunks = -(-length // known["chunk_size"])
    assert 0 <= found <= 1
    assert (found * chunks) == pytest.approx(round(found * chunks))
    for better in (rates._replace(to_host=2 * to_host, from_host=2 * from_host), rates._replace(flops=flops / 2)):
        assert hidden_fraction(QWEN, better, length=length, **known) >= found
    known["host_bytes"] = 24 * rows * length * 896 * 2 / 4  # room for a quarter
    assert hidden_fraction(QWEN, rates, length=length, **known) <= 0.25 + 1e-9


def test_windows_and_devices_that_share_a_layer_leave_less_time():
    windowed = dataclasses.replace(QWEN, windows=(1024,) * 24)
    rates = Rates(3e9, 3e9, 2e14)
    assert fraction(rates, config=windowed, length=262_144) < fraction(rates, length=262_144)
    assert fraction(rates, shards=4) < fraction(rates)


def test_a_run_measures_says_and_takes_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(host_transfers, "_SIZE", 64)
    monkeypatch.setattr(host_transfers, "_BYTES", 2**16)
    assert all(rate > 0 for rate in measure_rates(jnp.float32))
    taken = {}

    def make(optimizer, **options):
        taken.update(options)
        raise InterruptedError

    monkeypatch.setattr(loop, "measure_rates", lambda dtype: Rates(1e9, 1e9, 1e11))
    monkeypatch.setattr(loop, "make_train_step", make)
    backprop = BackpropConfig(method="layer", chunk_size=32, offload="host", offload_fraction="auto")
    with caplog.at_level("INFO", logger="streamjax"), pytest.raises(InterruptedError):
        train(dataclasses.replace(get_config(), backprop=backprop), tmp_path / "run", progress=False)
    assert f"offload_fraction {taken['offload_fraction']:g} (1 and 1 GB/s" in caplog.text
    assert taken["offload_fraction"] in (0.25, 0.5, 0.75, 1.0)
    with pytest.raises(ValueError, match='set offload to "host"'):
        BackpropConfig(method="layer", offload_fraction="auto")

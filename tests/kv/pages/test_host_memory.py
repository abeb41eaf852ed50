"""Pages in the host's memory: the same numbers as in the device's, and keys and values that really lie there.

A CPU has such a memory of its own kind, so what an accelerator would run is run here; slowly, since it is copied whole.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.pages import host_memory
from streamjax.kv.pages.host_attention import attend_in_host
from streamjax.kv.pages.host_memory import put_pages, take_pages
from streamjax.parallel.mesh import make_mesh
from streamjax.streaming.saving.saved_streams import load_stream, save_stream
from tests.covering import rest_slow
from tests.streaming.tiny_models import ALIBI, GQA, build, random_tokens


@pytest.fixture
def apart(monkeypatch):
    """Take this machine for one whose device has a memory of its own; begin three copies at a time, not sixteen."""
    monkeypatch.setattr(host_memory, "PLAIN", ())
    monkeypatch.setattr(host_memory, "UNDER_WAY", 3)


def in_host(x):
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host"))


def placed(cache, placement, **options):
    tiers = (
        dataclasses.replace(t, placement=placement, **options) if isinstance(t, sj.kv.Pages) else t for t in cache.tiers
    )
    return sj.kv.Cascade(*tiers)


def pages_of(state):
    return next(part.tokens for part in state.layers[0] if hasattr(part, "summary"))


@pytest.mark.parametrize("count", [1, 4], ids=["one-group", "loop"])
def test_pages_that_are_named_come(apart, count):
    random = np.random.default_rng(count)
    pages = random.standard_normal((2, 2, 5, 3, 4)).astype(np.float32)
    chosen = random.integers(0, 5, (2, 2, count))
    found = jax.jit(take_pages)(in_host(pages), jnp.asarray(chosen, jnp.int32))
    assert jax.typeof(found).memory_space == jax.memory.Space.Device
    np.testing.assert_array_equal(found, np.take_along_axis(pages, chosen[..., None, None], axis=2))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_run_of_pages_is_replaced(apart, count):
    """Each row has a run of its own, which wraps; all else stays."""
    random = np.random.default_rng(count)
    pages = random.standard_normal((2, 2, 5, 3, 4)).astype(np.float32)
    fresh = random.standard_normal((2, 2, count, 3, 4)).astype(np.float32)
    found = jax.jit(put_pages)(in_host(pages), fresh, jnp.array([4, 1], jnp.int32))
    assert host_memory.in_host_memory(found)
    for row, first in enumerate((4, 1)):
        pages[row][:, (first + np.arange(count)) % 5] = fresh[row]
    np.testing.assert_array_equal(found, pages)


CACHES = {
    "last": sj.kv.Cascade(sj.kv.Sink(1, reach=10**6), sj.kv.Window(3), sj.kv.Pages(3, 12, 2, block=4)),
    "middle": sj.kv.Cascade(sj.kv.Window(3), sj.kv.Pages(3, 12, 2, distance=5), sj.kv.Window(6)),
    "tree": sj.kv.Cascade(sj.kv.Window(3), sj.kv.Pages(3, 12, 2, sj.kv.Middle(), 4, search="tree")),
}


@pytest.mark.usual("middle")
@pytest.mark.parametrize("name", rest_slow(CACHES, "middle", "tree"))
def test_streams_are_the_same(apart, name):
    """Rows stop where they like; all pages are written over twice."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(2, 48)
    counts = np.array([[8, 7], [3, 8], [8, 0], [1, 8], [8, 5], [8, 8], [2, 1]], np.int32)
    found = []
    for placement in ("device", "host"):
        state = sj.init_state(model, placed(CACHES[name], placement), 2)
        start, logits = np.zeros(2, int), []
        for count in counts:
            chunk = np.stack(
                [np.take(row, np.arange(s, s + 8), mode="clip") for row, s in zip(tokens, start, strict=True)]
            )
            state, out = sj.step(model, state, chunk, count)
            logits.append(np.where((np.arange(8) < count[:, None])[..., None], out, 0))
            start += count
        kinds = {x.sharding.memory_kind for x in (pages_of(state).k, pages_of(state).v)}
        assert kinds == ({"pinned_host"} if placement == "host" else {"device"})
        assert pages_of(state).position.sharding.memory_kind == "device"
        found.append(np.array(logits))
    np.testing.assert_allclose(*found, atol=1e-5)  # in another order of sums: from the host pages are always chosen
    assert np.abs(found[0]).max() > 0.1


SINGLES = [(i, i + 1) for i in range(40)]


@pytest.mark.parametrize(
    ("config", "cache", "cuts"),
    [
        (GQA, CACHES["last"], SINGLES[:28]),
        pytest.param(
            ALIBI,
            sj.kv.Cascade(sj.kv.Window(3), sj.kv.Pages(3, 12, 5)),
            [*SINGLES[:8], (8, 16), (16, 24), *SINGLES[24:]],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "all"],
)
def test_a_token_is_compared_with_pages_where_they_lie(apart, monkeypatch, config, cache, cuts):
    """From the first token on, before there is any page, to where all are written over; the host computes a partial."""
    times, attend = [], attend_in_host
    monkeypatch.setattr("streamjax.kv.tiers.pages.attend_in_host", lambda *given: times.append(0) or attend(*given))
    model, tokens, found = build(config.replace(num_layers=1, attention_softcap=3.0)), random_tokens(2, 40), []
    for options in ({"placement": "device"}, {"placement": "host", "attend_on": "host"}):
        state, logits = sj.init_state(model, placed(cache, **options), 2), []
        for start, stop in cuts:
            state, out = sj.step(model, state, tokens[:, start:stop])
            logits.append(np.asarray(out))
        found.append(np.concatenate(logits, axis=1))
    assert pages_of(state).k.sharding.memory_kind == "pinned_host"
    assert times
    np.testing.assert_allclose(*found, atol=1e-4)


def test_values_of_shadows_come_from_the_host(apart):
    """Single tokens and chunks, before and behind the first groups; what is laid out at once lies there too."""
    model, tokens, found = build(GQA.replace(num_layers=1)), random_tokens(2, 36), []
    for placement in ("device", "host"):
        shadow = sj.kv.Shadow(64, keys=0.5, group=8, page=2, top_k=2, outliers=1, placement=placement)
        cache = sj.kv.Cascade(sj.kv.Window(3), shadow)
        state, logits = sj.init_state(model, cache, 2), []
        for start, stop in ((0, 7), (7, 14), *((i, i + 1) for i in range(14, 29)), (29, 36)):
            state, out = sj.step(model, state, tokens[:, start:stop])
            logits.append(np.asarray(out))
        values = state.layers[0][1].slots.v
        assert values.codes.sharding.memory_kind == ("pinned_host" if placement == "host" else "device")
        assert values.tail.sharding.memory_kind == "device"
        found.append((np.concatenate(logits, axis=1), np.asarray(jax.jit(lambda values: values.dense())(values))))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(found[0][1][:, :, 8:24]).min(axis=-1).max() > 0


def test_on_a_cpu_they_are_plain():
    state = sj.init_state(build(GQA), placed(CACHES["last"], "host"))
    assert pages_of(state).k.sharding.memory_kind == "device"


def test_a_saved_stream_comes_back_to_the_host(apart, tmp_path):
    model, cache = build(GQA.replace(num_layers=1)), placed(CACHES["last"], "host")
    state = sj.read(model, sj.init_state(model, cache), random_tokens(1, 16), 8)
    save_stream(state, tmp_path / "stream")
    restored = load_stream(tmp_path / "stream", sj.init_state(model, cache))
    assert pages_of(restored).k.sharding.memory_kind == "pinned_host"
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_says_what_does_not_go(apart):
    model = build(GQA.replace(num_layers=1))
    state = sj.init_state(model, placed(CACHES["last"], "host"))
    with pytest.raises(ValueError, match="keep 12 tokens take at most that many at a time, got 16"):
        sj.step(model, state, random_tokens(1, 16))
    with pytest.raises(ValueError, match=r'attend_on "host" is for placement "host"'):
        sj.kv.Pages(3, 12, 2, attend_on="host")
    with pytest.raises(ValueError, match=r"placement is '.*': it must be 'device' or 'host'"):
        sj.kv.Pages(3, 12, 2, placement="disk")
    with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])), pytest.raises(ValueError, match="one device"):
        sj.init_state(model, placed(CACHES["last"], "host"), 2)

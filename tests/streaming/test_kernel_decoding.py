"""Streams that decode by kernels, in interpreters: the logits of the XLA path, and who chooses what."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from pallas_kernels import api
from pallas_kernels.api import platforms
from streamjax.kv import Query, decode_kernels
from streamjax.kv.decode_kernels import kernel_decodes
from streamjax.streaming.step import advance
from tests.kernels.tolerances import BACKENDS
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, build, random_tokens

BOOKS = np.random.default_rng(3).standard_normal((2 * 6 // 3 << 8, 3)).astype(np.float32).tobytes()
CACHES = {
    "full": sj.kv.Cascade(sj.kv.Full(40)),
    "chunk": sj.kv.CurrentChunk(7),
    "wrapped windows": sj.kv.Cascade(sj.kv.Window(4), sj.kv.Window(5)),
    "wrapped sinks and window": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(6)),
    "pages": sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(8, 16, top_k=2)),
    "pages at a distance": sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(8, 16, top_k=1, distance=9, search="tree")),
    "wrapped window in codes": sj.kv.Cascade(sj.kv.Window(14, codec=sj.kv.Int(2, group=4, residual=4))),
    "wrapped window of codebooks": sj.kv.Cascade(
        sj.kv.Window(14, codec=sj.kv.CQ(3, 8, sj.kv.Codebooks(BOOKS, BOOKS, 3, "")))
    ),
    "pages in codes": sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(8, 16, top_k=2, codec=sj.kv.Int(8, group=8))),
    "pages of coded tokens": sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(8, 24, top_k=2, codec=sj.kv.FP8())),
}
ONE_LAYER = GQA.replace(num_layers=1)
# Rings that wrap, as those behind sinks and in codes do, and pages, as those in codes.
REPEATED = ("wrapped windows", "wrapped window in codes", "pages at a distance")


@pytest.fixture
def kernels(monkeypatch, request):
    """The kernels of a platform, in its interpreter; and which of them have been called."""
    called = []

    def instead(name, kernel):
        def call(*args, **more):
            called.append(name)
            return kernel(*args, **more, **BACKENDS[request.param] | {"interpret": True})

        monkeypatch.setattr(api, name, call)

    for name in ("decode_attention", "paged_attention"):
        instead(name, getattr(api, name))
    return called


@jax.jit
def read(model, state, tokens, count):
    state, hidden = advance(model, state, tokens, count)
    return state, model.logits(hidden)


def logits(config, cache, implementation, width=1, length=25):
    """Of two streams, of which one begins with a token less, `width` tokens at a time."""
    model, tokens = build(config), random_tokens(2, length)
    state, out = sj.init_state(model, cache, 2, implementation=implementation), []
    for start in range(0, length, width):
        count = np.array([width - (start == 0), width], np.int32)
        state, found = read(model, state, tokens[:, start : start + width], count)
        out.append(found)
    return np.concatenate(out[1:], axis=1)


@pytest.mark.parametrize(
    ("kernels", "name", "config"),
    [
        *[("triton", name, ONE_LAYER) for name in CACHES if name not in ("full", "pages", "pages in codes", *REPEATED)],
        *[pytest.param("triton", name, ONE_LAYER, marks=pytest.mark.slow) for name in REPEATED],
        ("tpu", "full", LOCAL),  # a layer with a window of its own, and soft caps
        ("tpu", "pages in codes", ONE_LAYER),
        pytest.param("tpu", "pages", ONE_LAYER, marks=pytest.mark.slow),
    ],
    indirect=["kernels"],
)
def test_kernels_give_the_logits_of_xla(kernels, name, config):
    expected = logits(config, CACHES[name], "xla")
    assert not kernels
    np.testing.assert_allclose(logits(config, CACHES[name], "pallas"), expected, atol=1e-4)
    assert set(kernels) == {"decode_attention"} | ({"paged_attention"} if "pages" in name else set())


def test_pages_in_parts_are_scored_by_a_tpus_kernel(monkeypatch):
    cache = sj.kv.Cascade(sj.kv.Window(4), sj.kv.Pages(8, 16, top_k=1, index=sj.kv.MinMax(parts=4)))
    expected, called = logits(ONE_LAYER, cache, "xla", width=5), []
    kernel = api.page_scores

    def call(q, *args, **more):
        called.append(q.shape)
        return kernel(q, *args, **more, implementation="tpu", interpret=True)

    monkeypatch.setattr(api, "page_scores", call)
    monkeypatch.setattr(platforms, "platform_implementation", lambda: "tpu")
    monkeypatch.setattr(decode_kernels, "kernel_decodes", lambda *_: False)
    np.testing.assert_allclose(logits(ONE_LAYER, cache, None, width=5), expected, atol=1e-4)
    assert {shape[1] for shape in called} == {2 * 5}  # two query heads of the chunk's tokens


@pytest.mark.parametrize("chosen", [None, "tpu", "triton"])
def test_a_platform_with_kernels_takes_them_for_long_caches(monkeypatch, caplog, chosen):
    monkeypatch.setattr(platforms, "platform_implementation", lambda: chosen)
    platforms.log_choice.cache_clear()
    q, slots = jnp.zeros((1, 1, 4, 128)), decode_kernels.KERNEL_SLOTS
    query = Query(q, q, jnp.zeros((1, 1), jnp.uint32), jnp.zeros(1, jnp.int32), None, None, 1.0, None)

    def chooses(slots, top_k=None, width=128, **change):
        return kernel_decodes(dataclasses.replace(query, **change), jnp.zeros((1, 2, *slots, width)), top_k)

    with caplog.at_level(logging.INFO):
        assert [chooses((slots,)) for _ in range(2)] == [chosen is not None] * 2
    assert len(caplog.records) == 1  # said once
    assert chooses((32, slots // 16), 16) == (chosen is not None)
    assert chooses((slots + 1,)) == (chosen == "triton")  # no whole tiles: a TPU would copy the cache
    narrow = jnp.zeros((1, 1, 4, 64))
    assert chooses((slots,), width=64, q=narrow, raw_q=narrow) == (
        chosen == "triton"
    )  # so it would one of narrow heads
    assert not chooses((slots - 8,))
    assert not chooses((32, slots // 16), 8)
    assert not chooses((slots,), implementation="xla")
    assert not chooses((slots,), differentiable=True)
    two = jnp.zeros((1, 2, 4, 128))
    assert not chooses((slots,), q=two, raw_q=two, position=jnp.zeros((1, 2), jnp.uint32))
    assert not chooses((slots,), slopes=jnp.ones(4))
    assert chooses((7,), implementation="pallas")


def test_says_what_kernels_do_not_take(untyped):
    model, token = build(ALIBI), jnp.zeros((1, 1), jnp.int32)
    state = sj.init_state(model, CACHES["full"], implementation="pallas")
    with pytest.raises(ValueError, match="do not take ALiBi"):
        jax.eval_shape(advance, model, state, token)
    state = sj.init_state(build(GQA), CACHES["full"], implementation="pallas", dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="queries in float32 and keys in bfloat16"):
        jax.eval_shape(advance, build(GQA), state, token)
    with pytest.raises(ValueError, match="unknown implementation 'triton'"):
        sj.init_state(model, CACHES["full"], implementation="triton")
    state = sj.init_state(build(GQA), CACHES["full"], implementation="pallas")
    with pytest.raises(ValueError, match="no decoding kernel for cpu"):
        jax.eval_shape(advance, build(GQA), state, token)

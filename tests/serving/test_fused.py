"""Rows that decode and a prompt that is read, in the same programs: each gets what it would get apart."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models.quantising import quantised_model
from streamjax.serving.batch import Batch
from streamjax.serving.row_sampling import one_row
from tests.architectures import tiny_config
from tests.serving.engines import GREEDY, alone, engine, request, served, tokens
from tests.streaming.tiny_models import GQA, build

PROMPTS = ["a", "Once upon a time, there was one", "some words here", "xyz" * 9, "Once upon a time, there was nobody"]
CACHES = sj.kv.preset("streaming_llm", sinks=2, window=9)


@pytest.mark.parametrize(
    "options", [{"rows": 3, "narrow": True}, pytest.param({"rows": 1, "policy": "mlfq"}, marks=pytest.mark.slow)]
)
def test_requests_get_what_they_get_alone(monkeypatch, options):
    one, read = engine(fused=True, prefix_bytes=1 << 20, **options), []
    take = one._batch.decode_and_read
    monkeypatch.setattr(one._batch, "decode_and_read", lambda *given: (read.append(len(given[2])), take(*given))[1])
    wanted = [request(prompt, 5 + i) for i, prompt in enumerate(PROMPTS)]
    for asked, events in zip(wanted, served(one, *wanted), strict=True):
        assert tokens(events) == alone(asked)
    assert len(read) > 8
    total = sum(len(asked.prompt) for asked in wanted)
    assert one.stats().prompt_tokens + one.stats().cached_tokens == total
    assert max(read) == 8


def test_nothing_is_compiled_while_it_serves():
    one, compiled = engine(fused=True, rows=2), []
    one.warm_up()

    def note(name: str, *_: object, **__: object) -> None:
        compiled.extend([name] if "backend_compile" in name else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        served(one, *(request(prompt, 4) for prompt in PROMPTS))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


@pytest.mark.parametrize("options", [{"cache": sj.kv.preset("dense", capacity=64)}, {"measure": True}])
def test_where_it_is_not_to_be_had_programs_stay_apart(options):
    assert not engine(fused=True, **options)._batch.fused
    assert not engine()._batch.fused


def models():
    yield "llama", lambda: build(GQA)
    yield "stacked", lambda: build(GQA, scan_layers=True)
    yield "int4", lambda: quantised_model(build(GQA.replace(d_model=32, head_dim=32, mlp_dim=32)), "int4")
    for case in ("qwen3_next", "deepseek_v2", "gpt_oss", "mamba2"):
        yield case, lambda case=case: build(tiny_config(case))


@pytest.mark.usual("qwen3_next")
@pytest.mark.parametrize(
    ("make", "width"), [pytest.param(make, 3 - i % 2, id=name) for i, (name, make) in enumerate(models())]
)
def test_every_kind_of_layer(monkeypatch, make, width):
    """Behind the fused programs rows and stream stand where apart they would; rows that are not computed keep bits."""
    model = make()
    vocab = model.config.vocab_size
    batches = [Batch(model, CACHES, 3, 8, 1) for _ in range(2)]
    for batch in batches:
        monkeypatch.setattr(batch, "_rows_of_a_pass", lambda active: width)
        for row in range(3):
            stream, _ = batch.read(batch.fresh(), np.arange(1 + row, 6 + 2 * row, dtype=np.int32))
            batch.enter(row, stream, one_row(request([5], 9, GREEDY, logprobs=2), [], vocab))
    apart, fused = batches
    assert fused.can_be_fused
    active, chunk = np.arange(3) < width, np.array([7, 3, 9, 11, 2], np.int32)
    first = np.array([4, 8, 1], np.int32)
    streams = [batch.read(batch.fresh(), first)[0] for batch in batches]
    for _ in range(2):
        drawn = apart.decode(active, 1)
        streams[0], _ = apart.read(streams[0], chunk)
        also, streams[1] = fused.decode_and_read(active, streams[1], chunk)
        assert np.array_equal(drawn.token, also.token)
        np.testing.assert_allclose(drawn.top_logprob, also.top_logprob, atol=2e-4)
    held = zip(*(jax.tree.leaves(pair) for pair in zip((apart.state, fused.state), streams, strict=True)), strict=True)
    for one, other in held:
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=3e-4)
    assert all(map(np.array_equal, jax.tree.leaves(apart.sampling), jax.tree.leaves(fused.sampling)))
    assert np.array_equal(fused.state.seen, np.arange(5, 11, 2) - np.arange(3) + 2 * active)

"""Long stretches are read layer by layer: equal layers share a program, and the numbers are those of whole steps."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming import scan
from streamjax.streaming.by_layer import grouped_heads, layerwise
from streamjax.streaming.by_layer.layerwise import layer_over
from streamjax.streaming.scan import SCAN_CHUNKS
from tests.covering import rest_slow
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, build, random_tokens, read_stream

SOFT = LOCAL.replace(windows=())  # layers alike: one stack
DEEP = GQA.replace(num_layers=8)
CACHES = {
    "streaming_llm": sj.kv.preset("streaming_llm", sinks=2, window=14),
    "dense": sj.kv.preset("dense", capacity=128),
    "pages": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(8), sj.kv.Pages(4, 32, 3)),
    "sentences": sj.kv.preset("sentence_kv", sinks=2, window=8, capacity=32, page=4, top_k=3, ends=(3, 7)),
}


PARTS = grouped_heads.asked, grouped_heads.group_over, grouped_heads.continued


def programs_for(model: sj.Decoder, state: sj.StreamState, width: int) -> int:
    """How many programs of a whole layer are compiled for the first chunk of this width."""
    layer_over.clear_cache()  # another test may have read such chunks
    sj.read(model, state, random_tokens(state.batch_size, width), width)
    return layer_over._cache_size()


@pytest.mark.usual("config2-False-2", "config3-True-1")
@pytest.mark.parametrize(
    ("config", "scan_layers", "kinds"),
    [
        (DEEP, False, 1),
        (DEEP, True, 1),
        (LOCAL.replace(windows=(5, None) * 2, num_layers=4), False, 2),
        (ALIBI, True, 1),
    ],
)
def test_equal_layers_are_compiled_once(config, scan_layers, kinds):
    """Also slices of a stack; windows that alternate make two kinds of layers."""
    model = build(config, scan_layers=scan_layers)
    state = sj.init_state(model, CACHES["streaming_llm"])
    assert programs_for(model, state, 11) == kinds


def heads_apart(far: tuple[int, ...], near: tuple[int, ...]) -> sj.kv.HeadGroups:
    return sj.kv.HeadGroups(
        (far, sj.kv.Cascade(sj.kv.Full(64))), (near, sj.kv.preset("streaming_llm", sinks=2, window=6))
    )


@pytest.mark.parametrize("config", [GQA, pytest.param(ALIBI.replace(num_kv_heads=2), marks=pytest.mark.slow)])
def test_layers_with_groups_of_equal_sizes_are_compiled_once(config):
    """Whichever their heads are; and their numbers are those of steps, which have the layers' own heads in them."""
    model = build(config.replace(num_layers=3))
    caches = [heads_apart(*pair) for pair in (((0,), (1,)), ((1,), (0,)), ((0, 1), ()))]
    for part in PARTS:
        part.clear_cache()  # another test may have read such chunks
    assert programs_for(model, sj.init_state(model, caches), 15) == 0
    assert [part._cache_size() for part in PARTS] == [1, 3, 1]  # of groups: one head near, one and two far
    tokens = random_tokens(1, 30)
    state, logits = read_stream(model, sj.init_state(model, caches), tokens, (15,))
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens[:, 1:, None], axis=-1)[..., 0]
    scored, nats = sj.score(model, sj.init_state(model, caches), tokens, 15)
    np.testing.assert_allclose(nats[:, 1:], expected, atol=2e-5)
    assert jax.tree.structure(scored) == jax.tree.structure(state)
    for mine, theirs in zip(jax.tree.leaves(scored), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


@pytest.mark.slow
def test_more_layers_take_no_longer_to_compile(untyped):
    """CPU seconds of the first chunk: four times the layers, less than twice the time."""
    seconds = {}
    for layers in (6, 24):
        model = build(GQA.replace(num_layers=layers, d_model=20 + 4 * (layers == 24)))  # nothing is compiled yet
        state = sj.init_state(model, CACHES["pages"])
        start = time.process_time()
        jax.block_until_ready(sj.read(model, state, random_tokens(1, 16)))
        seconds[layers] = time.process_time() - start
    assert seconds[24] < 2 * seconds[6]


@pytest.mark.usual("config1-True-pages")
@pytest.mark.parametrize(
    ("config", "scan_layers", "name"),
    [(ALIBI, False, "dense"), (SOFT, True, "pages"), pytest.param(GQA, False, "sentences", marks=pytest.mark.slow)],
)
def test_layer_by_layer_is_what_steps_are(config, scan_layers, name):
    """Scores and states of two streams of unequal length, over a group of chunks, single ones and a padded end."""
    model, width = build(config, scan_layers=scan_layers), 4
    lengths = np.array([SCAN_CHUNKS * width + 2 * width + 3, width + 1])  # the end is padded to a chunk
    tokens = random_tokens(2, int(lengths.max()))
    stepped, logits = sj.init_state(model, CACHES[name], 2), []
    for start in range(0, tokens.shape[1], width):
        piece = np.pad(tokens[:, start : start + width], ((0, 0), (0, max(0, start + width - tokens.shape[1]))))
        count = jnp.asarray(np.clip(lengths - start, 0, width), jnp.int32)
        stepped, found = sj.step(model, stepped, piece, count)
        logits.append(np.asarray(found))
    logits = np.concatenate(logits, axis=1)[:, : tokens.shape[1]]
    whole = jax.nn.log_softmax(logits[:, :-1])
    expected = -np.take_along_axis(np.asarray(whole), tokens[:, 1:, None], axis=-1)[..., 0]
    expected[np.arange(1, tokens.shape[1]) >= lengths[:, None]] = 0
    state, nats = sj.score(model, sj.init_state(model, CACHES[name], 2), tokens, width, lengths=lengths)
    np.testing.assert_allclose(nats[:, 1:], expected, atol=2e-5)
    np.testing.assert_allclose(nats[:, 0], np.log(config.vocab_size), rtol=1e-6)
    read = sj.read(model, sj.init_state(model, CACHES[name], 2), tokens, width, lengths=lengths)
    assert jax.tree.structure(read) == jax.tree.structure(stepped)
    for other in (state, read):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(stepped), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_wide_batch_is_read_a_chunk_at_a_time(monkeypatch):
    """What a layer makes of many chunks at once is bounded."""
    model, shapes = build(GQA), []
    real = layerwise.layer_over
    monkeypatch.setattr(
        layerwise, "layer_over", lambda block, row, x, *a: (shapes.append(x.shape), real(block, row, x, *a))[1]
    )
    tokens = random_tokens(1, 2 * SCAN_CHUNKS)
    sj.read(model, sj.init_state(model, CACHES["dense"]), tokens, 2)
    monkeypatch.setattr(scan, "HIDDEN_BYTES", 2 * SCAN_CHUNKS * 16 * 4 - 1)
    sj.read(model, sj.init_state(model, CACHES["dense"]), tokens, 2)
    assert [shape[0] for shape in shapes] == [SCAN_CHUNKS] * 2 + [1] * 2 * SCAN_CHUNKS


@pytest.mark.parametrize("name", rest_slow(["streaming_llm", "dense", "pages"], "pages"))
def test_a_layer_keeps_its_donated_cache_in_place(untyped, name):
    """Every byte of its state is aliased, and no instruction copies a cache."""
    slots = {
        "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=1020),
        "dense": sj.kv.preset("dense", capacity=1024),
        "pages": sj.kv.Cascade(sj.kv.Window(32), sj.kv.Pages(16, 1024, 2)),
    }
    model = build(GQA.replace(head_dim=32))
    state = sj.init_state(model, slots[name])
    places = layerwise.Places(
        jnp.zeros((1, 1, 4), jnp.uint32), jnp.ones((1, 1, 4), bool), jnp.zeros((1, 1), jnp.int32), None
    )
    x = jnp.zeros((1, 1, 4, 16))
    call = layer_over.lower(model.layers[0], None, x, state.layers[0], places, state.caches[0], state.span, None)
    compiled, cache = call.compile(), max(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state.layers[0]))
    copied = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
    assert all(4 * np.prod([int(n) for n in shape.split(",")]) < cache / 2 for shape in copied)


@pytest.mark.usual("inf_llm-3300", "streaming_llm-1400")
@pytest.mark.parametrize(
    ("name", "most"),
    [("streaming_llm", 1400), ("quest", 2980), ("inf_llm", 3300), ("sentence_kv", 2500), ("dhsa", 2900)],
)
def test_a_program_for_a_chunk_is_small(name, most):
    """Lines of the program that compilers get of one layer and 512 tokens: their time goes with it."""
    model = build(GQA)
    state = sj.init_state(model, sj.kv.preset(name, **({} if name == "streaming_llm" else {"capacity": 4096})))
    ids = jnp.zeros((1, 1, 512), jnp.int32) if state.caches[0].needs_ids else None
    places = layerwise.Places(
        jnp.zeros((1, 1, 512), jnp.uint32), jnp.ones((1, 1, 512), bool), jnp.zeros((1, 1), jnp.int32), ids
    )
    x = jnp.zeros((1, 1, 512, GQA.d_model))
    call = layer_over.lower(model.layers[0], None, x, state.layers[0], places, state.caches[0], state.span, None)
    assert len(call.as_text().splitlines()) < most


@pytest.mark.slow
def test_a_step_inside_a_program_of_the_caller_is_still_a_step():
    model, tokens = build(GQA), random_tokens(1, 6)
    run = jax.jit(lambda model, state: sj.step(model, state, tokens))
    _, logits = run(model, sj.init_state(model, CACHES["pages"]))
    np.testing.assert_allclose(
        logits, read_stream(model, sj.init_state(model, CACHES["pages"]), tokens, (6,))[1], atol=1e-5
    )

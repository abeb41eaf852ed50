"""Streams whose tokens lie on four other devices than the model: the logits of one device, and what crosses."""

import contextlib

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import Decoder
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, HGRN2Config, ModelConfig
from streamjax.parallel.mesh import make_mesh, shard_model
from streamjax.streaming.by_layer import second_mesh
from streamjax.streaming.by_layer.second_mesh import init_apart, step_apart
from tests.covering import rest_slow
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, build, random_tokens

ROWS, CAPACITY = 4, 256
PAGES = sj.kv.preset("inst_infer", sinks=1, window=3, capacity=CAPACITY, page=4, top_k=2, attend_on="mesh")
CASES = {
    "pages": (GQA.replace(num_layers=1), PAGES),
    "dense": (ALIBI, sj.kv.preset("dense", capacity=CAPACITY)),
    "window": (LOCAL, sj.kv.Cascade(sj.kv.Window(4), sj.kv.Full(CAPACITY, codec=sj.kv.Int(8, group=4)))),
}
CHUNKS = [(7, [7, 5, 0, 7]), (1, [1, 1, 1, 0]), (1, [1] * 4), (1, [1] * 4), (7, [7, 1, 7, 7]), (1, [1] * 4)]


def logits(step, model, state):
    """Of the real tokens of some chunks, whose rows end where they like."""
    found = []
    for i, (width, count) in enumerate(CHUNKS):
        state, out = step(model, state, random_tokens(ROWS, width, seed=i), np.array(count, np.int32))
        found.append(np.where((np.arange(width) < np.array(count)[:, None])[..., None], out, 0))
    return state, np.concatenate(found, axis=1)


def sizes(state):
    return sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", rest_slow(CASES, "pages"))
def test_a_second_mesh_answers(name, monkeypatch):
    """Four devices have the model, four others the slots; besides queries, partials and new tokens nothing crosses."""
    config, cache = CASES[name]
    model, crossed, send = build(config), [], second_mesh.send
    expected = logits(sj.step, model, sj.init_state(model, cache, ROWS))[1]
    home, other = (make_mesh(data=2, tensor=2, devices=jax.devices()[i : i + 4]) for i in (0, 4))
    with jax.set_mesh(home):
        there = shard_model(model, home)
        state = init_apart(there, cache, other, ROWS)
        monkeypatch.setattr(second_mesh, "send", lambda x, where: crossed.append(sizes(x)) or send(x, where))
        with jax.transfer_guard_device_to_device("disallow"):
            state, found = logits(step_apart, there, state)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found).max() > 0.1
    moved = [one for one, kept in zip(state.layers, state.caches, strict=True) if second_mesh.goes(kept)]
    assert len(moved) == sum(block.mixer.window is None for block in model.config.blocks)
    for *front, last in moved:
        assert {d for x in jax.tree.leaves(front) for d in x.devices()} <= set(home.devices.flat)
        assert {d for x in jax.tree.leaves(last) for d in x.devices()} == set(other.devices.flat)
    mixer = model.config.blocks[-1].mixer
    heads, per_token = mixer.num_heads, mixer.num_heads * mixer.head_dim + 2 * mixer.num_kv_heads * mixer.head_dim + 4
    sizes_of = []
    for width, _ in CHUNKS:
        question = ROWS * (width * per_token + 1) + (heads if name == "dense" else 0)  # and slopes
        sizes_of += [question, ROWS * width * heads * (mixer.head_dim + 1)] * len(moved)
    assert crossed == sizes_of
    assert max(crossed[-2:]) < sizes(last) / 20


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1])
def test_streams_are_scored_and_go_on_as_on_one_device(temperature):
    """Rows of different lengths, of which some end before others, with a penalty on what was read."""
    config, cache = CASES["pages"]
    model, found = build(config), []
    home, other = (make_mesh(data=2, tensor=2, devices=jax.devices()[i : i + 4]) for i in (0, 4))
    sampler = sj.Sampler(temperature=temperature, repetition_penalty=1.2)
    for mesh in (None, other):
        with jax.set_mesh(home) if mesh is not None else contextlib.nullcontext():
            read_by = model if mesh is None else shard_model(model, home)
            state = sj.init_state(model, cache, ROWS) if mesh is None else init_apart(read_by, cache, mesh, ROWS)
            lengths = np.array([19, 0, 7, 11])
            state, nats = sj.score(read_by, state, random_tokens(ROWS, 19), 8, lengths=lengths)
            state = sj.read(read_by, state, random_tokens(ROWS, 9, seed=1), 8)
            state, tokens = sj.generate(
                read_by, state, random_tokens(ROWS, 2, seed=2), max_new_tokens=40, sampler=sampler,
                key=jax.random.key(3), stop_tokens=range(0, config.vocab_size, 9),
            )  # fmt: skip
            assert second_mesh.lies_apart(state) == (mesh is not None)
            found.append((np.asarray(nats), np.asarray(tokens), np.asarray(state.seen)))
    whole, apart = found
    np.testing.assert_allclose(apart[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(apart[1], whole[1])
    np.testing.assert_array_equal(apart[2], whole[2])
    assert (whole[1] == -1).any(axis=1).sum() >= 2
    assert len(set(whole[2].tolist())) > 2


@pytest.mark.slow
def test_layers_beside_may_share_the_bounds_of_their_decays():
    recurrent = BlockConfig(HGRN2Config(2, 2, key_dim=8, value_dim=8, lower_bound="learned"), DenseConfig(24))
    attention = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), DenseConfig(24))
    config = ModelConfig(vocab_size=31, d_model=16, blocks=(recurrent, attention, recurrent), tie_embeddings=True)
    model = Decoder(config, jax.random.key(0))
    model.bounds.table[...] = jax.random.normal(jax.random.key(1), model.bounds.table[...].shape)
    cache, tokens = sj.kv.preset("dense", capacity=32), random_tokens(2, 7) % 31
    _, expected = sj.step(model, sj.init_state(model, cache, 2), tokens)
    state = init_apart(model, cache, make_mesh(tensor=2, devices=jax.devices()[4:6]), 2)
    np.testing.assert_allclose(step_apart(model, state, tokens)[1], expected, atol=1e-5)


def test_says_what_does_not_go_apart():
    model, other = build(GQA), make_mesh(devices=jax.devices()[4:5])
    with pytest.raises(ValueError, match="devices that the model lies on"):
        init_apart(model, PAGES, make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match="none goes apart"):
        init_apart(model, sj.kv.preset("streaming_llm"), other)
    with pytest.raises(ValueError, match="make its axis context 1"):
        init_apart(model, PAGES, make_mesh(context=2, devices=jax.devices()[4:6]))
    with pytest.raises(ValueError, match="only windows, sinks, Full and Pages go apart"):
        init_apart(model, sj.kv.preset("mikv", window=4, size=4, every=4, group=4, capacity=16), other)
    with pytest.raises(ValueError, match='attend_on "mesh" is for placement "device"'):
        sj.kv.Pages(3, 12, 2, placement="host", attend_on="mesh")

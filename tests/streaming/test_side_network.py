"""Streams of a model with a side network (LongMem), against plain lists, and what a file of one says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models.side_network import SideConfig, SideDecoder, SideNetwork
from streamjax.streaming.scan import SCAN_CHUNKS, _group
from streamjax.streaming.side_networks import save_side_network
from tests.covering import rest_slow
from tests.oracles import side_network as plain
from tests.oracles.streaming_llm import Rule
from tests.streaming.tiny_models import GQA, LOCAL, build

SINKS, WINDOW, PAGE, CAPACITY, TOP_K = 2, 6, 4, 16, 2
CACHE = sj.kv.preset("long_mem", sinks=SINKS, window=WINDOW, page=PAGE, capacity=CAPACITY, top_k=TOP_K)
BASE = GQA.replace(num_layers=5)
SIDE = SideConfig(layer=2)  # the second side layer recalls what the third layer left; the fifth layer is left over


@pytest.fixture(scope="module")
def model():
    base = build(BASE)
    side = SideNetwork.beginning(base, SIDE)
    draw = np.random.default_rng(1)

    def moved(leaf):
        return leaf + jnp.asarray(draw.normal(scale=0.3, size=leaf.shape), leaf.dtype)

    return SideDecoder(base, jax.tree.map(moved, side))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).integers(0, BASE.vocab_size, 45)


def streamed(model, tokens, cuts, cache=CACHE):
    state, said, at = sj.init_state(model, cache), [], 0
    for size in cuts:
        state, logits = sj.step(model, state, jnp.asarray(tokens[None, at : at + size], jnp.int32))
        said.append(np.asarray(logits[0]))
        at += size
    return np.concatenate(said), state


@pytest.mark.parametrize("size", rest_slow([5, 1], 5))
def test_a_stream_is_what_plain_lists_say(model, tokens, size):
    cuts = [size] * (len(tokens) // size)
    wanted = plain.logits(
        model, tokens.tolist(), cuts, Rule(SINKS, WINDOW), distance=WINDOW, page=PAGE, capacity=CAPACITY, top_k=TOP_K
    )
    said, state = streamed(model, tokens, cuts)
    np.testing.assert_allclose(said, wanted, atol=2e-3, rtol=2e-3)
    assert len(state.layers) == 7
    assert [len(layer) for layer in state.layers] == [1, 1, 3, 1, 1, 1, 1]  # one bank, and no more


@pytest.mark.slow
def test_with_nothing_of_its_own_a_side_network_says_what_the_model_says(tokens):
    base = build(BASE)
    side = SideDecoder(base, SideNetwork.beginning(base, SIDE, scale=0.0))
    cuts = [5] * 9
    np.testing.assert_allclose(streamed(side, tokens, cuts)[0], streamed(base, tokens, cuts)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_scores_are_those_of_steps_and_rows_may_be_ragged(model, tokens):
    state, nats = sj.score(model, sj.init_state(model, CACHE, 2), [tokens[:20], tokens[:13]], 5)
    said, _ = streamed(model, tokens[:20], [5] * 4)
    logs = jax.nn.log_softmax(said)
    wanted = [-logs[i, token] for i, token in enumerate(tokens[1:20])]
    np.testing.assert_allclose(nats[0, 1:], wanted, atol=1e-3)
    np.testing.assert_allclose(nats[1, 1:13], wanted[:12], atol=1e-3)
    assert state.seen.tolist() == [20, 13]


def test_a_file_gives_the_same_side_network(model, tokens, tmp_path):
    path, base = tmp_path / "side.safetensors", build(BASE)
    save_side_network(model, path, tokens=7)
    loaded = sj.with_side_network(base, path)
    old, new = named_arrays(model), named_arrays(loaded)
    assert set(old) == set(new)
    for name in old:
        np.testing.assert_array_equal(old[name], new[name], name)
    assert loaded.side.config == SIDE
    with pytest.raises(ValueError, match=r"side\.safetensors: no side network could be read: it belongs to model"):
        sj.with_side_network(build(BASE, seed=3), path)
    with pytest.raises(ValueError, match=r"none\.safetensors"):
        sj.with_side_network(base, tmp_path / "none.safetensors")


def test_what_no_side_network_can_stand_beside_is_one_line():
    for config, layer, message in (
        (BASE, 4, "layer is 4: the last that can be remembered is 3"),
        (LOCAL, 0, "layer 0 cannot be remembered: it needs full attention"),
    ):
        with pytest.raises(ValueError, match=message):
            SideConfig(layer).check(build(config).config)
    with pytest.raises(ValueError, match="reduction is 9: the model has 5 layers"):
        SideConfig.for_model(build(BASE).config, reduction=9)
    base = build(BASE)
    with pytest.raises(ValueError, match=r"reads streams, not whole sequences"):
        SideDecoder(base, SideNetwork.beginning(base, SIDE)).hidden(jnp.zeros((1, 2), jnp.int32))


def test_how_many_chunks_are_read_at_once_is_known(model):
    """A stream has more caches than the model has layers."""
    assert _group(model, sj.init_state(model, CACHE), 5) == SCAN_CHUNKS


def test_streams_are_not_laid_out_anew(model, tokens):
    state = sj.init_state(model, CACHE)
    with pytest.raises(ValueError, match="a side network keeps what it reads as it is"):
        sj.compact(model, state, sj.kv.preset("snapkv"))

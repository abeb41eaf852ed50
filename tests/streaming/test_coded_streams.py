"""Streams whose keys and values are codes: saved, laid out anew, on a mesh; and as many bytes as they say."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.parallel import make_mesh, shard_model
from tests.streaming.tiny_models import random_tokens, read_prompt

KIVI = sj.kv.preset("kivi", bits=4, group=8, residual=8, capacity=64)
DENSE = sj.kv.preset("dense", capacity=64)
LENGTH = 48
TOKENS = random_tokens(2, LENGTH)


@pytest.fixture(scope="module")
def model():
    return read_prompt(LENGTH)[0]


@pytest.fixture(scope="module")
def nats(model):
    state, nats = sj.score(model, sj.init_state(model, KIVI, batch_size=2), TOKENS, 8)
    return state, np.asarray(nats)


def test_a_saved_stream_goes_on_bit_for_bit(model, nats, tmp_path):
    state, _ = sj.score(model, sj.init_state(model, KIVI, batch_size=2), TOKENS[:, :24], 8)
    sj.save_stream(state, tmp_path / "stream")
    state = sj.load_stream(tmp_path / "stream", sj.init_state(model, KIVI, batch_size=2))
    _, rest = sj.score(model, state, TOKENS[:, 24:], 8)
    np.testing.assert_array_equal(rest, nats[1][:, 24:])
    with pytest.raises(ValueError, match=r"saved with .*codec=Int\(bits=4.* which is .*codec=None"):
        sj.load_stream(tmp_path / "stream", sj.init_state(model, DENSE, batch_size=2))


def test_compaction_takes_tokens_out_of_codes_and_into_them(model, nats):
    _, tokens, exact, _ = read_prompt(LENGTH)
    np.testing.assert_array_equal(tokens, TOKENS)
    coded = sj.compact(model, exact, cache=KIVI)
    one, other = (jax.tree.leaves(state.layers[0]) for state in (coded, nats[0]))
    for a, b in zip(one, other, strict=True):  # of the first layer, whose keys and values no code has touched
        np.testing.assert_array_equal(a, b)
    back = sj.compact(model, coded, cache=DENSE)
    held = KIVI.tiers[0].stored(coded.layers[0][0], None)
    np.testing.assert_array_equal(back.layers[0][0].k[:, :, :LENGTH], held.k[:, :, :LENGTH])
    off = np.abs(back.layers[0][0].k - exact.layers[0][0].k)[:, :, :LENGTH]
    assert 0 < off.max() < 1


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2}, {"tensor": 2}])
def test_on_a_mesh_a_stream_is_the_same(model, nats, axes):
    mesh = make_mesh(**axes, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        sharded = shard_model(model, mesh)
        _, found = sj.score(sharded, sj.init_state(sharded, KIVI, batch_size=2), TOKENS, 8)
    np.testing.assert_allclose(found, nats[1], atol=2e-2)


def test_bytes_are_what_the_description_says(model):
    state = sj.init_state(model, KIVI)
    live = sum(x.nbytes for x in jax.tree.leaves(state))
    assert live == sj.kv.describe(KIVI, model).total == state.cache_bytes

"""Codebooks of a model at hand: fitted, written to a file, taken by the preset, refused by another model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.codecs.measured.codebook_file import LayerCodebooks
from streamjax.streaming.compacting.key_gradients import key_gradients
from streamjax.streaming.compacting.measure_codebooks import fitted
from tests.streaming.tiny_models import GQA, LOCAL, PARTIAL, build, random_tokens

TEXT = random_tokens(4, 64)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """Pairs of channels, of 4 entries."""
    path = tmp_path_factory.mktemp("codebooks") / "books.safetensors"
    measured = sj.measure_codebooks(model, TEXT[:2, :16], coupled=2, bits=2, rounds=3)
    measured.save(path)
    assert LayerCodebooks.load(path) == measured
    assert measured.tokens == 32
    return str(path)


def test_k_means_leaves_little_and_one_more_round_gains_nothing():
    x = (np.random.default_rng(0).normal(size=(2, 300, 2)) * [[[1, 5]], [[3, 3]]]).astype(np.float32)
    even = jnp.ones((2, 300))
    books = fitted(jnp.asarray(x), 16, 40, 1, even)
    heavy = fitted(jnp.asarray(x), 16, 40, 1, even.at[:, :20].set(1e4))
    for points, entries, other in zip(x, heavy, books, strict=True):  # what weighs most is met best
        of_heavy, of_even = (((points[:20, None] - e) ** 2).sum(-1).min(axis=1).sum() for e in (entries, other))
        assert of_heavy < 0.3 * of_even
    for points, entries in zip(x, books, strict=True):
        square = ((points[:, None] - entries) ** 2).sum(-1)
        nearest = square.argmin(axis=1)
        middle = [points[nearest == i].mean(axis=0) if (nearest == i).any() else entries[i] for i in range(16)]
        np.testing.assert_allclose(middle, entries, atol=0.15)
        drawn = ((points[:, None] - points[:16]) ** 2).sum(-1).min(axis=1)
        assert square.min(axis=1).sum() < 0.7 * drawn.sum()


def test_gradients_by_keys_and_values_are_those_of_their_biases():
    """What is added to all keys of a layer is its bias, whose gradient is the sum over tokens; so with values."""
    biased = build(PARTIAL)
    ids = TEXT[:2, :16] % PARTIAL.vocab_size

    def nats(model):
        logits = sj.forward(model, ids)[:, :-1]
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1))

    exact = jax.jit(jax.grad(nats))(biased)
    for i, (of_k, of_v) in enumerate(key_gradients(biased, jnp.asarray(ids))):
        bias = exact.layer(i).mixer.projections.qkv_bias[...]
        for found, expected in ((of_k, bias[:, -2]), (of_v, bias[:, -1])):
            np.testing.assert_allclose(found.sum(axis=(0, 1)), expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
    weighted, even = (
        sj.measure_codebooks(biased, ids, coupled=2, bits=2, rounds=3, by_gradients=by) for by in (True, False)
    )
    assert weighted.layers != even.layers
    assert weighted.tokens == 32


@pytest.mark.slow
def test_a_stream_in_entries_is_near_one_without(model, tmp_path):
    """Keys are coded before rotation and turned when they are read, when they fall and when they are laid out anew.

    Channels by themselves, of which 256 entries leave next to nothing.
    """
    file = tmp_path / "books.safetensors"
    sj.measure_codebooks(model, TEXT, coupled=1, rounds=2).save(file)
    tokens = TEXT[:2, :40]
    dense = sj.kv.preset("dense", capacity=64)
    _, exact = sj.score(model, sj.init_state(model, dense, batch_size=2), tokens, 8)
    whole = sj.kv.preset("cq", codebooks=file, window=4, capacity=64)
    codecs = [cache.tiers[1].codec for cache in whole]
    assert codecs[0] != codecs[1]
    cache = tuple(sj.kv.Cascade(sj.kv.Window(9, codec=codec), sj.kv.Full(64, codec=codec)) for codec in codecs)
    state, nats = sj.score(model, sj.init_state(model, cache, batch_size=2), tokens, 8)
    off = np.abs(np.asarray(nats - exact))
    assert 0 < off.max() < 0.5
    assert off.mean() < 0.02
    for layer, codec in zip(state.layers, codecs, strict=True):
        for part in layer:
            assert part.k.codec == codec.without_numbers()  # layers share their programs
            assert part.k.tables[0].shape == (2, 2, 6 * 256, 1)
    back = sj.compact(model, state, cache=dense)
    keys, expected = (np.asarray(x.layers[0][0].k)[:, :, :40] for x in (back, sj.read(
        model, sj.init_state(model, dense, batch_size=2), tokens, 8
    )))  # fmt: skip
    np.testing.assert_allclose(keys, expected, atol=0.1)


@pytest.mark.quick
def test_what_are_no_codebooks_of_this_model_is_refused(model, file, tmp_path):
    other = build(GQA, seed=1)
    sj.measure_filters(model, TEXT[:1, :8]).save(tmp_path / "filters.safetensors")
    caches = sj.kv.preset("cq", codebooks=file, bits=2)
    for act, message in (
        (lambda: sj.init_state(other, caches), "measured with model [0-9a-f]{16}, and this one is [0-9a-f]{16}"),
        (
            lambda: sj.kv.preset("cq", codebooks=str(tmp_path / "filters.safetensors")),
            "filters.safetensors: no codebooks could be read: it has no codebooks of keys and values",
        ),
        (lambda: sj.kv.preset("cq", codebooks="nowhere.safetensors"), "nowhere.safetensors"),
        (lambda: sj.measure_codebooks(model, [[1]]), "codebooks need rows of one length, of at least two"),
        (lambda: sj.measure_codebooks(model, [[1, 2]]), "2 tokens fill no codebooks of 256 entries"),
        (lambda: sj.measure_codebooks(model, TEXT, rounds=0), "rounds is 0: it must be a whole number of at least 1"),
        (lambda: sj.measure_codebooks(model, TEXT), "couples 4 channels, which do not divide heads of 6"),
        (
            lambda: sj.init_state(model, sj.kv.preset("cq", codebooks=file, bits=4)),
            "the codebooks have 24 entries of 2",
        ),
        (
            lambda: sj.init_state(model, sj.kv.Cascade(sj.kv.Full(64, codec=sj.kv.CQ(2)))),
            r"CQ\(coupled=2.* has no codebooks: measure them",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


@pytest.mark.quick
def test_layers_with_windows_keep_them(tmp_path):
    model, path = build(LOCAL), tmp_path / "books.safetensors"
    sj.measure_codebooks(model, TEXT[:1, :8], coupled=2, bits=2, rounds=1).save(path)
    first, second = sj.kv.preset("cq", codebooks=str(path), bits=2, window=2)
    assert first == sj.kv.Cascade(sj.kv.Window(4))
    assert second.made_for is not None

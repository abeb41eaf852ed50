"""Trained networks that say which tokens will be asked for: what they learn, the file, the cache that takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.scores.retaining_file import LayerRetainingHeads
from streamjax.models.mixers.attention import SequenceContext
from streamjax.training.heads.retaining import (
    RetainingConfig,
    as_file,
    largest_logits,
    retaining_loss,
    text_batches,
    train_retaining_heads,
)
from tests.oracles.rotation import Turning
from tests.streaming.tiny_models import GQA, LOCAL, build, random_tokens

TOKENS = random_tokens(2, 24)
STEPS = 30
CONFIG = RetainingConfig(steps=STEPS, updates=2, learning_rate=0.02, width=8)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def trained(model):
    """Every step of a training on one text."""
    batches = text_batches(random_tokens(400, seed=2), length=24, answer=6, rows=2)
    return list(train_retaining_heads(model, batches, CONFIG))


@pytest.fixture(scope="module")
def file(model, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("heads") / "retaining.safetensors"
    as_file(model, trained[-1], 1440).save(path)
    return path


def silu(x):
    return x / (1 + np.exp(-x))


class Turned(Turning):
    frequencies = tuple(100.0 ** (-np.arange(3) / 3))


def test_what_is_learned_is_the_largest_logit_of_the_answers(model):
    """Against loops over tokens, from queries and keys that are rotated by hand; rows have answers of their own."""
    answers = np.zeros(TOKENS.shape, bool)
    answers[0, [7, 20]] = answers[1, 22:] = True
    block, context = model.layer(0), SequenceContext.from_start(*TOKENS.shape)
    x = model.embed(jnp.asarray(TOKENS))
    q, k, v = (np.asarray(x, np.float64) for x in block.mixer.projections.split(block.mixer_input(x)))
    found, asked = jax.jit(largest_logits)(block, x, context, jnp.asarray(answers))
    for row, place in np.ndindex(*TOKENS.shape):
        later = [i for i in np.flatnonzero(answers[row]) if i > place]
        assert asked[row, place] == bool(later)
        for head in range(2):
            key = Turned().turned(k[row, place, head], place)
            logits = [
                Turned().turned(q[row, i, h], i) @ key / np.sqrt(6) for i in later for h in (2 * head, 2 * head + 1)
            ]
            np.testing.assert_allclose(found[row, place, head], max(logits, default=0.0), atol=1e-4)
    drawn = np.random.default_rng(0)
    weights = drawn.standard_normal((48, 5)) / 5, drawn.standard_normal((5, 2))
    loss, said = jax.jit(retaining_loss)(
        tuple(jnp.asarray(x, jnp.float32) for x in weights), (q, k, v), found, asked, 0.3
    )
    line = np.concatenate([x.reshape(2, 24, -1) for x in (q, k, v)], axis=2)
    expected, distances, rough = silu(line @ weights[0]) @ weights[1], [], []
    np.testing.assert_allclose(said, expected, atol=1e-4)
    for row in range(2):
        last = np.flatnonzero(answers[row]).max()  # the tokens that are asked for lie in front of it
        off = np.abs(expected[row, :last] - np.asarray(found)[row, :last])
        distances += np.where(off < 1, off**2 / 2, off - 0.5).ravel().tolist()
        rough += ((expected[row, 1:last] - expected[row, : last - 1]) ** 2).ravel().tolist()
    assert float(loss) == pytest.approx(np.mean(distances) + 0.3 * np.mean(rough), rel=1e-4)


def test_training_finds_more_of_what_is_asked_for(trained):
    assert len(trained) == STEPS
    first, last = (np.mean([step.loss for step in some]) for some in (trained[:8], trained[-8:]))
    assert last < 0.6 * first
    assert np.mean([step.found for step in trained[-8:]]) > np.mean([step.found for step in trained[:8]])


def test_a_file_makes_a_cache_for_its_model_alone(model, file, tmp_path):
    caches = sj.kv.preset("locret", retaining=str(file), window=3, size=6, every=4)
    assert LayerRetainingHeads.load(file).tokens == 1440
    assert caches[0] != caches[1]
    assert caches[0].renumbered() == caches[1].renumbered()  # one program
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    filters = tmp_path / "filters.safetensors"
    sj.measure_filters(model, TOKENS).save(filters)
    for act, message in (
        (lambda: sj.init_state(build(GQA, seed=1), caches), "measured with model [0-9a-f]{16}, and this one is"),
        (lambda: sj.kv.preset("locret"), "locret needs the file of a trained network: give retaining=FILE"),
        (lambda: sj.kv.preset("locret", retaining=str(broken)), "broken.safetensors: no retaining heads could be read"),
        (lambda: sj.kv.preset("locret", retaining=str(filters)), "filters.safetensors: .*it has no retaining heads"),
        (lambda: sj.kv.preset("locret", retaining="nowhere.safetensors"), "nowhere.safetensors"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            act()
        assert "\n" not in str(error.value)


def test_a_prompt_that_is_laid_out_keeps_what_a_stream_keeps(model, file):
    """Of the first layer, whose keys depend on their tokens alone; scores never change, so one choice is as many."""
    caches = sj.kv.preset("locret", retaining=str(file), window=3, size=6, every=4)
    fresh = sj.init_state(model, caches, batch_size=2)
    one = sj.init_state(model, caches)
    assert sj.kv.describe(caches, model).total == sum(x.nbytes for x in jax.tree.leaves(one))
    state = sj.read(model, fresh, TOKENS, 8)
    dense = sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=32), batch_size=2), TOKENS, 8)
    laid = sj.compact(model, dense, caches, query=TOKENS)

    def kept(state):
        slots = state.layers[0][1].slots
        found = zip(np.asarray(slots.position), np.asarray(slots.valid), strict=True)
        return [[sorted(p[v].tolist()) for p, v in zip(*heads, strict=True)] for heads in found]

    # 24 tokens end a block, 3 of them are in the window, 21 have competed
    assert kept(laid) == kept(state)
    with pytest.raises(ValueError, match="scores tokens that are read again: give query= with stored=True"):
        sj.compact(model, dense, caches, query=TOKENS[:, :4], stored=False)
    with pytest.raises(ValueError, match="chooses by queries: give query="):
        sj.compact(model, dense, caches)
    sj.compact(model, laid, sj.kv.preset("locret", retaining=str(file), window=3, size=4, every=4))  # scores are known


def test_layers_with_windows_keep_them_and_nonsense_is_refused(tmp_path):
    model = build(LOCAL)
    (step,) = train_retaining_heads(model, text_batches(TOKENS[0], 12, 3, 1), RetainingConfig(steps=1, width=4))
    as_file(model, step, 12).save(tmp_path / "some.safetensors")
    first, second = sj.kv.preset("locret", retaining=str(tmp_path / "some.safetensors"), window=2, size=4, every=4)
    assert first == sj.kv.Cascade(sj.kv.Window(4))
    assert second.made_for is not None
    for make, message in (
        (lambda: next(text_batches(TOKENS[0], 24, 3, 1)), "a text of 24 tokens has no stretches of 24 with 3 that ask"),
        (lambda: next(text_batches(TOKENS[0], 4, 4, 1)), "no stretches of 4 with 4 that ask"),
        (lambda: RetainingConfig(width=0), "RetainingConfig.width is 0"),
        (
            lambda: next(train_retaining_heads(build(LOCAL.replace(windows=(5, 5))), [], CONFIG)),
            "every layer of the model has a bound of its own",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()

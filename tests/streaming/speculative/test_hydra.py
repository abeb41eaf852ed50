"""Heads that guess one after another: a tree against plain loops, files, and text that they do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative import Hydra
from streamjax.streaming.speculative.heads.hydra import hydra_tree
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.tree_growth import best_nodes
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from tests.streaming.tiny_models import GQA, LOCAL, VOCAB, build, random_tokens

LENGTH, WIDTH, NODES = 3, 3, 6
IDS = np.arange(1, VOCAB, 2, dtype=np.int32)


@pytest.fixture(scope="module")
def model():
    return build(LOCAL)


def random_heads(model: sj.Decoder, count: int = LENGTH) -> HydraHeads:
    draw, width = np.random.default_rng(7), model.config.d_model
    inward = [draw.normal(size=((1 + i) * width, 12)) / np.sqrt(width) for i in range(1, count + 1)]
    outward = [draw.normal(size=(12, width)) for _ in range(count)]
    as_arrays = (tuple(x.astype(np.float32) for x in side) for side in (inward, outward))
    return HydraHeads(*as_arrays, IDS, fingerprint_in_any_dtype(model), 5)


def plain_logits(model: sj.Decoder, heads: HydraHeads, hidden, path) -> np.ndarray:
    """What the head behind a path of tokens says of all ids that are guessed, in float64, by the paper's rule."""

    def unit(x):
        return x / np.sqrt(np.mean(x**2) + 1e-6)

    table = np.asarray(model.embedding[...], np.float64)
    read = np.concatenate([unit(hidden), *(unit(table[token] * model.config.embedding_scale) for token in path)])
    inner = read @ heads.inward[len(path) - 1]
    state = hidden + (inner / (1 + np.exp(-inner))) @ heads.outward[len(path) - 1]
    logits = table[IDS] @ state
    cap = model.config.logit_softcap
    return cap * np.tanh(logits / cap)


def plain_tree(model, heads, hidden, certain) -> dict[tuple[int, ...], float]:
    """The paths of the guesses that are kept, and their log probabilities."""
    level, found = {(certain,): 0.0}, {}
    for _ in range(LENGTH):
        behind = {}
        for path, score in level.items():
            logits = plain_logits(model, heads, hidden, path)
            logp = logits - np.log(np.exp(logits).sum())
            behind |= {(*path, int(token)): score + x for token, x in zip(IDS, logp, strict=True)}
        level = dict(sorted(behind.items(), key=lambda item: -item[1])[:WIDTH])
        found |= level
    return dict(sorted(found.items(), key=lambda item: -item[1])[:NODES])


def test_the_tree_holds_the_most_probable_paths(model):
    heads, hidden = random_heads(model), np.random.default_rng(0).normal(size=(2, model.config.d_model))
    draft = Hydra(model=model, heads=heads, length=LENGTH, width=WIDTH, size=NODES)
    certain = np.array([3, 8], np.int32)
    tokens, parents = hydra_tree(
        model, draft._weights, draft._vocabulary, jnp.asarray(hidden, jnp.float32), jnp.asarray(certain), LENGTH, WIDTH,
        NODES,
    )  # fmt: skip
    for row in range(2):
        paths = [(int(certain[row]),)]
        for token, parent in zip(tokens[row].tolist(), parents[row].tolist(), strict=True):
            paths.append((*paths[parent], token))
        assert set(paths[1:]) == set(plain_tree(model, heads, hidden[row], int(certain[row])))


@pytest.mark.quick
def test_the_best_nodes_keep_their_parents():
    tokens, parents = jnp.array([[5, 6, 7, 8]], jnp.int32), jnp.array([[0, 0, 2, 1]], jnp.int32)
    found = best_nodes(tokens, parents, jnp.array([[-3.0, -1.0, -1.0, -4.0]]), 3)
    assert found[0].tolist() == [[5, 6, 7]]
    assert found[1].tolist() == [[0, 0, 2]]
    found = best_nodes(tokens, parents, jnp.array([[-3.0, -1.0, -1.0, -4.0]]), 2)
    assert found[0].tolist() == [[6, 7]]
    assert found[1].tolist() == [[0, 1]]


def test_some_rows_of_the_vocabulary_say_what_the_model_says(model):
    hidden = jax.random.normal(jax.random.key(1), (1, 2, model.config.d_model))
    vocabulary = DraftVocabulary.from_model(model, jnp.asarray(IDS))
    expected = model.logits(hidden)[..., IDS]
    np.testing.assert_allclose(vocabulary.logits(model, hidden), expected, rtol=1e-4, atol=1e-5)
    untied = build(GQA)
    vocabulary = DraftVocabulary.from_model(untied, jnp.asarray(IDS))
    np.testing.assert_allclose(vocabulary.logits(untied, hidden), untied.logits(hidden)[..., IDS], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_heads_change_nothing(model, name):
    sampler = sj.Sampler(temperature=0 if name == "greedy" else 0.8)
    texts = []
    for draft in (None, Hydra(model=model, heads=random_heads(model), size=NODES)):
        state = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=9), 2)
        made = sj.generate(
            model, state, random_tokens(2, 7, seed=2), max_new_tokens=14, sampler=sampler, key=jax.random.key(3),
            draft=draft,
        )  # fmt: skip
        texts.append(np.asarray(made[1]))
    np.testing.assert_array_equal(texts[0], texts[1])


def test_files(model, tmp_path):
    heads, path = random_heads(model), tmp_path / "heads.safetensors"
    heads.save(path)
    found = HydraHeads.load(path)
    for a, b in zip(
        jax.tree.leaves((heads.inward, heads.outward)), jax.tree.leaves((found.inward, found.outward)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert found.ids.tolist() == IDS.tolist()
    assert (found.model, found.tokens) == (heads.model, 5)
    assert Hydra(model=model, heads=path, length=9).length == LENGTH
    with pytest.raises(ValueError, match="trained for another model"):
        Hydra(model=build(LOCAL, seed=1), heads=path)
    with pytest.raises(ValueError, match="no hydra heads could be read"):
        HydraHeads.load(tmp_path / "none.safetensors")
    sj_file = tmp_path / "other.safetensors"
    HydraHeads(heads.inward[1:], heads.outward[1:], IDS, heads.model, 5).save(sj_file)
    with pytest.raises(ValueError, match="head 1 has matrices"):
        HydraHeads.load(sj_file)

"""Prompt tokens behind the nodes of a tree: what they see, what they say later, and text that they do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.attention.token_tree import TokenTree
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative import ParallelPrompts, trained_drafter
from streamjax.streaming.speculative.heads.parallel_prompts import tree_of_prompts
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.speculative.heads.vocabulary import DraftVocabulary
from streamjax.streaming.speculative.tree_verification import verify_tree_pass, with_prompts
from tests.streaming.tiny_models import GQA, VOCAB, build, random_tokens

IDS = np.arange(1, VOCAB, 2, dtype=np.int32)
GREEDY = sj.Sampler(temperature=0)
CACHE = sj.kv.preset("streaming_llm", sinks=2, window=9)


@pytest.fixture(scope="module")
def model():
    return build(GQA)


@pytest.fixture(scope="module")
def prompts(model):
    """Embeddings of two of the model's own tokens: what it says behind them can be asked for by reading them."""
    return PromptTokens(np.asarray(model.embed(jnp.array([[7, 30]])))[0], IDS, fingerprint_in_any_dtype(model), 3)


@pytest.mark.quick
def test_prompts_stand_behind_each_node(model, prompts):
    @jax.jit
    def found(parents, given, tokens):
        return with_prompts(model, tokens, TokenTree.from_parents(parents, given, 3), jnp.asarray(prompts.prompts))[:2]

    given = np.array([[True, True, False]])
    tokens, whole = found(np.array([[0, 0, 1]], np.int32), given, np.array([[3, 4, 99]], np.int32))
    assert tokens[0].tolist() == [3, 4, 0, 0, 0, 0, 0, 0, 0]
    assert whole.parent[0].tolist() == [0, 0, 1, 0, 3, 1, 5, 2, 7]
    assert whole.depth[0].tolist() == [0, 1, 2, 1, 2, 2, 3, 3, 4]
    assert whole.given[0].tolist() == [True, True, False, True, True, True, True, False, False]


def test_what_prompts_say_is_what_the_model_says_behind_them(model, prompts):
    """The pass goes on to the right node, leaves no trace of prompts, and tells what stood behind that node."""
    start = random_tokens(1, 6, seed=9)
    read = sj.read(model, sj.init_state(model, CACHE), start)

    def behind(*ids):
        """The stream behind so many tokens, by one program, and what is likeliest next."""
        chunk, count = np.zeros((1, 4), np.int32), len(ids)
        chunk[0, :count] = ids
        state, logits = sj.step(model, jax.tree.map(jnp.copy, read), chunk, jnp.array([count], jnp.int32))
        return state, int(np.asarray(logits)[0, count - 1].argmax())

    one = behind(5)[1]
    after, two = behind(5, one)
    tokens = jnp.array([[5, (one + 1) % VOCAB, one]], jnp.int32)
    parents = jnp.zeros((1, 3), jnp.int32)
    index = jnp.zeros(1, jnp.int32)
    done = verify_tree_pass(
        model, jax.tree.map(jnp.copy, read), tokens, parents, jnp.ones((1, 3), bool), None, index, 2, GREEDY, (),
        jnp.asarray(prompts.prompts),
    )  # fmt: skip
    assert done.count.tolist() == [2]
    assert done.following.tolist() == [two]
    for leaf, other in zip(jax.tree.leaves(done.state), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-4)
    for i, chain in enumerate(((5, one, 7), (5, one, 7, 30))):
        np.testing.assert_allclose(done.ahead[:, i], behind(*chain)[0].hidden, atol=1e-4)


def test_the_most_probable_pairs(model):
    ahead, certain = jax.random.normal(jax.random.key(4), (1, 2, 16)), jnp.array([3], jnp.int32)
    vocabulary = DraftVocabulary.from_model(model, jnp.asarray(IDS))
    tokens, parents = tree_of_prompts(model, vocabulary, ahead, certain, 3, 5)
    one, two = np.asarray(jax.nn.log_softmax(vocabulary.logits(model, ahead)))[0]
    paths = {(int(IDS[i]),): one[i] for i in np.argsort(-one)[:3]}
    pairs = {(*path, int(token)): score + x for path, score in paths.items() for token, x in zip(IDS, two, strict=True)}
    paths |= dict(sorted(pairs.items(), key=lambda item: -item[1])[:3])
    found = [()]
    for token, parent in zip(tokens[0].tolist(), parents[0].tolist(), strict=True):
        found.append((*found[parent], token))
    assert set(found[1:]) == set(sorted(paths, key=lambda path: -paths[path])[:5])


@pytest.mark.slow
def test_prompts_change_nothing(model, prompts):
    texts = []
    for draft in (None, ParallelPrompts(model=model, heads=prompts)):
        state = sj.init_state(model, CACHE, 2)
        made = sj.generate(model, state, random_tokens(2, 7), max_new_tokens=14, sampler=GREEDY, draft=draft)
        texts.append(np.asarray(made[1]))
    np.testing.assert_array_equal(texts[0], texts[1])


def test_files(model, prompts, tmp_path):
    path = tmp_path / "prompts.safetensors"
    prompts.save(path)
    draft = trained_drafter(model, path)
    assert isinstance(draft, ParallelPrompts)
    np.testing.assert_array_equal(draft.heads.prompts, prompts.prompts)
    assert (draft.length, draft.nodes, draft.pass_width) == (2, 3, 12)
    with pytest.raises(ValueError, match="trained for another model"):
        trained_drafter(build(GQA, seed=1), path)
    with pytest.raises(ValueError, match="no hydra heads could be read"):
        trained_drafter(model, tmp_path / "none.safetensors")

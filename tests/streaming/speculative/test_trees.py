"""Trees of guesses: each node is read as if the stream had gone on along its path, and one path is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.attention.token_tree import TokenTree
from streamjax.streaming.speculative.drafter import Drafts, ways_of_tree
from streamjax.streaming.speculative.tree_verification import chosen_path
from streamjax.streaming.speculative.two_phases import (
    allowed_levels,
    look_ahead,
    look_ahead_in_tree,
    take_in_first,
    waiting_along,
)
from tests.streaming.speculative.test_two_phases import CACHES, MODELS
from tests.streaming.tiny_models import GQA, build, random_tokens

SLOW = pytest.mark.slow
LEVELS, ROUNDS = 4, 8
PARENTS = np.array([[0, 0, 0, 1, 1, 2, 3], [0, 0, 1, 2, 0, 4, 4]], np.int32)
NODES = PARENTS.shape[1]


tree_of = jax.jit(TokenTree.from_parents, static_argnums=2)


@pytest.mark.quick
def test_shapes_of_trees():
    """The module's example, with a node of a missing parent and one that is too deep."""
    parents = jnp.array([[0, 0, 0, 1, 2, 4, 5]], jnp.int32)
    tree = tree_of(parents, jnp.array([[True, True, True, False, True, True, True]]), 4)
    assert tree.depth.tolist() == [[0, 1, 1, 2, 2, 3, 3]]
    assert tree.given.tolist() == [[True, True, True, False, True, True, False]]
    assert tree.sees[0, 4].tolist() == [True, False, True, False, True, False, False]
    assert tree.cut(jnp.array([2])).given.tolist() == [[True, True, True, False, False, False, False]]
    path, valid = jax.jit(TokenTree.paths)(tree)
    assert path[0, 5].tolist() == [0, 2, 4, 5]
    assert path[0, 1, :2].tolist() == [0, 1]
    assert valid[0, 1].tolist() == [True, True, False, False]
    assert ways_of_tree(np.asarray(parents, np.int32))[0][5] == [0, 2, 4, 5]
    with pytest.raises(ValueError, match="in front of it"):
        ways_of_tree(np.array([[0, 2, 0]], np.int32))


@pytest.mark.quick
def test_the_path_that_a_model_goes():
    """It ends where no child is the choice, and behind a node after which nothing may come; a row may stand still."""
    parents = jnp.broadcast_to(jnp.array([0, 0, 0, 2, 2]), (3, 5))
    tokens = jnp.broadcast_to(jnp.array([9, 5, 6, 5, 7]), (3, 5))
    given = jnp.array([[True] * 5, [True] * 5, [False] * 5])
    chosen = jnp.broadcast_to(jnp.array([6, 5, 7, 0, 0]), (3, 5))
    goes_on = jnp.ones((3, 5), bool).at[1, 2].set(False)
    path, count = jax.jit(chosen_path)(tree_of(parents, given, 4), tokens, chosen, goes_on)
    assert count.tolist() == [3, 2, 0]
    assert path[0, :3].tolist() == [0, 2, 4]
    assert path[1, :2].tolist() == [0, 2]


@pytest.mark.quick
def test_the_first_way_of_a_tree():
    drafts = Drafts(np.array([[1, 2, 3, 4]], np.int32), np.array([4], np.int32), np.array([[0, 0, 1, 3]], np.int32))
    first = drafts.first_ways(2)
    assert first.tokens.tolist() == [[1, 3]]
    assert first.count.tolist() == [2]


@jax.jit
def in_tree_and_in_chain(model, state, tokens, given, nodes):
    """Hidden states of the path to a node of each row, as far as it is given, and the state behind it, by the tree and
    by a chunk."""
    tree = TokenTree.from_parents(jnp.asarray(PARENTS), given, LEVELS)
    tree = tree.cut(allowed_levels(state, LEVELS))
    hidden, waiting = look_ahead_in_tree(model, state, tokens, tree)
    rows = jnp.arange(2)
    path, valid = (x[rows, nodes] for x in tree.paths())
    count = jnp.sum(valid & tree.given[rows[:, None], path], axis=1, dtype=jnp.int32)
    hidden, chain = hidden[rows[:, None], path], tokens[rows[:, None], path]
    found = take_in_first(model, state, waiting_along(waiting, path), hidden, chain, count)
    expected, waiting = look_ahead(model, state, chain, count)
    return (hidden, found), (expected, take_in_first(model, state, waiting, expected, chain, count)), count


def check(model, caches):
    draw = np.random.default_rng(4)
    state = sj.init_state(model, caches, batch_size=2, note_used=True)
    depths = set()
    for i in range(ROUNDS):
        tokens = jnp.asarray(random_tokens(2, NODES, seed=i) % model.config.vocab_size)
        given = np.ones((2, NODES), bool)
        given[0, draw.integers(1, NODES)] = False
        nodes = jnp.asarray([6, draw.integers(0, NODES)] if i % 2 else draw.integers(0, NODES, 2), jnp.int32)
        (hidden, found), (near, wanted), count = in_tree_and_in_chain(model, state, tokens, jnp.asarray(given), nodes)
        depths |= set(count.tolist())
        for row, n in enumerate(count.tolist()):
            np.testing.assert_allclose(hidden[row, :n], near[row, :n], atol=2e-4, rtol=2e-4, err_msg=f"round {i}")
        leaves = (jax.tree_util.tree_leaves_with_path(x) for x in (found, wanted))
        for (path, leaf), (_, other) in zip(*leaves, strict=True):
            where = f"round {i}: {jax.tree_util.keystr(path)}"
            if leaf.dtype == np.float32:
                np.testing.assert_allclose(leaf, other, atol=2e-4, rtol=2e-4, err_msg=where)
            elif leaf.dtype in (np.int32, np.uint32, bool):
                np.testing.assert_array_equal(leaf, other, err_msg=where)
        state = wanted
    assert max(depths) >= 2
    assert int(state.seen.max()) > 10


USUAL = ("snapkv",)
RARER = tuple(name for name in CACHES if name not in USUAL)


@pytest.mark.parametrize("names", [USUAL, *(pytest.param(RARER[i::3], marks=SLOW) for i in range(3))])
def test_nodes_and_paths_in_every_cache(names):
    """One cache a layer."""
    check(build(GQA.replace(num_layers=len(names), head_dim=8)), [CACHES[name] for name in names])


OTHERS = tuple(name for name in MODELS if name != "chunk memory")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_nodes_and_paths_in_every_kind_of_layer(name):
    """Recurrent states, which read each path by itself, chunks, latent keys and windows of the model's own."""
    kind, options = sj.kv.parse_preset("streaming_llm:sinks=2,window=7")
    check(build(MODELS[name]), sj.kv.preset(kind, **options))

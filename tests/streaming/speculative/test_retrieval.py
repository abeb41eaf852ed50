"""Which chunks of a stream a drafter reads, and that it guesses by them what the newest tokens alone do not say."""

import collections
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import streamjax as sj
from streamjax.streaming.speculative import Retrieval, SmallModel
from streamjax.streaming.speculative.drafter import Draws
from streamjax.streaming.speculative.history import History
from streamjax.streaming.speculative.retrieval import relevance
from tests.streaming.tiny_models import GQA, build, random_tokens

CACHE = sj.kv.preset("window", window=64)


def oracle(chunks: list[list[int]], question: list[int]) -> list[float]:
    """BM25 as it is written down: a sum over the question's words, chunk by chunk."""
    mean = sum(len(chunk) for chunk in chunks) / len(chunks)
    found = []
    for chunk in chunks:
        counts, score = collections.Counter(chunk), 0.0
        for word in set(question):
            having = sum(word in other for other in chunks)
            rarity = math.log(1 + (len(chunks) - having + 0.5) / (having + 0.5))
            score += rarity * counts[word] * 2.2 / (counts[word] + 1.2 * (0.25 + 0.75 * len(chunk) / mean))
        found.append(score)
    return found


WORDS = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@pytest.mark.quick
@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_chunks_are_ranked_by_bm25(chunks, question):
    found = relevance([np.array(chunk, np.int32) for chunk in chunks], np.array(question, np.int32))
    np.testing.assert_allclose(found, oracle(chunks, question), rtol=1e-12)


@pytest.mark.quick
def test_the_best_chunks_in_their_order_and_the_newest_tokens_once():
    text = [1, 2, 3, 50, 5, 6, 7, 51, 9, 10, 50, 51, 13, 14, 50, 51]
    one, two = Retrieval(chunks=1, size=4, asked=2), Retrieval(chunks=2, size=4, asked=2)
    assert one.read(text, newest=2).tolist() == [9, 10, 50, 51, 50, 51]  # it has both
    assert two.read(text, newest=2).tolist() == [1, 2, 3, 50, 9, 10, 50, 51, 50, 51]  # of equal ones the older
    assert two.read(text, newest=6).tolist() == [1, 2, 3, 50, 5, 6, 7, 51, 50, 51, 13, 14, 50, 51]  # a chunk is cut
    assert two.read([8, 9, 7, 6], newest=2).tolist() == [7, 6]  # nothing is shared
    assert two.read([8, 9], newest=6).tolist() == [8, 9]
    assert two.read([], newest=6).tolist() == []


def test_a_stream_that_is_new_or_was_missed_is_retrieved_again():
    """What it guesses is what the model says behind the chunks and the newest tokens, and nothing else."""
    model, text = build(GQA), random_tokens(1, 200, seed=3)[0]
    retrieval = Retrieval(chunks=2, size=8, asked=8)
    drafter = SmallModel(length=3, model=model, cache=CACHE, context=16, retrieval=retrieval)
    stream, greedy = History(text[:120]), sj.Sampler(temperature=0)

    def guess() -> list[int]:
        draws = Draws(greedy, None, np.zeros(1, np.int32), jnp.zeros((1, 1)))
        return drafter.propose([stream], [True], draws).tokens[0].tolist()

    def expected(shortened: np.ndarray) -> list[int]:
        state = sj.init_state(model, CACHE, 1)
        return np.asarray(sj.generate(model, state, shortened[None], max_new_tokens=3, sampler=greedy)[1])[0].tolist()

    first = retrieval.read(text[:120], 16)
    assert len(first) == 32
    assert guess() == expected(first)
    stream.extend(text[120:130])  # few enough to be read on
    assert guess() == expected(np.concatenate((first, text[120:130])))
    stream.extend(text[130:])  # more than it reads at a time
    assert guess() == expected(retrieval.read(text, 16))


def test_wrong_options():
    with pytest.raises(ValueError, match=r"Retrieval\.chunks is 0"):
        Retrieval(chunks=0)

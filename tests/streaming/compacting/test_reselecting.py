"""Answers that read a choice of what a stream holds: by hand, and in sessions."""

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming.compacting.reselecting import Reselection, generate_reselecting
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, PROMPT, start

DENSE = sj.kv.preset("dense", capacity=64)
SMALL = sj.kv.preset("snapkv", window=4, size=4, every=4)
GREEDY = sj.Sampler(temperature=0)


@pytest.fixture(scope="module")
def model():
    return build(BYTES)


def oracle(model, ids, cache, every, asked, count):
    """Greedy tokens, one at a time, from a choice that is made behind every `every` of them by all that was read."""
    ids, said = list(ids), []
    while len(said) < count:
        whole = sj.read(model, sj.init_state(model, DENSE), np.array([ids]), 32)
        chosen = sj.compact(model, whole, cache, np.array([ids[-asked:]]))
        logits = model.logits(chosen.hidden[:, None])
        for _ in range(min(every, count - len(said))):
            said.append(int(np.argmax(np.asarray(logits)[0, -1])))
            ids.append(said[-1])
            chosen, logits = sj.step(model, chosen, np.array([[said[-1]]]))
    return said


def test_every_few_tokens_are_chosen_for_anew(model):
    ids = [256, *PROMPT[:19].encode()]
    state = sj.read(model, sj.init_state(model, DENSE), np.array([ids]), 32)
    choice = Reselection(SMALL, every=4, asked=3)
    pieces = list(generate_reselecting(model, state, ids, choice, max_new_tokens=10, sampler=GREEDY))
    state, said = pieces[-1][0], [int(token) for _, tokens in pieces for token in tokens[0]]
    assert said == oracle(model, ids, SMALL, 4, 3, 10)
    plain = np.asarray(sj.forward(model, np.array([[*ids, *said]])))[0, len(ids) - 1 : -1].argmax(axis=-1)
    assert said != plain.tolist()  # the choice is one
    whole = sj.read(model, sj.init_state(model, DENSE), np.array([[*ids, *said]]), 32)  # and nothing is lost by it
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), state, whole)


@pytest.mark.slow
def test_a_session_answers_so(model):
    ids = [256, *PROMPT[:19].encode()]
    said = oracle(model, ids, SMALL, 4, 3, 10)
    session = start(model, DENSE, chunk_size=32, sampler=GREEDY, reselect=Reselection(SMALL, every=4, asked=3))
    list(session.generate(PROMPT[:19], max_new_tokens=10))
    assert session.tokens_seen == 30
    assert session._history.tokens[-10:].tolist() == said


def test_nonsense_is_one_line(model):
    with pytest.raises(ValueError, match="give draft or reselect, not both"):
        start(model, DENSE, draft=sj.NGrams(), reselect=Reselection(SMALL))
    with pytest.raises(ValueError, match=r"Reselection\.every is 0"):
        Reselection(SMALL, every=0)

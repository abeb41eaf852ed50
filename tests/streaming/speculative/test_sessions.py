"""A session that drafts says what it would have said, and stands where it would have stood."""

import pytest

import streamjax as sj
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, PROMPT, start


@pytest.fixture(scope="module")
def model():
    return build(BYTES)


def draft() -> sj.NGrams:
    return sj.NGrams(length=3, shortest=1)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_the_same_text_in_two_calls(model, temperature, tmp_path):
    texts, seen = [], []
    for drafter in (None, draft()):
        session = start(model, sampler=sj.Sampler(temperature=temperature, top_k=4), draft=drafter)
        text = "".join(session.generate(PROMPT, max_new_tokens=40))
        session.save(tmp_path / str(len(texts)))
        session.load(tmp_path / str(len(texts)))
        texts.append(text + "|" + "".join(session.generate(max_new_tokens=21)))
        seen.append(session.tokens_seen)
        assert int(session.state.seen[0]) == session.tokens_seen
    assert texts[0] == texts[1]
    assert seen[0] == seen[1] == 32 + 61


def test_nothing_is_read_behind_a_stop_string(model):
    """A guess may run over the end of a text: the stream stands behind the token that holds it."""
    plain = start(model, sampler=sj.Sampler(temperature=0))
    text = "".join(plain.generate(PROMPT, max_new_tokens=60))
    word = text[30:32]
    ends = []
    for drafter in (None, draft()):
        session = start(model, sampler=sj.Sampler(temperature=0), draft=drafter)
        found = "".join(session.generate(PROMPT, max_new_tokens=60, stop=word))
        assert session.stopped_by == word
        assert found == text[: text.index(word)]
        assert int(session.state.seen[0]) == session.tokens_seen
        ends.append(session.tokens_seen)
    assert ends[0] == ends[1]


def test_a_new_stream_knows_what_the_last_one_said(model):
    drafter = draft()
    session = start(model, sampler=sj.Sampler(temperature=0), draft=drafter)
    "".join(session.generate(PROMPT, max_new_tokens=9))
    session.reset()
    assert drafter._recent.total == 32 + 9

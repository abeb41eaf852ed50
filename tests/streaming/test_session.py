"""Sessions: text that is right at every border, and a state that has read exactly what is counted."""

import signal

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.streaming import session as session_module
from tests.streaming.tiny_models import GQA, build
from tests.streaming.tiny_sessions import BYTES, CACHE, PROMPT, Endless, certain, continued, start


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the suite runs in the background and was started without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model() -> sj.Decoder:
    return build(BYTES)


@pytest.mark.parametrize("block", [1, 5])
def test_generates_what_generate_does(model, block):
    """The penalty meets the prompt's tokens too."""
    sampler = sj.Sampler(repetition_penalty=1.3, top_k=20)
    session = start(model, sampler=sampler, seed=3)
    text = "".join(session.generate(PROMPT, max_new_tokens=40, block=block))
    assert text == certain(continued(model, PROMPT, 40, sampler, seed=3))
    assert session.tokens_seen == 1 + len(PROMPT) + 40


@pytest.mark.quick
def test_what_reads_the_cache_is_kept_over_a_reset(model):
    session = start(model, implementation="xla")
    session.reset()
    assert session.state.implementation == "xla"


def test_two_calls_draw_what_one_draws(model):
    once = "".join(start(model).generate(PROMPT, max_new_tokens=60))
    session = start(model)
    parts = "".join(session.generate(PROMPT, max_new_tokens=23))
    parts += "".join(session.generate(max_new_tokens=37, block=5))
    assert parts == once
    assert len(set(once)) > 10


def test_reading_in_pieces_is_reading_at_once(model):
    texts = ["Straße", "", "and so on and on and on ", "東京!!"]
    pieces = start(model, sampler=sj.Sampler(temperature=0))
    assert [pieces.read(text) for text in texts] == [1 + 7, 0, 24, 8]
    whole = start(model, chunk_size=64, sampler=sj.Sampler(temperature=0))
    whole.read("".join(texts))
    assert pieces.tokens_seen == whole.tokens_seen == 40
    assert "".join(pieces.generate(max_new_tokens=20)) == "".join(whole.generate(max_new_tokens=20))


def test_a_text_that_is_read_twice_is_read_behind_itself(model):
    """With BOS before the first time alone; ids are read as they are; a cache with an end needs room for both."""
    text = "Straße, and so on"
    sessions = [start(model, sampler=sj.Sampler(temperature=0)) for _ in range(3)]
    counts = [sessions[0].read(text, twice=True), sessions[1].read(text + text)]
    counts.append(sessions[2].read([256, *text.encode()], add_bos=False) + sessions[2].read([*text.encode()]))
    assert counts == [1 + 2 * 18] * 3
    said = {"".join(session.generate(max_new_tokens=12)) for session in sessions}
    assert len(said) == 1
    ended = start(model, sj.kv.preset("dense", capacity=30))
    with pytest.raises(ValueError, match="30"):
        ended.read(text, twice=True)
    assert ended.tokens_seen == 0
    assert ended.read([1, 2, 3], twice=True) == 6


def test_scores_a_text_without_the_bos_before_it(model):
    ids = np.array([[256, *PROMPT.encode()]])
    logits = jax.nn.log_softmax(sj.forward(model, ids))[0]
    expected = [-logits[i, token] for i, token in enumerate(PROMPT.encode())]
    session = start(model, cache=sj.kv.preset("dense", capacity=64))
    scored = np.concatenate([session.score(PROMPT[:7]), session.score(PROMPT[7:])])
    np.testing.assert_allclose(scored, np.array(expected), atol=1e-4)
    assert session.tokens_seen == len(PROMPT) + 1


def test_stop_strings_end_the_text_wherever_tokens_end(model):
    sampler = sj.Sampler(temperature=0)
    text = "".join(start(model, sampler=sampler).generate(PROMPT, max_new_tokens=60))
    at = next(i for i in range(10, 50) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i)
    stop = text[at : at + 3]
    session = start(model, sampler=sampler)
    pieces = list(session.generate(PROMPT, max_new_tokens=60, stop=["no such thing", stop]))
    assert "".join(pieces) == text[:at]
    assert session.stopped_by == stop
    used = session.tokens_seen - 1 - len(PROMPT)
    assert continued(model, PROMPT, 60, sampler)[:used].decode(errors="replace") == text[: at + 3]
    session.read("x")
    assert session.stopped_by is None


def test_a_stop_token_is_read_and_not_shown(model):
    sampler = sj.Sampler(temperature=0)
    generated = continued(model, PROMPT, 40, sampler)
    stop = generated[12]
    first = generated.index(stop)
    session = start(model, sampler=sampler)
    for block in (1, 5):
        session.reset()
        text = "".join(session.generate(PROMPT, max_new_tokens=40, stop_tokens=[stop], block=block))
        assert text == generated[:first].decode(errors="replace")
        assert session.tokens_seen == 1 + len(PROMPT) + first + 1
        assert session.stopped_by == stop


def interrupt_after(monkeypatch, name: str, calls: int) -> None:
    """Ctrl-C comes when a step has been given the state, and before anyone has seen what it returned."""
    real, count = getattr(session_module, name), 0

    def step(*args, **kwargs):
        nonlocal count
        count += 1
        result = real(*args, **kwargs)
        if count == calls:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(session_module, name, step)


def test_an_interrupted_read_has_read_what_it_counts(model, monkeypatch):
    interrupt_after(monkeypatch, "read", 2)
    session = start(model, sampler=sj.Sampler(temperature=0))
    with pytest.raises(KeyboardInterrupt):
        session.read(PROMPT)
    assert session.tokens_seen == 16
    session.read(PROMPT[15:])
    untouched = start(model, sampler=sj.Sampler(temperature=0))
    untouched.read(PROMPT)
    assert "".join(session.generate(max_new_tokens=20)) == "".join(untouched.generate(max_new_tokens=20))


def test_an_interrupted_generation_loses_nothing(model, monkeypatch):
    whole = "".join(start(model).generate(PROMPT, max_new_tokens=50))
    real = session_module.generate_blocks

    def interrupted(*args, **kwargs):
        for i, block in enumerate(real(*args, **kwargs)):
            if i == 3:
                signal.raise_signal(signal.SIGINT)
            yield block

    session, text = start(model), ""
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "generate_blocks", interrupted)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            for piece in session.generate(PROMPT, max_new_tokens=50, block=5):
                text += piece
    assert session.tokens_seen == 1 + len(PROMPT) + 20
    text += session.pending()
    assert session.pending() == ""
    text += "".join(session.generate(max_new_tokens=30))
    assert text == whole


def test_a_generation_that_was_overtaken_cannot_go_on(model):
    session = start(model)
    older = session.generate(PROMPT, max_new_tokens=200)
    next(older)
    session.read("something else")
    with pytest.raises(ValueError, match="has gone on since"):
        list(older)


def test_a_dense_session_ends_where_its_cache_does(model):
    session = start(model, cache=sj.kv.preset("dense", capacity=20))
    assert session.room == 20
    session.read("0123456789")
    assert session.room == 9
    for attempt in (
        lambda: session.read("0123456789"),
        lambda: session.score("0123456789"),
        lambda: session.generate("abc", max_new_tokens=7),
    ):
        with pytest.raises(ValueError, match="the cache holds 20 tokens: 11 are used and 10 more do not fit"):
            attempt()
    assert session.tokens_seen == 11
    list(session.generate("abc", max_new_tokens=6))
    assert session.room == 0


def test_what_a_session_holds_does_not_grow(model):
    session = start(model)
    at_first = session.cache_bytes
    for _ in range(20):
        session.read("and on, and on, and on.."[:24])
    list(session.generate(max_new_tokens=30))
    assert session.cache_bytes == at_first
    assert session.room is None


def test_reset_forgets_everything(model):
    session = start(model, seed=4)
    first = "".join(session.generate(PROMPT, max_new_tokens=20))
    session.reset(4)
    assert session.tokens_seen == 0
    assert "".join(session.generate(PROMPT, max_new_tokens=20)) == first


def test_mistakes_are_told_in_one_line(model):
    session = start(model)
    with pytest.raises(ValueError, match="token id 259 is outside the model's vocabulary of 259"):
        session.read([1, 259])
    with pytest.raises(ValueError, match="stop string must not be empty"):
        session.generate("abc", max_new_tokens=1, stop=["", "x"])
    with pytest.raises(ValueError, match="nothing to continue"):
        session.generate("", max_new_tokens=1, add_bos=False)
    with pytest.raises(ValueError, match="259 ids and the model 40"):
        start(build(GQA))
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        start(model, chunk_size=0)
    assert session.tokens_seen == 0


class Tuned(Endless):
    """Ends a text by itself at one id."""

    eos_ids = (ord("."),)


def test_the_model_and_the_tokenizer_together_say_what_stops(model, tmp_path):
    """A list in config.json alone is enough, as `save_hf` writes it."""
    sampler = sj.Sampler(temperature=0)
    generated = continued(model, PROMPT, 40, sampler)
    stop = next(token for token in generated[10:] if generated.index(token) >= 10)
    tuned = build(BYTES.replace(eos_token_ids=(3, stop)))
    sj.save_hf(tuned, tmp_path / "model")
    assert not (tmp_path / "model" / "generation_config.json").exists()
    session = sj.Session(sj.load(tmp_path / "model"), Tuned(), CACHE, chunk_size=8, sampler=sampler)
    assert session.stop_ids == (ord("."), 3, stop)
    text = "".join(session.generate(PROMPT, max_new_tokens=40))
    assert session.stopped_by == stop
    assert text == generated[: generated.index(stop)].decode(errors="replace")
    with pytest.raises(ValueError, match="stop token id 259 is outside the model's vocabulary of 259"):
        session.generate("abc", max_new_tokens=1, stop_tokens=[259])


def test_a_tokenizer_whose_stop_ids_the_model_lacks_is_refused(model):
    class Wrong(Endless):
        eos_ids = (2**31,)

    with pytest.raises(ValueError, match="stop token id 2147483648 is outside the model's vocabulary of 259"):
        sj.Session(model, Wrong(), CACHE)

"""Sessions with tokenizers of every kind: what is read and generated in pieces is one text."""

from pathlib import Path

import numpy as np
import pytest

import streamjax as sj
from streamjax.data import load_tokenizer
from streamjax.streaming import session as session_module
from streamjax.streaming.text_output import TextOutput
from tests.data.conftest import KINDS, TEXTS
from tests.data.conftest import tokenizer_folders as tokenizer_folders
from tests.streaming.tiny_models import GQA, build

pytestmark = pytest.mark.quick
WORDS = [kind for kind in KINDS if kind != "over_words"]  # what a token never reaches over, between words


@pytest.fixture
def session(request, tokenizer_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    """A session whose model says what it is told to; `session.says` are the ids."""
    tokenizer = load_tokenizer(tokenizer_folders[request.param])
    model = build(GQA.replace(vocab_size=tokenizer.vocab_size, num_layers=1))
    made = sj.Session(model, tokenizer, sj.kv.preset("window", window=16), chunk_size=8)

    def blocks(model, state, prompt, *, max_new_tokens, stop_tokens, **options):
        for token in made.says[:max_new_tokens]:
            del made.says[0]
            yield state, np.array([[token]], np.int32)
            if token in stop_tokens:
                return

    monkeypatch.setattr(session_module, "generate_blocks", blocks)
    monkeypatch.setattr(session_module, "read", lambda model, state, tokens, chunk_size, **_: state)
    monkeypatch.setattr(
        session_module, "score_unwaited", lambda model, state, tokens, chunk, **_: (state, np.zeros(tokens.shape))
    )
    return made


def every(*kinds: str):
    return pytest.mark.parametrize("session", kinds, indirect=True)


@every(*WORDS)
def test_a_text_that_is_read_in_pieces_is_one_text(session):
    text = TEXTS[0].strip()
    cut = text.index(" fox")
    whole = session.tokenizer.encode(text)
    read = session.encode(text[:cut])
    session.read(text[:cut])
    read += session.encode(text[cut:])
    assert session.score(text[cut:]).shape == (len(whole) - session.tokens_seen + len(session.encode(text[cut:])),)
    assert read == whole
    assert session.tokens_seen == len(whole)


@every(*WORDS)
def test_a_text_begins_behind_special_tokens(session):
    bos = session.tokenizer.bos_id
    assert session.encode("fox", add_bos=True) == [bos, *session.tokenizer.encode("fox")]
    session.read([bos])
    assert session.encode("fox") == session.tokenizer.encode("fox")
    session.read("fox")
    assert session.encode("fox", add_bos=True) == [bos, *session.tokenizer.encode("fox")]


@every(*KINDS)
def test_prompt_and_pieces_are_the_text(session):
    """Whatever was read or generated before: spaces stay, and none is added."""
    tokenizer = session.tokenizer
    ids = tokenizer.encode(TEXTS[0])
    for start, stop in ((3, 9), (9, 9), (9, 14)):
        if start == 3:
            session.read(ids[:start])
        session.says = ids[start:stop]
        text = "".join(session.generate(max_new_tokens=stop - start)) if stop > start else ""
        assert tokenizer.decode(ids[:start]) + text == tokenizer.decode(ids[:stop])
    session.says = ids[20:24]
    text = "".join(session.generate(ids[14:20], max_new_tokens=4))
    assert tokenizer.decode(ids[:20]) + text == tokenizer.decode(ids[:24])


@every("byte_fallback", "first_space", "no_prefix")
def test_a_line_end_of_sentencepiece_stops_at_once(session):
    line_end = session.tokenizer._tokenizer.token_to_id("<0x0A>")
    word, eos = session.tokenizer.encode("fox"), session.tokenizer.eos_id
    for says in ([line_end, eos], [line_end] * 5, [line_end, *word, eos]):
        session.reset()
        session.read(word)
        session.says = list(says)
        assert list(session.generate(max_new_tokens=9, stop=["\n"])) == []
        assert session.stopped_by == "\n"
        assert session.tokens_seen == len(word) + 1
    session.says = [line_end] * 5
    assert list(session.generate(max_new_tokens=5)) == ["\n"] * 5


@every("byte_fallback", "byte_level")
def test_what_is_saved_of_a_session_goes_on_with_its_text(session):
    ids = session.tokenizer.encode("The quick brown fox jumps")
    session.read(ids[:3])
    session.says = ids[3:5]
    list(session.generate(max_new_tokens=2))
    output = TextOutput(session.tokenizer, **session._output.to_json_dict())
    output.push(ids[5:])
    assert session.tokenizer.decode(ids[:5]) + output.take() == "The quick brown fox jumps"


@every(*WORDS)
def test_what_a_user_types_is_text(session):
    eos = session.tokenizer.eos_id
    assert eos not in session.encode("fox</s>")
    session.parse_special = True
    assert session.encode("fox</s>")[-1] == eos


@every("byte_level")
def test_an_id_that_the_model_lacks_is_refused_when_it_is_used(session):
    """Gemma 3's text models have no row for their tokenizer's placeholder of an image."""
    tokenizer = session.tokenizer
    assert tokenizer.encode("<|r|>") == [tokenizer.vocab_size - 1]
    model = build(GQA.replace(vocab_size=tokenizer.vocab_size - 1, num_layers=1))
    smaller = sj.Session(model, tokenizer, sj.kv.preset("window", window=16), parse_special=True)
    assert smaller.read("fox") > 0
    for use in (smaller.read, smaller.score, lambda text: smaller.generate(text, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"token id {tokenizer.vocab_size - 1} is outside the model's vocabulary"):
            use("fox <|r|>")
    with pytest.raises(ValueError, match="ids and the model 40: they do not belong together"):
        sj.Session(build(GQA), tokenizer, sj.kv.preset("window", window=16))

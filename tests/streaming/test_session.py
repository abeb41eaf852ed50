"""Sessions: text that is right at every border, and a state that has read exactly what is counted."""

import codecs
import dataclasses
import json
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import streamjax as sj
from streamjax.data import ByteTokenizer
from streamjax.streaming import session as session_module
from tests.streaming.tiny_models import GQA, build

BYTES = GQA.replace(vocab_size=259, num_layers=1, bos_token_id=256)
CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14))
PROMPT = "Once upon a time, there was one"  # 32 tokens with BOS: four chunks of one width


class Endless(ByteTokenizer):
    """Bytes, without a token that ends a text."""

    eos_ids = ()


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the suite runs in the background and was started without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def model() -> sj.Decoder:
    return build(BYTES)


def start(model, cache=CACHE, chunk_size=8, **options) -> sj.Session:
    return sj.Session(model, Endless(), cache, chunk_size=chunk_size, **options)


def continued(model, prompt: str, count: int, sampler: sj.Sampler, seed: int = 0) -> bytes:
    """The same by the library's function, on tokens; ids that are no bytes are left out."""
    ids = np.array([[256, *prompt.encode()]])
    _, tokens = sj.generate(
        model, sj.init_state(model, CACHE), ids, max_new_tokens=count, sampler=sampler, key=jax.random.key(seed)
    )
    return bytes(int(t) for t in tokens[0] if t < 256)


def certain(data: bytes) -> str:
    """The text of bytes without a last character that is not whole."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


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


RESUME = """
import sys
import streamjax as sj
model = sj.load(sys.argv[1])
session = sj.Session(model, sj.load_tokenizer(), sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14)), chunk_size=8)
extra = session.load(sys.argv[2])
text = "".join(session.generate(max_new_tokens=50, stop_tokens=()))
sys.stdout.buffer.write((extra["word"] + text).encode())
"""


@pytest.mark.quick
def test_a_saved_session_goes_on_in_another_process(model, tmp_path):
    """Saved in the middle of a character, with a sampler that the other process is not told of."""
    folder, saved = tmp_path / "model", tmp_path / "session"
    sj.save_hf(model, folder)
    model = sj.load(folder)
    session = start(model, sampler=sj.Sampler(temperature=0.9, top_k=40, repetition_penalty=1.1), seed=5)
    list(session.generate(PROMPT, max_new_tokens=10))
    while list(session.generate(max_new_tokens=1)):
        pass  # until a token gives no text: it begins a character
    session.save(saved, {"word": "again: "})
    expected = "again: " + "".join(session.generate(max_new_tokens=50))
    run = subprocess.run([sys.executable, "-c", RESUME, folder, saved], capture_output=True, check=True)
    assert run.stdout.decode() == expected


def test_a_session_refuses_what_belongs_to_another(model, tmp_path):
    session = start(model)
    session.read(PROMPT)
    session.save(tmp_path / "saved")
    for other, message in [
        (start(build(BYTES.replace(mlp_dim=16))), "another model"),
        (start(build(BYTES, seed=1)), "other weights"),
        (start(model, cache=sj.kv.preset("window", window=16)), r"saved with the cache .*sinks=2.* has .*Window"),
    ]:
        other.read("abc")
        with pytest.raises(ValueError, match=message) as raised:
            other.load(tmp_path / "saved")
        assert "\n" not in str(raised.value)
        assert other.tokens_seen == 4
        assert other.read("abc") == 3
    with pytest.raises(ValueError, match="no session at"):
        session.load(tmp_path / "nowhere")
    sj.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="holds no session"):
        session.load(tmp_path / "model")


def test_saving_again_replaces_and_never_overwrites_something_else(model, tmp_path):
    session = start(model)
    session.read("abc")
    session.save(tmp_path / "saved")
    session.read("def")
    session.save(tmp_path / "saved", {"n": 2})
    other = start(model)
    assert other.load(tmp_path / "saved") == {"n": 2}
    assert other.tokens_seen == 7
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(ValueError, match="is no checkpoint"):
        session.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "precious"


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


def test_what_is_saved_is_plain_data(model, tmp_path):
    session = start(model)
    list(session.generate("abc", max_new_tokens=3))
    session.save(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "about" / "metadata").read_text())
    assert about["tokens_seen"] == 7
    assert about["sampler"]["temperature"] == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_four_calls_with_a_penalty_draw_what_one_draws(model, tmp_path, temperature):
    """The penalty meets all that the stream has read: in earlier calls, by `read`, and before it was saved."""
    sampler = sj.Sampler(temperature=temperature, repetition_penalty=1.7)
    once = "".join(start(model, sampler=sampler).generate(PROMPT, max_new_tokens=40))
    without = "".join(start(model, sampler=sj.Sampler(temperature=temperature)).generate(PROMPT, max_new_tokens=40))
    assert once != without
    four = start(model, sampler=sampler)
    text = "".join("".join(four.generate("" if i else PROMPT, max_new_tokens=10)) for i in range(4))
    assert text == once
    read = start(model, sampler=sampler)
    read.read(PROMPT[:9])
    read.score(PROMPT[9:])
    assert "".join(read.generate(max_new_tokens=40)) == once
    saved = start(model, sampler=sampler)
    text = "".join(saved.generate(PROMPT, max_new_tokens=10))
    saved.save(tmp_path / "saved")
    other = start(model)
    other.read("something else")
    other.load(tmp_path / "saved")
    assert text + "".join(other.generate(max_new_tokens=30)) == once
    other.reset()
    assert not np.asarray(other.state.used).any()


def test_a_session_that_an_older_version_saved_goes_on(model, tmp_path):
    """It holds no ids that were read: a penalty meets those that follow."""
    session = start(model, sampler=sj.Sampler(temperature=0))
    session.read(PROMPT)
    state = session.state
    session.state = dataclasses.replace(state, used=None)
    session.save(tmp_path / "old")
    session.state = state
    expected = "".join(session.generate(max_new_tokens=20))
    other = start(model)
    other.load(tmp_path / "old")
    assert "".join(other.generate(max_new_tokens=20)) == expected
    assert other.state.used.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_seen", 7),
        ("tokens_seen", "32"),
        ("tokens_seen", -1),
        ("tokens_seen", 32.0),
        ("stopped_by", [1]),
        ("sampler", {"temperature": -1}),
        ("sampler", {"heat": 1}),
        ("sampler", None),
        ("key", [1, 2, 3]),
        ("key", "ab"),
        ("key", [-1, 2]),
        ("drawn", True),
        ("output", {"tail": "xyz"}),
        ("output", {"held": 3}),
        ("output", {"tails": []}),
        ("extra", 3),
        ("caches", []),
        ("weights", None),
        ("model", {}),
        ("model", 3),
        ("sampler", ...),
        ("extra", ...),
    ],
)
def test_a_damaged_session_is_refused_whole(model, tmp_path, field, value):
    """Whatever field of it is wrong, or missing: the session is as it was, and the error is one line."""
    session = start(model)
    session.read(PROMPT)
    session.save(tmp_path / "saved")
    other = start(model, sampler=sj.Sampler(temperature=0, repetition_penalty=1.3), seed=3)
    list(other.generate("abc", max_new_tokens=5))
    before, output = {name: value for name, value in vars(other).items()}, other._output.to_json_dict()
    file = tmp_path / "saved" / "about" / "metadata"
    about = json.loads(file.read_text())
    if value is ...:
        del about[field]
    else:
        about[field] = value
    file.write_text(json.dumps(about))
    (tmp_path / "saved" / "checksums.json").unlink(missing_ok=True)  # hashes would catch it before
    with pytest.raises(ValueError, match=r"saved") as error:
        other.load(tmp_path / "saved")
    assert "\n" not in str(error.value)
    assert all(vars(other)[name] is value for name, value in before.items())
    assert other._output.to_json_dict() == output


def test_what_was_kept_beside_a_session_can_be_refused_before_it_is_loaded(model, tmp_path):
    session = start(model)
    session.read(PROMPT)
    session.save(tmp_path / "saved", {"word": 3})
    other = start(model)

    def refuse(extra):
        raise ValueError(f"no word: {extra['word']}")

    with pytest.raises(ValueError, match="no word: 3"):
        other.load(tmp_path / "saved", refuse)
    assert other.tokens_seen == 0


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

"""Sessions on disk: they go on in another process, and whatever is wrong with a saved one, it is refused whole."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import streamjax as sj
from tests.covering import rest_slow
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, PROMPT, start


@pytest.fixture(scope="module")
def model() -> sj.Decoder:
    return build(BYTES)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The folder of a session that has read the prompt."""
    folder = tmp_path_factory.mktemp("session") / "saved"
    session = start(model)
    session.read(PROMPT)
    session.save(folder)
    return folder


RESUME = """
import sys
import streamjax as sj
model = sj.load(sys.argv[1])
session = sj.Session(model, sj.load_tokenizer(), sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14)), chunk_size=8)
extra = session.load(sys.argv[2])
text = "".join(session.generate(max_new_tokens=50, stop_tokens=()))
sys.stdout.buffer.write((extra["word"] + text).encode())
"""


@pytest.mark.slow
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


def test_what_is_saved_is_plain_data(model, tmp_path):
    session = start(model)
    list(session.generate("abc", max_new_tokens=3))
    session.save(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "about" / "metadata").read_text())
    assert about["tokens_seen"] == 7
    assert about["sampler"]["temperature"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", rest_slow([0.0, 1.2], 1.2))
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
def test_a_damaged_session_is_refused_whole(model, saved, tmp_path, field, value):
    """Whatever field of it is wrong, or missing: the session is as it was, and the error is one line."""
    shutil.copytree(saved, tmp_path / "saved")
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

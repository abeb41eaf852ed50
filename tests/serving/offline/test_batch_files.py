"""Files of requests and of answers: wrong lines are named, cut lines are mended."""

import json

import pytest

from streamjax.serving.offline.batch_files import answer_line, answered, read_requests

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "line 2: it is no JSON"),
        ("[" * 100_000, "line 2: it is no JSON"),
        ("[1]", "line 2: a request is an object"),
        (json.dumps({**GOOD, "custom_id": 3}), "line 2: custom_id must be a string"),
        (json.dumps(GOOD), "line 2: custom_id 'a' stands in an earlier line too"),
        (json.dumps({**GOOD, "custom_id": "b", "method": "GET"}), "line 2: method must be 'POST', not 'GET'"),
        (json.dumps({**GOOD, "custom_id": "b", "url": "/v1/embeddings"}), "line 2: url must be '/v1/chat/completions'"),
        (json.dumps({**GOOD, "custom_id": "b", "body": "x"}), "line 2: body must be an object"),
    ],
)
def test_wrong_lines_are_named(tmp_path, second, message):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + second + "\n")
    with pytest.raises(ValueError, match=message) as raised:
        read_requests(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "other").write_text("hello\n")
    for name, message in (("empty", "no request in it"), ("binary", "no text in UTF-8"), ("gone", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_requests(tmp_path / name)
    with pytest.raises(ValueError, match="line 1: it is no answer to a request; name another file"):
        answered(tmp_path / "other")
    assert (tmp_path / "other").read_text() == "hello\n"
    assert answered(tmp_path / "gone") == set()


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_an_answer_that_was_cut_short_is_none(tmp_path, cut):
    path = tmp_path / "answers.jsonl"
    whole = answer_line("ä", 200, {"text": "größe"})
    path.write_text(whole + answer_line("b", 200, {})[:-cut], encoding="utf-8")
    assert answered(path) == {"ä"}
    assert path.read_text(encoding="utf-8") == whole

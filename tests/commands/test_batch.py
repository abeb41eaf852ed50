"""`python -m infer.batch`: every request is answered once, as by itself, whatever order it is in."""

import json

import pytest

pytest.importorskip("starlette", reason="the extra [serve] is not installed")
from streamjax.commands import batch

SHARED = "Once upon a time there was a king who had "
BODIES = {
    f"{i}": {"model": "m", "prompt": SHARED + "abcdefgh"[i], "max_tokens": 3 + i, "temperature": 0} for i in range(5)
}
BODIES["wrong"] = {"model": "m", "prompt": "x", "max_tokens": -1}
BODIES["streamed"] = {"model": "m", "prompt": "x", "stream": True}
BODIES["other"] = {"model": "gpt", "prompt": "x"}
FLAGS = ("--cache=dense", "--rows=2", "--chunk_size=8", "--pool_tokens=200", "--name=m")


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "requests.jsonl"
    lines = [{"custom_id": i, "method": "POST", "url": "/v1/completions", "body": body} for i, body in BODIES.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return (f"--input={path}", f"--output={tmp_path}/answers.jsonl", *FLAGS)


def answers(folder):
    found = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line["response"] for line in found}


def test_a_job_is_answered_and_goes_on_where_it_stopped(command, job, tmp_path):
    outcome = command(batch, *job)
    assert outcome.status == 0, outcome.err
    assert "8 requests" in outcome.out
    assert "3 refused or failed" in outcome.out
    first = answers(tmp_path)
    assert {name: answer["status_code"] for name, answer in first.items()} == {
        **dict.fromkeys("01234", 200), "wrong": 400, "streamed": 400, "other": 404
    }  # fmt: skip
    assert first["3"]["body"]["usage"]["completion_tokens"] == 6
    assert first["wrong"]["body"]["error"]["param"] == "max_tokens"
    # cut in the middle of a line, the rest is answered again, in the file's order, and says the same
    path = tmp_path / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    kept = len(path.read_text().splitlines()) - 1
    outcome = command(batch, *job, "--order=file")
    assert outcome.status == 0, outcome.err
    assert f"{kept} of 8 requests are answered already" in outcome.err
    again = answers(tmp_path)
    assert {name: answer["body"].get("choices") for name, answer in again.items()} == {
        name: answer["body"].get("choices") for name, answer in first.items()
    }
    assert command(batch, *job).out == ""


def test_answers_do_not_go_into_the_file_of_requests(command, job):
    outcome = command(batch, job[0], job[0].replace("input", "output"), *FLAGS)
    assert outcome.status == 1
    assert "is the file of requests: name another one" in outcome.err


@pytest.mark.parametrize(("given", "missing"), [((), "--input is missing"), (("--input=x",), "--output is missing")])
def test_files_that_are_not_named_are_asked_for(command, given, missing):
    outcome = command(batch, *given)
    assert outcome.status
    assert missing in outcome.err
    assert outcome.err.count("\n") == 1

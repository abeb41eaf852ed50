"""The engine behind the API: many at once say what each says alone, and conversations outlive the server."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import jax
import openai
import pytest

import streamjax as sj
from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.serving.engine import Engine
from streamjax.serving.http.service import Service
from tests.processes import one_device_flags
from tests.serving.http.conftest import PATIENCE, TEMPLATE, serving, until
from tests.serving.http.test_chat import HI
from tests.streaming.tiny_models import build
from tests.streaming.tiny_sessions import BYTES, CACHE

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return ByteTokenizer(chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def server(tokenizer):
    model = build(BYTES)
    engine = Engine(model, tokenizer, CACHE, rows=3, chunk_size=8)
    service = Service(engine, "tiny", tokenizer, 259, (257,), cache_sizes=sj.kv.describe(CACHE, model))
    with serving(engine, service) as running:
        yield running


def say(client, text, **options):
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **options)
    return [choice.message.content for choice in answer.choices]


@pytest.mark.slow
def test_many_at_once_say_what_each_says_alone(server):
    client = server.client()
    texts = [f"number {i}" for i in range(10)]
    alone = [say(client, text, temperature=0, max_tokens=12) for text in texts]
    with ThreadPoolExecutor(10) as pool:
        assert list(pool.map(lambda text: say(client, text, temperature=0, max_tokens=12), texts)) == alone
    assert len({answer[0] for answer in alone}) > 1


def test_equal_seeds_give_equal_texts(server):
    client = server.client()
    first = say(client, "hi", seed=11, n=3, max_tokens=16)
    assert first == say(client, "hi", seed=11, n=3, max_tokens=16)
    assert len(set(first)) == 3
    assert first[2] == say(client, "hi", seed=13, max_tokens=16)[0]
    assert say(client, "hi", max_tokens=16) != say(client, "hi", max_tokens=16)  # no seed


def test_a_conversation_is_one_stream(server, tokenizer):
    """Its answers are those of a session that reads the same turns."""
    from streamjax.streaming.conversation import Conversation

    session = sj.Session(server.engine.model, tokenizer, CACHE, sampler=sj.Sampler(temperature=0), chunk_size=8)
    talk, client = Conversation(session), server.client()
    for text in ("first", "second", "third"):
        expected = "".join(talk.reply(text, max_new_tokens=10))
        assert say(client, text, temperature=0, max_tokens=10, extra_body={"conversation": "one"}) == [expected]
    kept = next(each for each in server.engine.conversations() if each.name == "one")
    assert kept.tokens_seen == session.tokens_seen


def test_forms_are_held_against_a_model_that_knows_none(server):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22]}, "b": {"type": "boolean"}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(4):
        found = json.loads(say(server.client(), "hi", response_format=form, seed=seed, max_tokens=64)[0])
        assert found["a"] in (1, 22)
        assert isinstance(found["b"], bool)
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    answer = server.client().chat.completions.create(
        model="tiny", messages=HI, tools=[tool], tool_choice="required", seed=1, max_tokens=128
    )
    assert set(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)) == {"a", "b"}


def test_logprobs_and_usage(server):
    answer = server.client().chat.completions.create(
        model="tiny", messages=HI, temperature=0, logprobs=True, top_logprobs=3, max_tokens=5
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 5 == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
    again = server.client().chat.completions.create(model="tiny", messages=HI, temperature=0, max_tokens=5)
    assert 0 <= again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens


class Process:
    """`python -m infer.serve` in a process of its own."""

    def __init__(self, *options):
        command = [
            sys.executable,
            "-m",
            "infer.serve",
            "--port=0",
            "--rows=2",
            *map(str, options),
        ]
        environment = {**os.environ, "XLA_FLAGS": one_device_flags(), "STREAMJAX_API_KEYS": "secret"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.words = ""
        for line in self.process.stderr:
            self.words += line
            if found := re.search(r"serving at (http://127\.0\.0\.1:\d+)", line):
                self.client = openai.OpenAI(
                    base_url=f"{found[1]}/v1", api_key="secret", max_retries=0, timeout=PATIENCE
                )
                return
        raise AssertionError(self.words)

    def end(self, number):
        self.process.send_signal(number)
        self.words += self.process.stderr.read()
        return self.process.wait(PATIENCE)


@pytest.mark.slow
def test_a_conversation_goes_on_behind_kill_9_and_behind_sigterm(tmp_path):
    config = BYTES.replace(eos_token_ids=(257,), max_position=32)
    sj.save_hf(sj.Decoder(config, jax.random.key(1)), tmp_path / "tiny")
    options = (
        f"--model={tmp_path / 'tiny'}",
        f"--state_dir={tmp_path / 'state'}",
        f"--compilation_cache={tmp_path / 'compiled'}",
        "--cache=streaming_llm:sinks=2,window=30",
    )

    def turn(server, name, text):
        return say(server.client, text, temperature=0, max_tokens=8, extra_body={"conversation": name})

    first = Process(*options)
    expected = [turn(first, "whole", text) for text in ("a", "b", "c")]
    assert turn(first, "killed", "a") == expected[0]
    assert first.end(signal.SIGKILL) == -signal.SIGKILL
    second = Process(*options)
    assert turn(second, "killed", "b") == expected[1]
    assert turn(second, "killed", "c") == expected[2]
    listed = second.client.get("/conversations", cast_to=object)["data"]
    assert {each["id"] for each in listed} == {"whole", "killed"}
    assert len({each["tokens_seen"] for each in listed}) == 1
    assert second.end(signal.SIGTERM) == 0
    assert "Traceback" not in second.words


@pytest.mark.slow
def test_32_streams_outlive_kill_9(tmp_path):
    """Each stands behind the last answer whose end its client has seen, or behind one more, and says what it would."""
    config = BYTES.replace(eos_token_ids=(257,), max_position=32)
    sj.save_hf(build(config), tmp_path / "tiny")
    options = (
        f"--model={tmp_path / 'tiny'}",
        f"--state_dir={tmp_path / 'state'}",
        f"--compilation_cache={tmp_path / 'compiled'}",
        "--cache=streaming_llm:sinks=2,window=30",
        "--rows=8",
        "--nonarrow",
    )
    names, turns = [f"talk-{i}" for i in range(32)], 12

    def say_in_pieces(server, name, turn):
        asked = {"temperature": 0, "max_tokens": 8, "extra_body": {"conversation": name}, "stream": True}
        messages = [{"role": "user", "content": f"{turn}, {turn * 7}?"}]
        pieces = server.client.chat.completions.create(model="tiny", messages=messages, **asked)
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    def tokens_seen(server):
        listed = server.client.get("/conversations", cast_to=object)["data"]
        return {each["id"]: each["tokens_seen"] for each in listed}

    first = Process(*options)
    expected, seen, ended = [], [0], dict.fromkeys(names, 0)
    for turn in range(turns + 1):
        expected.append(say_in_pieces(first, "alone", turn))
        seen.append(tokens_seen(first)["alone"])
    assert len(set(expected)) > 3

    def talk(name):
        with contextlib.suppress(openai.APIError, httpx.TransportError):  # the server is gone
            for turn in range(turns):
                assert say_in_pieces(first, name, turn) == expected[turn]
                ended[name] += 1

    with ThreadPoolExecutor(len(names)) as pool:
        found = [pool.submit(talk, name) for name in names]
        until(lambda: min(ended.values()) > 0 and sum(ended.values()) > 40)
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
    for each in found:
        each.result()
    assert min(ended.values()) < turns
    second = Process(*options)
    kept = tokens_seen(second)
    for name in names:
        assert kept[name] in seen[ended[name] : ended[name] + 2]
        turn = seen.index(kept[name])
        assert say_in_pieces(second, name, turn) == expected[turn]
    assert second.end(signal.SIGTERM) == 0
    assert "Traceback" not in second.words


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        (["--host=192.0.2.1"], None, "--host=192.0.2.1"),
        (["--mesh=tensor=-1"], None, "--mesh"),
        ([], " , ", "STREAMJAX_API_KEYS"),
        (["--cache=nothing"], None, "nothing"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(options, keys, message, monkeypatch, capsys):
    from streamjax.commands import serve

    if keys is not None:
        monkeypatch.setenv("STREAMJAX_API_KEYS", keys)
    assert serve.main(["serve", "--port=0", "--compilation_cache=", *options]) == 1
    out = capsys.readouterr()
    assert message in out.err
    assert out.err.count("\n") == 1

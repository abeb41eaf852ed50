"""Chats and completions by the real client, over a real socket."""

import openai
import pytest

from streamjax.data.text.tokenizers import ByteTokenizer
from tests.serving.http.conftest import patient

HI = [{"role": "user", "content": "hi"}]


def decoded(request) -> str:
    return ByteTokenizer().decode(request.prompt)


def test_an_answer_and_its_usage(server, engine):
    answer = server.client().chat.completions.create(model="tiny", messages=HI, seed=7, temperature=0)
    assert answer.choices[0].message.content == "hello"
    assert (answer.choices[0].finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert decoded(engine.requests[0]) == "<user>hi\x1e\n<assistant>"
    assert engine.requests[0].stop_ids == (257,)
    assert engine.requests[0].sampling.seed == 7


@pytest.mark.parametrize("include", [False, True])
def test_a_stream_is_the_answer_in_pieces(server, engine, include):
    options = {"stream_options": {"include_usage": True}} if include else {}
    chunks = list(server.client().chat.completions.create(model="tiny", messages=HI, stream=True, **options))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == "hello"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == ([6] if include else [])


def test_every_way_of_choosing_reaches_the_engine(server, engine):
    server.client().chat.completions.create(
        model="tiny", messages=HI, n=3, seed=5, max_completion_tokens=2, temperature=0.5, top_p=0.9, stop=["a", "b"],
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"65": 3}, user="me", metadata={"a": "b"}, store=False,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2},
    )  # fmt: skip
    assert [request.sampling.seed for request in engine.requests] == [5, 6, 7]
    request = engine.requests[0]
    assert (request.max_new_tokens, request.stop) == (2, ("a", "b"))
    assert request.sampling.logit_bias == ((65, 3.0),)
    found = request.sampling
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 4, 0.1)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (0.5, -0.5, 1.2)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server, engine, stream):
    answer = server.client().chat.completions.create(
        model="tiny", messages=HI, logprobs=True, top_logprobs=2, n=2, stream=stream
    )
    if stream:
        found = [c.choices[0] for c in answer if c.choices and c.choices[0].logprobs]
        entries = [entry for choice in found if choice.index == 1 for entry in choice.logprobs.content]
    else:
        entries = answer.choices[1].logprobs.content
    assert [entry.token for entry in entries] == list("hello")
    assert entries[0].bytes == [104]
    assert [top.token for top in entries[0].top_logprobs] == ["h", "i"]


def test_contents_in_parts_and_special_tokens_in_them_are_text(server, engine):
    parts = [{"type": "text", "text": "a<eos>"}, {"type": "text", "text": "b"}]
    server.client().chat.completions.create(model="tiny", messages=[{"role": "user", "content": parts}])
    assert "a<eos>b" in decoded(engine.requests[0])
    assert not set(engine.requests[0].prompt) & {256, 257}


def test_completions(server, engine):
    client = server.client()
    answer = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, echo=True, seed=1)
    assert [choice.text for choice in answer.choices] == ["abhello", "abhello", "cdhello", "cdhello"]
    assert answer.usage.prompt_tokens == 6
    assert answer.usage.completion_tokens == 24
    assert [request.sampling.seed for request in engine.requests] == [1, 2, 1, 2]
    answer = client.completions.create(model="tiny", prompt=[97, 98], logprobs=1)
    assert answer.choices[0].logprobs.tokens == list("hello")
    assert answer.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4]
    stream = client.completions.create(model="tiny", prompt="x", stream=True, max_tokens=3)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hel"


def test_models(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "streamjax"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": None}, 400, "missing_required_parameter", "model"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, 400, "missing_required_parameter", "messages[0].content"),
        ({"messages": [{"role": "king", "content": ""}]}, 400, "invalid_value", "messages[0].role"),
        ({"messages": [7]}, 400, "invalid_type", "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value",
         "messages[0].content[0].type"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"temperature": True}, 400, "invalid_type", "temperature"),
        ({"n": 0}, 400, "invalid_value", "n"),
        ({"n": 10**30}, 400, "invalid_value", "n"),
        ({"temperature": 10**400}, 400, "invalid_value", "temperature"),
        ({"seed": 10**30}, 400, "invalid_value", "seed"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**6}, 400, "invalid_value", "max_tokens"),
        ({"stop": ["", "x"]}, 400, "invalid_value", "stop"),
        ({"logit_bias": {"300": 1}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, 400, "invalid_value", "logit_bias"),
        ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
        ({"stream_options": {}}, 400, "invalid_value", "stream_options"),
        ({"temprature": 1}, 400, "unknown_parameter", "temprature"),
        ({"best_of": 4}, 400, "unsupported_parameter", "best_of"),
        ({"audio": {}}, 400, "unsupported_parameter", "audio"),
        ({"conversation": "../x"}, 400, "invalid_value", "conversation"),
        ({"conversation": "a", "n": 2}, 400, "invalid_value", "n"),
        ({"tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
        ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}}, 400,
         "invalid_schema", "response_format.json_schema.schema"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(server, engine, change, status, code, param):
    body = {"model": "tiny", "messages": HI, **change}
    answer = patient.post(f"{server.url}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert not engine.requests


def test_what_the_engine_refuses_and_where_it_fails(server, engine):
    with pytest.raises(openai.BadRequestError, match="100000 tokens"):
        server.client().completions.create(model="tiny", prompt="x" * 100_001)
    engine.failure = "the model computed what is not finite"
    with pytest.raises(openai.InternalServerError, match="not finite"):
        server.client().chat.completions.create(model="tiny", messages=HI)
    with pytest.raises(openai.APIError, match="not finite"):
        list(server.client().chat.completions.create(model="tiny", messages=HI, stream=True))
    with pytest.raises(openai.NotFoundError, match="Unknown request URL"):
        server.client().embeddings.create(model="tiny", input="x")

"""Whatever a body holds, it is a request for the engine, or it is refused in one line that names a field."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from streamjax.serving.http.chat import prepare_chat
from streamjax.serving.http.completions import prepare_completion
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.reading.fields import parse_body
from tests.serving.http.conftest import fake_service
from tests.serving.http.test_forms import TOOLS

_, SERVICE = fake_service()
NAMES = [
    "model", "messages", "prompt", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stream",
    "stream_options",
    "max_tokens", "max_completion_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "conversation",
    "echo", "best_of", "suffix", "user", "modalities", "functions", "unheard_of",
]  # fmt: skip
LIKELY = [
    "tiny", "", "auto", "text", "\ud800", {"type": "json_object"}, {"type": "json_schema"}, TOOLS, [{}], [[1, 2], [3]],
    {"65": 1}, {"id": "x"}, [{"role": "user", "content": "x"}], [{"role": "assistant", "tool_calls": [{}]}],
    2**63, -1, 0.5,
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": {"a": {"pattern": "("}}}}},
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.sampled_from(LIKELY) | st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4), st.booleans())
def test_any_body(changes, is_chat):
    good = GOOD if is_chat else {"model": "tiny", "prompt": "hi"}
    call = prepared({**good, **changes}, is_chat)
    if isinstance(call, ApiError):
        assert 400 <= call.status < 500
        assert "\n" not in str(call)
        assert len(str(call)) < 700
        assert call.response().body
    else:
        assert 1 <= len(call.requests) <= 128
        assert all(0 <= token < 259 for request in call.requests for token in request.prompt)


def prepared(fields, is_chat):
    try:
        body = parse_body(json.dumps(fields).encode())
        return prepare_chat(SERVICE, body, None) if is_chat else prepare_completion(SERVICE, body)
    except ApiError as error:
        return error


def test_half_a_character_is_refused():
    for text in ("\\ud800", "\\uD83D", "\\udc00\\ud800"):
        with pytest.raises(ApiError, match="valid JSON") as error:
            parse_body(f'{{"model": "{text}"}}'.encode())
        assert error.value.response().body
    assert parse_body(b'{"model": "\\ud83d\\ude00"}') == {"model": "\N{GRINNING FACE}"}


@pytest.mark.parametrize("data", [b"{}", b'{"a": 1e999}', '{"a": "ü"}'.encode()])
def test_any_json_is_read(data):
    assert isinstance(parse_body(data), dict)


def test_a_model_may_be_one_of_its_adapters():
    _, service = fake_service(adapters=("poet", "cook"))
    for name, adapter in (("tiny", None), ("cook", "cook")):
        chat = prepare_chat(service, {"model": name, "messages": [{"role": "user", "content": "x"}]}, None)
        text = prepare_completion(service, {"model": name, "prompt": "x"})
        assert {one.adapter for call in (chat, text) for one in call.requests} == {adapter}
    with pytest.raises(ApiError, match="'dog' does not exist: 'tiny' and 'poet' and 'cook' are here") as raised:
        prepare_completion(service, {"model": "dog", "prompt": "x"})
    assert raised.value.status == 404
    with pytest.raises(ValueError, match="adapter 'tiny' is called as the model is"):
        fake_service(adapters=("tiny",))

"""Answers in a given form: JSON, JSON schemas, calls of tools; held by the constraint whatever the model would say."""

import json

import hypothesis.strategies as st
import numpy as np
import openai
import pytest
from hypothesis import given

from streamjax.serving.http.reading.tools import Call, CallParser
from tests.serving.http.conftest import fake_service, serving
from tests.serving.http.test_chat import HI, decoded

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather of a town.", "parameters": {
        "type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"],
        "additionalProperties": False}}},
    {"type": "function", "function": {"name": "time"}},
]  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>'


def test_a_schema_is_held_whatever_the_model_would_say(server, engine):
    engine.answer = lambda request: '{"name": "Ada", "age": 36}'
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    answer = server.client().chat.completions.create(model="tiny", messages=HI, response_format=form)
    assert json.loads(answer.choices[0].message.content) == {"name": "Ada", "age": 36}
    assert answer.choices[0].finish_reason == "stop"
    engine.answer = lambda request: '[no{{"name":"x" never'
    answer = server.client().chat.completions.create(model="tiny", messages=HI, response_format=form, max_tokens=12)
    assert answer.choices[0].message.content.startswith('{"name": "')


def test_json_objects(server, engine):
    engine.answer = lambda request: '{"a": [1, 2]}'
    form = {"type": "json_object"}
    answer = server.client().chat.completions.create(model="tiny", messages=HI, response_format=form, n=2)
    assert [json.loads(choice.message.content) for choice in answer.choices] == [{"a": [1, 2]}] * 2
    first, second = (request.constraint for request in engine.requests)
    assert first is not second


def test_a_constraint_allows_its_end_alone_where_it_is_done_or_broken(server):
    constraint = server.service.grammars.json_schema({"const": 7}, "x")
    assert np.flatnonzero(constraint.allowed()).tolist() == [ord("7")]
    constraint.accept(ord("7"))
    assert np.flatnonzero(constraint.allowed()).tolist() == [257]
    constraint.accept(257)
    constraint.accept(ord("8"))
    assert np.flatnonzero(constraint.allowed()).tolist() == [257]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(server, engine, stream):
    engine.answer = lambda request: f"Let me look. {CALL}"
    answer = server.client().chat.completions.create(model="tiny", messages=HI, tools=TOOLS, stream=stream)
    assert "The weather of a town." in decoded(engine.requests[0])  # its template knows no tools
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in choices)
        calls = [call for choice in choices for call in choice.delta.tool_calls or []]
        reason = choices[-1].finish_reason
    else:
        message = answer.choices[0].message
        text, calls, reason = message.content, message.tool_calls, answer.choices[0].finish_reason
    assert (text, reason) == ("Let me look. ", "tool_calls")
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"town": "Oslo"})
    ]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is_called(server, engine, choice):
    engine.answer = lambda request: CALL.replace("Oslo", 'a</tool_call>"b'.replace('"', '\\"'))
    answer = server.client().chat.completions.create(model="tiny", messages=HI, tools=TOOLS, tool_choice=choice)
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"town": 'a</tool_call>"b'}
    assert answer.choices[0].message.content is None
    engine.answer = lambda request: "I would rather not."
    answer = server.client().chat.completions.create(
        model="tiny", messages=HI, tools=TOOLS, tool_choice=choice, max_tokens=30
    )
    assert answer.choices[0].message.content.startswith('<tool_call>\n{"name": "')  # cut short: no call
    assert answer.choices[0].finish_reason == "length"


def test_several_calls_have_to_be_asked_for(server, engine):
    engine.answer = lambda request: "\n".join([CALL] * 9)
    options = {"model": "tiny", "messages": HI, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    found = server.client().chat.completions.create(**options).choices[0]
    assert (len(found.message.tool_calls), found.finish_reason) == (1, "tool_calls")
    found = server.client().chat.completions.create(**options, parallel_tool_calls=True).choices[0]
    assert len(found.message.tool_calls) == 200 // (len(CALL) + 1)
    assert (found.message.content, found.finish_reason) == (None, "length")  # what was cut short is no text


def test_results_of_tools_come_back(server, engine):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
    messages = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "rain"}]  # fmt: skip
    server.client().chat.completions.create(model="tiny", messages=messages, tools=TOOLS, tool_choice="none")
    assert engine.requests[0].constraint is None
    assert "<user><tool_response>\nrain\n</tool_response>" in decoded(engine.requests[0])
    call["function"]["arguments"] = "no json"
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments"):
        server.client().chat.completions.create(model="tiny", messages=messages)


def test_a_template_that_has_tools_is_given_them():
    template = (
        "{% for tool in tools or [] %}tool {{ tool.function.name }};{% endfor %}<tool_call>{{ messages[0].content }}"
    )
    engine, service = fake_service(template)
    with serving(engine, service) as running:
        running.client().chat.completions.create(model="tiny", messages=HI, tools=TOOLS)
        assert decoded(engine.requests[0]) == "tool weather;tool time;<tool_call>hi"


@given(st.lists(st.sampled_from(["text", "<", "<tool_", CALL, "\n", "</tool_call>"]), max_size=6), st.integers(1, 7))
def test_calls_are_found_however_the_text_is_cut(parts, size):
    text, parser = "".join(parts), CallParser()
    found = [piece for i in range(0, len(text), size) for piece in parser.push(text[i : i + size])]
    whole = CallParser()
    expected = [*whole.push(text), whole.finish()]
    found.append(parser.finish())

    def merged(pieces):
        calls = [piece for piece in pieces if isinstance(piece, Call)]
        return calls, "".join("|" if isinstance(piece, Call) else piece for piece in pieces)

    assert merged(found) == merged(expected)
    assert len(merged(found)[0]) <= text.count(CALL)

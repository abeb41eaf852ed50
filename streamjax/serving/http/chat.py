"""`/v1/chat/completions`."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from streamjax.data.text.chat_templates import encode_chat
from streamjax.serving.http.conversations import hold, next_turn, read_conversation
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.generations import Generation
from streamjax.serving.http.logprobs import chat_logprobs
from streamjax.serving.http.reading.constraints import read_response_format
from streamjax.serving.http.reading.fields import Fields, wrong_value
from streamjax.serving.http.reading.messages import read_messages
from streamjax.serving.http.reading.request_options import Options, read_options
from streamjax.serving.http.reading.tools import Call, CallParser, read_tools, require_no_form
from streamjax.serving.http.sending import Answer
from streamjax.serving.http.service import Service
from streamjax.serving.requests import Event, Request, TokenLogprob, Usage
from streamjax.streaming.conversation import DEFAULT_STOP

_MOST_TOP = 20
_NOT_THERE = {
    "audio": "the model writes text",
    "prediction": "there are no drafts by a client",
    "web_search_options": "there is no search",
    "reasoning_effort": "a model's template decides",
    "verbosity": "the model decides",
}


@dataclasses.dataclass(frozen=True)
class ChatCall:
    """A chat request, ready for the engine."""

    requests: tuple[Request, ...]
    options: Options
    calls_tools: bool
    logprobs: bool
    conversation: str | None


def prepare_chat(service: Service, body: dict[str, Any], conversation: str | None) -> ChatCall:
    """Read a request.

    Args:
      service: what it is for.
      body: its fields.
      conversation: its `conversation`, which is held for it.

    Raises:
      ApiError: 400, names the field; 404, another model.
    """
    fields = Fields(body)
    read_conversation(fields)
    adapter = service.adapter_of(fields.required("model", str))
    messages = read_messages(fields)
    options = read_options(fields, service.vocab_size, service.default_tokens)
    tools = read_tools(fields)
    constraint = read_response_format(fields, service.grammars)
    logprobs = fields.take("logprobs", bool, default=False)
    top = fields.whole("top_logprobs", None, 0, _MOST_TOP)
    if top is not None and not logprobs:
        raise wrong_value("top_logprobs", "is only allowed where logprobs is true")
    modalities = fields.take("modalities", list, default=["text"])
    if modalities != ["text"]:
        raise wrong_value("modalities", "must be ['text']: the model writes nothing else")
    for name, why in _NOT_THERE.items():
        fields.refuse(name, why)
    fields.finish()
    require_no_form(tools, constraint)
    constraint = constraint or tools.constraint(service.grammars)
    if conversation is not None and options.n > 1:
        raise wrong_value("n", "must be 1 where a conversation goes on")
    with service.plain_errors():
        extra: dict[str, Any] = {}
        shared = 0
        if conversation is not None:
            prompt, extra = next_turn(service, conversation, messages, tools)
        else:
            told, values = tools.told(messages, service.tokenizer.chat_template)
            values = service.template_values | values
            prompt = encode_chat(service.tokenizer, told, **values)
            shared = service.beginnings.length(told, values, prompt)
    if service.tokenizer.chat_template is None:
        options = dataclasses.replace(options, stop=(*options.stop, DEFAULT_STOP))
    requests = options.requests(
        tuple(prompt),
        stop_ids=service.stop_ids,
        logprobs=(top or 0) if logprobs else None,
        conversation=conversation,
        adapter=adapter,
        shared=shared,
        extra=extra,
    )
    if constraint is not None:
        requests = (dataclasses.replace(request, constraint=constraint.copy()) for request in requests)
    return ChatCall(tuple(requests), options, tools.are_called, logprobs, conversation)


def prepare_pieces(service: Service, body: dict[str, Any]) -> ChatCall:
    """Read a request whose message comes in pieces: its fields are a chat's but for the messages.

    Raises:
      ApiError: as `prepare_chat`; a field that such a request cannot have.
    """
    for name in ("messages", "stream", "tools", "n"):
        if body.get(name) is not None:
            raise wrong_value(name, "must not be given where text comes in pieces")
    whole = {**body, "messages": [{"role": "user", "content": "-"}], "conversation": None, "stream": True}
    return prepare_chat(service, whole, None)


async def answer_chat(service: Service, body: dict[str, Any], ended: Any) -> Answer:
    """Submit a request, and answer it.

    Args:
      service: what answers.
      body: the request's fields.
      ended: is called when all of it has ended.
    """
    conversation = read_conversation(Fields(body))
    release = hold(service, conversation) if conversation is not None else None

    def done() -> None:
        if release is not None:
            release()
        ended()

    try:
        call = await service.prepare(prepare_chat, service, body, conversation)
    except BaseException:
        if release is not None:
            release()
        raise
    if conversation is not None:
        service.empty_conversations.pop(conversation, None)
    generation = service.generations.submit(call.requests, None if not call.options.stream else 4096, done)
    writer = ChatWriter(service, call, generation)
    if call.options.stream:
        return Answer(generation, pieces=writer.pieces())
    return Answer(generation, whole=writer.whole())


class _Choice:
    """What is known of one answer: its text and calls so far."""

    def __init__(self, parser: CallParser | None):
        self._parser = parser
        self.calls: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self.logprobs: list[TokenLogprob] = []

    def push(self, event: Event) -> tuple[str, list[dict[str, Any]]]:
        """The text and the calls that an event adds."""
        if self._parser is None:
            return event.text, []
        found: list[str | Call] = self._parser.push(event.text)
        if event.finish_reason is not None:
            rest = self._parser.finish()
            if not (self.calls and self._parser.is_call(rest)):  # one more that was cut short
                found.append(rest)
        text, calls = "", []
        for piece in found:
            if isinstance(piece, str):
                text += piece
                continue
            calls.append({
                "id": f"call_{secrets.token_hex(12)}", "type": "function",
                "function": {"name": piece.name, "arguments": piece.arguments},
            })  # fmt: skip
        self.calls += calls
        if self.calls and not text.strip():  # what stands between calls
            text = ""
        return text, calls

    def finish_reason(self, event: Event) -> str | None:
        """As OpenAI says it."""
        reason = event.finish_reason
        return "tool_calls" if reason == "stop" and self.calls else "stop" if reason == "cancelled" else reason


class ChatWriter:
    """Writes the answer of a chat request: whole, or in chunks.

    Args:
      service: what answers.
      call: the request.
      generation: its events.
    """

    def __init__(self, service: Service, call: ChatCall, generation: Generation):
        self._service, self._call, self._generation = service, call, generation
        self._clock = service.metrics.clock()
        self._choices = [_Choice(CallParser() if call.calls_tools else None) for _ in call.requests]
        self._usages: dict[int, Usage] = {}
        name = call.requests[0].adapter or service.name
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        self._tail = {} if call.conversation is None else {"conversation": {"id": call.conversation}}

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        async for index, event in self._generation.events():
            self._clock.tick(index, event)
            if event.usage is not None:
                self._usages[index] = event.usage
            yield index, event

    def _logprobs(self, event: Event) -> Sequence[TokenLogprob]:
        return [entry for entry in event.logprobs if entry.token not in self._service.stop_ids]

    async def whole(self) -> dict[str, Any]:
        """The answer, when it has ended."""
        reasons: dict[int, str | None] = {}
        async for index, event in self._events():
            choice = self._choices[index]
            text, _ = choice.push(event)
            choice.texts.append(text)
            choice.logprobs += self._logprobs(event)
            if event.finish_reason == "error":
                raise ApiError(500, event.error or "the engine failed", code="engine_error")
            if event.finish_reason is not None:
                reasons[index] = choice.finish_reason(event)
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.texts)
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text if text or not choice.calls else None,
                "refusal": None,
            }
            if choice.calls:
                message["tool_calls"] = choice.calls
            logprobs = chat_logprobs(self._service.tokenizer, choice.logprobs) if self._call.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reasons.get(index, "stop")}
            )
        usage = self.usage()
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage, **self._tail}

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The answer's chunks as they come."""
        sent: dict[int, int] = {}  # calls of each choice
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, event in self._events():
            if event.finish_reason == "error":
                yield ApiError(500, event.error or "the engine failed", code="engine_error").body()
                return
            choice = self._choices[index]
            text, calls = choice.push(event)
            logprobs = self._logprobs(event) if self._call.logprobs else []
            if text or logprobs:
                yield self._chunk(index, {"content": text}, logprobs)
            for call in calls:
                number = sent.get(index, 0)
                sent[index] = number + 1
                yield self._chunk(index, {"tool_calls": [{"index": number, **call}]})
            if event.finish_reason is not None:
                yield self._chunk(index, {}, reason=choice.finish_reason(event))
        if self._call.options.include_usage and not self._generation.overrun:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self.usage(), **self._tail}

    def usage(self) -> dict[str, Any]:
        """What it took, at the end."""
        return usage_json(self._usages.values(), shared_prompt=True)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Sequence[TokenLogprob] = (), reason: str | None = None
    ) -> dict[str, Any]:
        about = chat_logprobs(self._service.tokenizer, logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": about, "finish_reason": reason}
        usage = {"usage": None} if self._call.options.include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, **self._tail}


def usage_json(usages: Any, shared_prompt: bool) -> dict[str, Any]:
    """Tokens of a request's choices together, in OpenAI's form.

    Args:
      usages: of each choice.
      shared_prompt: whether all have one prompt, which counts once.
    """
    found = list(usages)
    prompts = found[:1] if shared_prompt else found
    prompt, cached = sum(u.prompt_tokens for u in prompts), sum(u.cached_tokens for u in prompts)
    completion = sum(u.completion_tokens for u in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }

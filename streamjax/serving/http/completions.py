"""`/v1/completions`: a text goes on, without a chat template."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from streamjax.serving.http.chat import usage_json
from streamjax.serving.http.errors import ApiError
from streamjax.serving.http.generations import Generation
from streamjax.serving.http.logprobs import completion_logprobs
from streamjax.serving.http.reading.fields import Fields, wrong_type, wrong_value
from streamjax.serving.http.reading.request_options import MOST_CHOICES, Options, read_options
from streamjax.serving.http.sending import Answer
from streamjax.serving.http.service import Service
from streamjax.serving.requests import Event, Request, Usage

_DEFAULT_TOKENS = 16  # OpenAI's
_MOST_TOP = 5


@dataclasses.dataclass(frozen=True)
class CompletionCall:
    """A completion request, ready for the engine; `echoes` is what stands before each choice's text."""

    requests: tuple[Request, ...]
    options: Options
    logprobs: int | None
    echoes: tuple[str, ...]


def prepare_completion(service: Service, body: dict[str, Any]) -> CompletionCall:
    """Read a request.

    Raises:
      ApiError: 400, names the field; 404, another model.
    """
    fields = Fields(body)
    adapter = service.adapter_of(fields.required("model", str))
    with service.plain_errors():
        prompts = _prompts(service, fields)
    options = read_options(fields, service.vocab_size, _DEFAULT_TOKENS)
    if options.n * len(prompts) > MOST_CHOICES:
        raise wrong_value("n", f"makes more than {MOST_CHOICES} choices with {len(prompts)} prompts")
    logprobs = fields.whole("logprobs", None, 0, _MOST_TOP)
    echo = fields.take("echo", bool, default=False)
    if echo and logprobs is not None:
        raise wrong_value("echo", "is not possible with logprobs: those of a prompt are not computed")
    fields.refuse("suffix", "the model writes forwards", "")
    fields.finish()
    requests = [
        request
        for prompt in prompts
        for request in options.requests(tuple(prompt), stop_ids=service.stop_ids, logprobs=logprobs, adapter=adapter)
    ]
    echoes = [service.tokenizer.decode(request.prompt) if echo else "" for request in requests]
    return CompletionCall(tuple(requests), options, logprobs, tuple(echoes))


def _prompts(service: Service, fields: Fields) -> list[list[int]]:
    given = fields.take("prompt", str, list, default="")
    if isinstance(given, str) or (
        given and all(isinstance(token, int) and not isinstance(token, bool) for token in given)
    ):
        given = [given]
    if not 0 < len(given) <= MOST_CHOICES:
        raise wrong_value("prompt", f"must have 1 to {MOST_CHOICES} prompts, and has {len(given)}")
    return [_ids(service, prompt) for prompt in given]


def _ids(service: Service, prompt: Any) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos, parse_special=False)
    elif isinstance(prompt, list):
        ids = prompt
    else:
        raise wrong_type("prompt", "strings or arrays of token ids", prompt)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < service.vocab_size:
            raise wrong_value("prompt", f"must have token ids below {service.vocab_size}, and has {token!r}"[:200])
    if not ids:
        raise wrong_value("prompt", "must not be empty: the model has no token that begins a text")
    return ids


async def answer_completion(service: Service, body: dict[str, Any], ended: Callable[[], None]) -> Answer:
    """Submit a request, and answer it; `ended` is called when all of it has ended."""
    call = await service.prepare(prepare_completion, service, body)
    generation = service.generations.submit(call.requests, None if not call.options.stream else 4096, ended)
    writer = CompletionWriter(service, call, generation)
    if call.options.stream:
        return Answer(generation, pieces=writer.pieces())
    return Answer(generation, whole=writer.whole())


class CompletionWriter:
    """Writes the answer of a completion request: whole, or in chunks.

    Args:
      service: what answers.
      call: the request.
      generation: its events.
    """

    def __init__(self, service: Service, call: CompletionCall, generation: Generation):
        self._service, self._call, self._generation = service, call, generation
        self._clock = service.metrics.clock()
        self._usages: dict[int, Usage] = {}
        self._lengths = [len(echo) for echo in call.echoes]  # characters so far
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
            "created": int(time.time()), "model": call.requests[0].adapter or service.name,
        }  # fmt: skip

    async def pieces(self) -> AsyncIterator[dict[str, Any]]:
        """The answer's chunks as they come."""
        for index, echo in enumerate(self._call.echoes):
            if echo:
                yield self._chunk(index, echo, [], None)
        async for index, event in self._generation.events():
            self._clock.tick(index, event)
            if event.usage is not None:
                self._usages[index] = event.usage
            if event.finish_reason == "error":
                yield ApiError(500, event.error or "the engine failed", code="engine_error").body()
                return
            if event.text or event.logprobs or event.finish_reason:
                yield self._chunk(index, event.text, [event], _reason(event))
        if self._call.options.include_usage and not self._generation.overrun:
            yield {**self._head, "choices": [], "usage": self._usage()}

    async def whole(self) -> dict[str, Any]:
        """The answer, when it has ended."""
        count = len(self._call.requests)
        events: list[list[Event]] = [[] for _ in range(count)]
        async for index, event in self._generation.events():
            self._clock.tick(index, event)
            events[index].append(event)
            if event.usage is not None:
                self._usages[index] = event.usage
            if event.finish_reason == "error":
                raise ApiError(500, event.error or "the engine failed", code="engine_error")
        choices = []
        for index, mine in enumerate(events):
            text = self._call.echoes[index] + "".join(event.text for event in mine)
            choices.append(self._choice(index, text, mine, _reason(mine[-1]) if mine else "stop"))
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _chunk(self, index: int, text: str, events: Sequence[Event], reason: str | None) -> dict[str, Any]:
        usage = {"usage": None} if self._call.options.include_usage else {}
        return {**self._head, "choices": [self._choice(index, text, events, reason)], **usage}

    def _choice(self, index: int, text: str, events: Sequence[Event], reason: str | None) -> dict[str, Any]:
        logprobs = None
        if self._call.logprobs is not None and events:
            found = itertools.chain.from_iterable(event.logprobs for event in events)
            kept = [entry for entry in found if entry.token not in self._service.stop_ids]
            logprobs = completion_logprobs(self._service.tokenizer, kept, self._lengths[index])
        self._lengths[index] += len(text)
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, whatever the number of its choices."""
        return usage_json_by_prompt(self._usages, self._call.options.n)


def usage_json_by_prompt(usages: dict[int, Usage], choices: int) -> dict[str, Any]:
    """Tokens of several prompts with so many choices each."""
    total = usage_json(usages.values(), shared_prompt=False)
    prompts = usage_json([usage for index, usage in usages.items() if index % choices == 0], shared_prompt=False)
    for name in ("prompt_tokens", "prompt_tokens_details"):
        total[name] = prompts[name]
    total["total_tokens"] = total["prompt_tokens"] + total["completion_tokens"]
    return total


def _reason(event: Event) -> str | None:
    return "stop" if event.finish_reason == "cancelled" else event.finish_reason

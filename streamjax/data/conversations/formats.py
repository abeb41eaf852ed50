"""What a record says, by its format: a conversation, a pair of answers, or a prompt; as tokens to learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from streamjax.checkpoints.json_files import parse_json
from streamjax.data.conversations.assistant_tokens import LearntTokens, encode_conversation
from streamjax.data.text.chat_templates import encode_chat
from streamjax.data.text.tokenizers import Tokenizer

Format = Literal["conversations", "preferences", "prompts"]
COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs", "documents")
_WANTED = {
    "conversations": '"messages", or "prompt" and "completion"',
    "preferences": '"chosen" and "rejected", and "prompt" where these do not begin with it',
    "prompts": '"prompt"',
}
Turns = Sequence[Mapping[str, Any]]


def read_example(
    values: Mapping[str, Any], kind: Format, tokenizer: Tokenizer, *, everything: bool = False
) -> tuple[LearntTokens, ...]:
    """The texts of a record, in tokens: one of a conversation or a prompt, the chosen and the rejected one of a pair.

    A record of "conversations" has `messages`, or a `prompt` and a `completion`; one of "preferences" has `chosen` and
    `rejected`, and a `prompt` unless both begin with the same messages; one of "prompts" a `prompt`. Each of these is
    text, or a list of messages with roles, which the tokenizer's chat template writes, with the record's `tools`,
    `documents` and `chat_template_kwargs`. A text is continued by a text as it is, and an answer that is text ends with
    the tokenizer's EOS.

    Args:
      values: the record.
      kind: its format.
      tokenizer: whose template and ids.
      everything: whether a conversation's other tokens are to be learnt like the assistant's.

    Raises:
      ValueError: fields that are missing or hold something else, and what `encode_conversation` refuses.
    """
    if kind == "conversations" and "messages" in values:
        messages = _messages(values, "messages")
        return (_conversation(tokenizer, messages, 0, values, everything),)
    prompt = values.get("prompt")
    if kind == "conversations":
        return (_answered(tokenizer, prompt, _field(values, "completion", kind), "completion", values, everything),)
    if kind == "preferences":
        chosen, rejected = (_field(values, name, kind) for name in ("chosen", "rejected"))
        if prompt is None and not isinstance(chosen, str) and not isinstance(rejected, str):
            chosen, rejected = _messages(values, "chosen"), _messages(values, "rejected")
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            pair = [_conversation(tokenizer, turns, shared, values) for turns in (chosen, rejected)]
            return tuple(pair)
        answers = (("chosen", chosen), ("rejected", rejected))
        return tuple(_answered(tokenizer, prompt, answer, name, values) for name, answer in answers)
    prompt = _field(values, "prompt", kind)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos, parse_special=False)
    else:
        ids = _prompted(tokenizer, _messages(values, "prompt"), values)
    return (LearntTokens(ids, [False] * len(ids)),)


def _answered(
    tokenizer: Tokenizer, prompt: Any, answer: Any, name: str, values: Mapping[str, Any], everything: bool = False
) -> LearntTokens:
    """A prompt and an answer to it, both text or both messages."""
    if prompt is None:
        raise ValueError(f'it has "{name}" and no "prompt"')
    if isinstance(prompt, str) != isinstance(answer, str):
        raise ValueError(f'"prompt" and "{name}" are to be both text, or both lists of messages')
    if not isinstance(prompt, str):
        before, after = _messages(values, "prompt"), _messages(values, name)
        return _conversation(tokenizer, [*before, *after], len(before), values, everything)
    ids = tokenizer.encode(prompt, add_bos=tokenizer.adds_bos, parse_special=False)
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    answered = tokenizer.encode(answer, parse_special=False, continues=bool(ids)) + end
    return LearntTokens(ids + answered, [everything] * len(ids) + [True] * len(answered))


def _conversation(
    tokenizer: Tokenizer, messages: Turns, first: int, values: Mapping[str, Any], everything: bool = False
) -> LearntTokens:
    if not everything and not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError('no message there has the role "assistant", so there is nothing to learn')
    return encode_conversation(tokenizer, messages, first=first, everything=everything, **_names(values))


def _prompted(tokenizer: Tokenizer, messages: Turns, values: Mapping[str, Any]) -> list[int]:
    return encode_chat(tokenizer, messages, add_generation_prompt=True, **_names(values))


def _field(values: Mapping[str, Any], name: str, kind: Format) -> Any:
    if values.get(name) is None:
        found = ", ".join(f'"{key}"' for key in values) or "nothing"
        raise ValueError(f"it has {found[:80]}, and a record of {kind} has {_WANTED[kind]}")
    return values[name]


def _messages(values: Mapping[str, Any], name: str) -> Turns:
    """The messages of a field, each with its role and some content."""
    messages = values[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{name}" is to be a list of messages, each with "role" and "content"')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'"{name}", message {index}: it has no "role"')
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f'"{name}", message {index}: it has no "content"')
        if not isinstance(message.get("content"), str | list | None):
            raise ValueError(f'"{name}", message {index}: "content" is to be text')
    return messages


def _names(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a record gives to its template besides messages."""
    names = {}
    for name in ("tools", "documents"):
        value = values.get(name)
        if isinstance(value, str):  # data sets without nested columns have them as JSON
            try:
                value = parse_json(value)
            except ValueError as error:
                raise ValueError(f'"{name}" is to be a list, or one written in JSON') from error
        if value is not None and not isinstance(value, list):
            raise ValueError(f'"{name}" is to be a list, or one written in JSON')
        if value:
            names[name] = value
    more = values.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise ValueError('"chat_template_kwargs" is to be an object')
    return {**more, **names}

"""Where the beginning of a chat ends that others have too: system prompt, tools, and what the template puts around."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from streamjax.data.text.chat_templates import encode_chat
from streamjax.data.text.tokenizers import Tokenizer

LEAST = 16  # tokens; a shorter beginning saves nothing
_PROBES = ("0", "Aa")  # first messages that have no token in common
_MOST = 256  # beginnings that are remembered


class SharedBeginnings:
    """Finds how many ids of a chat's prompt do not depend on what its user says.

    They are those that two chats have in common which differ in the user's first message. The count depends on the
    messages before it, the template's values and the template alone, so equal chats are always cut alike.

    Example:
      >>> talk = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Who?"}]
      >>> SharedBeginnings(tokenizer).length(talk, {}, encode_chat(tokenizer, talk))  # up to the user's first letter
      31
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids_of = functools.lru_cache(_MOST)(self._found)  # for several threads

    def length(self, messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any], prompt: Sequence[int]) -> int:
        """Ids of `prompt` that the beginning has; 0 where it is short, or the prompt does not begin with it."""
        before = list(itertools.takewhile(lambda message: message.get("role") != "user", messages))
        if len(before) == len(messages):
            return 0
        ids = self._ids(before, values)
        return len(ids) if len(ids) >= LEAST and list(prompt[: len(ids)]) == ids else 0

    def _ids(self, before: list[Mapping[str, Any]], values: Mapping[str, Any]) -> list[int]:
        try:
            return self._ids_of(json.dumps([before, dict(values)]))
        except (TypeError, ValueError):  # no plain data, or a template that wants more of a chat than this
            return []

    def _found(self, beginning: str) -> list[int]:
        before, values = json.loads(beginning)
        first, second = (
            encode_chat(self._tokenizer, [*before, {"role": "user", "content": probe}], **values) for probe in _PROBES
        )
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        return [token for token, _ in pairs]

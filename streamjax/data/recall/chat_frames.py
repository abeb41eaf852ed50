"""A recall task as a chat: what a model's template writes around a context that is streamed and never rendered."""

from __future__ import annotations

import dataclasses
from typing import Any

from streamjax.data.recall.phrasings import Question
from streamjax.data.text.chat_templates import render_chat
from streamjax.data.text.tokenizers import Tokenizer

_ASKED, _ANSWER, _AGAIN = "[[first question]]", "[[first answer]]", "[[second question]]"


@dataclasses.dataclass(frozen=True)
class ChatFrame:
    """before: up to the user's first word. answer: from the end of what the user says to where the answer begins.
    between: from the end of an answer to the user's next word.
    """

    before: str
    answer: str
    between: str

    def prompt(self, question: Question, first: bool) -> str:
        """What stands between the context, or the answer before, and this answer."""
        asked = question.asked if first else self.between + question.asked.lstrip()
        return asked + self.answer + question.begun.lstrip()


def chat_frame(tokenizer: Tokenizer) -> ChatFrame | None:
    """The frame of a model's own chat template; None where it has none.

    Raises:
      ValueError: the template fails, or does not write what is said.
    """
    if tokenizer.chat_template is None:
        return None
    asked: dict[str, Any] = {"role": "user", "content": _ASKED}
    turns = [asked, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
    tokens: dict[str, Any] = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    before, mark, answer = render_chat(tokenizer.chat_template, [asked], **tokens).partition(_ASKED)
    _, other, rest = render_chat(tokenizer.chat_template, turns, **tokens).partition(_ANSWER)
    between, again, _ = rest.partition(_AGAIN)
    if not (mark and other and again):
        raise ValueError("the chat template does not write all that is said: ask by --phrasing=passkey, without it")
    return ChatFrame(before, answer, between)

"""An endless conversation over a session: a turn reads what the turn adds (`chat_turns.py`), and nothing again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamjax.data.text.chat_turns import turn_ids
from streamjax.kv.cache import Cache
from streamjax.streaming.session import Session

DEFAULT_STOP = "\nUser:"  # where a model without a template of its own begins to speak for the user
_TAKEN = (
    "template",
    "messages",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "parse_special",
)  # of encode_chat's arguments


class Conversation:
    """Turns of a user and a model, through the model's own chat template.

    Args:
      session: the stream; a fresh one, or one that has read something to talk about.
      system: instructions that come first, if the template takes them.
      stop: strings that end an answer, besides the model's stop tokens (`Session.stop_ids`).
      template_values: more names for the template, plain data, such as {"enable_thinking": False}.
      parse_special: whether special tokens that a user has written out are those tokens, and not text.

    Raises:
      ValueError: `template_values` has a name that is not the caller's to give.
    """

    def __init__(
        self,
        session: Session,
        system: str | None = None,
        stop: Sequence[str] = (),
        template_values: Mapping[str, Any] | None = None,
        parse_special: bool = False,
    ):
        self.session = session
        self.system = system
        self.parse_special = parse_special
        self.template_values = dict(template_values or {})
        taken = next((name for name in self.template_values if name in _TAKEN), None)
        if taken is not None:
            raise ValueError(f"template value {taken!r}: this name is filled in by the conversation itself")
        self.stop = tuple(stop) + ((DEFAULT_STOP,) if session.tokenizer.chat_template is None else ())
        self._previous: str | None = None  # what the user said last

    def reply(self, text: str, *, max_new_tokens: int = 512) -> Iterator[str]:
        """Read what the user says and answer; yields text as `Session.generate` does.

        Raises:
          ValueError: the template refuses the conversation, or a `dense` cache is full.
        """
        ids = self.turn_ids(text)
        if self.session.room is not None:
            max_new_tokens = min(max_new_tokens, max(self.session.room - len(ids), 0))
            if max_new_tokens == 0:
                raise ValueError(
                    f"the cache is full: it has room for {self.session.room} tokens and this turn takes {len(ids)}; "
                    "start over, or use a cache without end"
                )
        pieces = self.session.generate(ids, max_new_tokens=max_new_tokens, stop=self.stop)
        self._previous = text
        return pieces

    def compact(self, cache: Cache | Sequence[Cache], text: str | None = None) -> None:
        """Go on under another cache, which keeps of what was said what the user's turn `text` would look at.

        Args:
          cache: the new cache.
          text: what the user might say next, by default what was said last. It is not read into the stream.

        Raises:
          ValueError: as `sj.compact`; the conversation is as before then.
        """
        text = self._previous if text is None else text
        self.session.compact(cache, None if text is None else self.turn_ids(text))

    def turn_ids(self, text: str) -> list[int]:
        """The ids that a turn adds to the stream, up to where the answer begins."""
        return turn_ids(
            self.session.tokenizer,
            [{"role": "user", "content": text}],
            opening=[] if self.system is None else [{"role": "system", "content": self.system}],
            previous=None if self._previous is None else [{"role": "user", "content": self._previous}],
            stopped_by=self.session.stopped_by,
            begins=self.session.tokens_seen == 0,
            parse_special=self.parse_special,
            template_values=self.template_values,
        )

    def to_json_dict(self) -> dict[str, Any]:
        """What a save of the session must hold for the conversation to go on."""
        return {"system": self.system, "previous": self._previous, "template_values": self.template_values}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with a conversation that `to_json_dict` described; its stream is in the session.

        Raises:
          ValueError: that is no description of one; nothing has changed then.
        """
        self.require_restorable(saved)
        self.system, self._previous = saved.get("system", self.system), saved.get("previous")
        self.template_values = dict(saved.get("template_values", self.template_values))

    @staticmethod
    def require_restorable(saved: Any) -> None:
        """Raise a ValueError unless this is what `to_json_dict` may have given."""
        fields = {"system": (str, type(None)), "previous": (str, type(None)), "template_values": (dict,)}
        if not isinstance(saved, dict):
            raise ValueError(f"the saved conversation is damaged: it is {saved!r}")
        for name, kinds in fields.items():
            if name in saved and not isinstance(saved[name], kinds):
                raise ValueError(f"the saved conversation is damaged: its {name} is {saved[name]!r}")

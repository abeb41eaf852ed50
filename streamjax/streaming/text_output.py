"""Generated tokens as text that may be shown at once: whole characters, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from streamjax.data.text.incremental_decoder import IncrementalDecoder
from streamjax.data.text.tokenizers import Tokenizer

_TAIL = 16  # tokens from which a decoder can be built again


class TextOutput:
    """Turns one stream of generated ids into text, holding back what is not certain yet.

    An unfinished character waits for its last byte. The beginning of a stop string waits until the text goes on
    differently; a stop string itself, whatever tokens it is spread over, never comes out.

    Args:
      tokenizer: whose ids they are.
      tail, held, ready: what `to_json_dict` of an earlier one said, to go on from there.

    Attributes:
      tail: the newest ids of the stream, those that were read included: a token's text may depend on what is before it.
    """

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int] = (), held: str = "", ready: str = ""):
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self.tail = list(tail)  # they make a new decoder what this one is
        self._held = held  # behind it a stop string may begin
        self._ready = ready  # certain, and not taken yet
        self._decoder.push(self.tail)

    def to_json_dict(self) -> dict[str, Any]:
        """What it holds back, as plain data."""
        return {"tail": self.tail, "held": self._held, "ready": self._ready}

    def copy(self) -> TextOutput:
        """One that goes on from the same place."""
        return TextOutput(self._tokenizer, **self.to_json_dict())

    def push(self, ids: Iterable[int], stop: Sequence[str] = ()) -> str | None:
        """Take further ids; returns the stop string that has ended the text, if one has.

        Text behind a stop string is dropped, also that of further ids.
        """
        for token in ids:
            self._held += self._decoder.push([token])
            self.tail = [*self.tail, token][-_TAIL:]
            found = [(at, word) for at, word in ((self._held.find(word), word) for word in stop) if at >= 0]
            if found:
                at, word = min(found)
                self._ready += self._held[:at]
                self._end()
                return word
            certain = len(self._held) - max((_overlap(self._held, word) for word in stop), default=0)
            self._ready += self._held[:certain]
            self._held = self._held[certain:]
        return None

    def take(self) -> str:
        """The text that has become certain; it is handed out once."""
        text, self._ready = self._ready, ""
        return text

    def release(self) -> None:
        """No more ids for now: what waited for a stop string is certain, an unfinished character goes on waiting."""
        self._ready += self._held
        self._held = ""

    def finish(self) -> None:
        """The text is over: all that is held back is certain, and an unfinished character becomes U+FFFD."""
        self._ready += self._held + self._end()

    def restart(self, ids: Sequence[int]) -> None:
        """The stream reads these ids: drop whatever has not been taken. What is generated now goes on from them."""
        self._end()
        self._ready = ""
        self.tail = [*self.tail, *ids[-_TAIL:]][-_TAIL:]
        self._decoder.push(ids[-_TAIL:])

    def _end(self) -> str:
        """Text that comes now is no longer this one; returns the unfinished character that was held back."""
        rest = self._decoder.flush()
        self._held = ""
        if rest:
            self.tail = []  # a decoder made from it would go on with the character
        return rest


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of `text` with which `word` begins, the whole word left out."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if word.startswith(text[-n:])), 0)

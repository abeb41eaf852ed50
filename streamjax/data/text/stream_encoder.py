"""Bytes of an endless text to token ids: a piece at a time, cut where tokenizers cut anyway."""

from __future__ import annotations

import codecs
import re

from streamjax.data.text.tokenizers import Tokenizer

_LONGEST = 1 << 16  # characters that wait for a line to end, at most
_CUT = re.compile(r"\n(?=\S)")


class StreamEncoder:
    """Encodes UTF-8 as it arrives.

    Text is cut between a line's end and a next line that does not begin with white space, where no token of the usual
    tokenizers reaches across. A tokenizer that marks the beginning of a text would take every piece for one; so a piece
    is encoded behind the line end before it, whose ids are then taken off. Text without line ends is cut anywhere after
    65,536 characters.

    Args:
      tokenizer: whose ids.
      name: of the text, for messages.
      errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, name: str = "input", errors: str = "strict"):
        self._tokenizer = tokenizer
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._text = ""
        self._fed = 0
        self._after_line = False
        self._line_end = tokenizer.encode("\n")
        self.text_bytes = 0  # bytes of the text that has been encoded

    def push(self, data: bytes) -> list[int]:
        """The ids of what further bytes have completed.

        Raises:
          ValueError: they are not UTF-8.
        """
        self._text += self._decode(data)
        self._fed += len(data)
        cuts = [match.end() for match in _CUT.finditer(self._text)]
        if cuts:
            return self._encode(cuts[-1])
        return self._encode(len(self._text)) if len(self._text) > _LONGEST else []

    def finish(self) -> list[int]:
        """The ids of what was still held back, at the text's end."""
        self._text += self._decode(b"", final=True)
        return self._encode(len(self._text))

    def _decode(self, data: bytes, final: bool = False) -> str:
        waiting = len(self._decoder.getstate()[0])
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            place = self._fed - waiting + error.start
            raise ValueError(
                f"{self._name} is not UTF-8 (byte {place}): convert it, or read on over it with errors=replace"
            ) from error

    def _encode(self, length: int) -> list[int]:
        text, self._text = self._text[:length], self._text[length:]
        if not text:
            return []
        self.text_bytes += len(text.encode("utf-8", errors="replace"))
        after, self._after_line = self._after_line, text.endswith("\n")
        if after:
            ids = self._tokenizer.encode("\n" + text)
            if ids[: len(self._line_end)] == self._line_end:
                return ids[len(self._line_end) :]
        return self._tokenizer.encode(text)

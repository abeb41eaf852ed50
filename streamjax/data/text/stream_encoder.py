"""Bytes of an endless text to token ids: as they come, and the ids of the text as a whole."""

from __future__ import annotations

import codecs

from streamjax.data.text.boundaries import borders_of
from streamjax.data.text.hugging_face import HFTokenizer
from streamjax.data.text.tokenizers import ByteTokenizer, Tokenizer

_LONGEST = 1 << 16  # characters that wait for a border, at most
_STEP = 32  # characters that must have come before a border is looked for again


class StreamEncoder:
    """Encodes UTF-8 as it arrives; the ids do not depend on how it arrives.

    What is certain is encoded: up to a place that no token reaches over, with enough behind it to know
    (`data/text/boundaries.py`). A text without such a place is cut after every 65,536 characters, wherever that is.

    Args:
      tokenizer: whose ids.
      name: of the text, for messages.
      errors: "strict", or "replace" for U+FFFD in place of what is not UTF-8.
      continues: whether the text goes on from another.
      parse_special: whether special tokens that are written out in the text are those tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str = "input",
        errors: str = "strict",
        continues: bool = False,
        parse_special: bool = False,
    ):
        self._tokenizer = tokenizer
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._continues = continues
        self._parse_special = parse_special
        self._behind: str | None = None  # what was encoded last; None at the beginning
        self._text = ""
        self._looked = 0  # characters of the text when a border was looked for
        self._fed = 0
        self.text_bytes = 0  # bytes of the text that has been encoded

    def push(self, data: bytes) -> list[int]:
        """The ids of what further bytes have made certain.

        Raises:
          ValueError: they are not UTF-8; the text before the first bad one is held back, see `rest`.
        """
        self._text += self._decode(data)
        self._fed += len(data)
        ids: list[int] = []
        while len(self._text) >= self._looked + min(max(_STEP, self._looked), _LONGEST):
            ids += self._settle(self._text[:_LONGEST])
        return ids

    def finish(self) -> list[int]:
        """The ids of what was still held back, at the text's end."""
        self._text += self._decode(b"", final=True)
        return self.rest()

    def rest(self) -> list[int]:
        """The ids of what is held back, as if the text ended there."""
        return self._take(self._encode(self._text), len(self._text), "") if self._text else []

    def _decode(self, data: bytes, final: bool = False) -> str:
        waiting = len(self._decoder.getstate()[0])
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            place = self._fed - waiting + error.start
            self._text += error.object[: error.start].decode("utf-8")
            raise ValueError(
                f"{self._name} is not UTF-8 (byte {place}): convert it, or read on over it with errors=replace"
            ) from error

    def _settle(self, text: str) -> list[int]:
        """Encode what is certain of the text; all of it, where it is as long as one may be and nothing is certain."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._take(self._encode(text), len(text), "")
        if isinstance(self._tokenizer, HFTokenizer):
            settled = borders_of(self._tokenizer).settle(text, self._lead(text), self._parse_special)
            if settled.length:
                return self._take(settled.ids, settled.length, settled.behind)
        if len(text) == _LONGEST:
            return self._take(self._encode(text), len(text), text[-256:])
        self._looked = len(text)
        return []

    def _lead(self, text: str) -> str:
        if self._behind is not None:
            return self._behind
        return self._tokenizer.lead(text) if self._continues and isinstance(self._tokenizer, HFTokenizer) else ""

    def _encode(self, text: str) -> list[int]:
        if isinstance(self._tokenizer, HFTokenizer):
            spans = [] if self._parse_special else [(0, len(text))]
            return self._tokenizer.tokens(text, behind=self._lead(text), text_spans=spans)[0]
        continues = self._continues or self._behind is not None
        return self._tokenizer.encode(text, parse_special=self._parse_special, continues=continues)

    def _take(self, ids: list[int], length: int, behind: str) -> list[int]:
        text, self._text = self._text[:length], self._text[length:]
        self._behind, self._looked = behind, 0
        self.text_bytes += len(text.encode("utf-8"))
        return ids

"""Text from tokens as they come: never half a character, and in the end exactly the text of all tokens together.

A character may span tokens, and a token's text may depend on its neighbours (a leading space that is dropped, a run of
byte tokens that is decoded as one). Three ways, by `Tokenizer.decoding`:

- "bytes": every token is some bytes; Python's incremental UTF-8 decoder holds back an unfinished character.
- "byte_fallback": SentencePiece writes an unknown character as a run of byte tokens, and a run that is no UTF-8 becomes
  one U+FFFD a byte. So a run is held back until it ends.
- "text": nothing is held back.

In the last two, new tokens are decoded behind the few emitted before them, and what that adds is emitted.
"""

import codecs
from collections.abc import Iterable

from streamjax.data.text.tokenizers import Tokenizer

_CONTEXT = 8  # tokens; decoders look at one neighbour, but some tokens have no text


class IncrementalDecoder:
    """Turns one stream of token ids into text; work is linear in the number of tokens.

    Args:
      tokenizer: whose ids they are.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []  # the tokens emitted last
        self._held: list[int] = []  # tokens not yet emitted

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these further ids; "" if there is none yet."""
        if self._tokenizer.decoding == "bytes":
            return self._utf8.decode(b"".join(self._tokenizer.token_bytes(i) or b"" for i in ids))
        size, special = self._tokenizer.vocab_size, self._tokenizer.special_ids
        self._held += [i for i in ids if 0 <= i < size and i not in special]
        if not self._held or self._tokenizer.token_bytes(self._held[-1]) is not None:
            return ""
        return self._emit()

    def flush(self) -> str:
        """The text still held back, at the end of the stream: an unfinished character becomes U+FFFD."""
        if self._tokenizer.decoding == "bytes":
            return self._utf8.decode(b"", final=True)
        return self._emit() if self._held else ""

    def _emit(self) -> str:
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._held)
        self._context, self._held = (self._context + self._held)[-_CONTEXT:], []
        return text[len(before) :]

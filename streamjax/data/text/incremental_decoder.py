"""Text from tokens as they come: never half a character, and in the end exactly the text of all tokens together.

A character may span tokens, and a token's text may depend on its neighbours (a leading space that is dropped, a run of
byte tokens that is decoded as one). Three ways, by `Tokenizer.decoding`:

- "bytes": every token is some bytes; Python's incremental UTF-8 decoder holds back an unfinished character.
- "byte_fallback": SentencePiece writes an unknown character, and a line's end, as byte tokens. Only those that begin a
  character and do not end it are held back.
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
        return self._emit(len(self._held) - self._unfinished())

    def flush(self) -> str:
        """The text still held back, at the end of the stream: an unfinished character becomes U+FFFD."""
        if self._tokenizer.decoding == "bytes":
            return self._utf8.decode(b"", final=True)
        return self._emit(len(self._held))

    def _unfinished(self) -> int:
        """How many of the newest tokens are the bytes of a character that is not whole yet."""
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in self._held[-3:]:
            data = self._tokenizer.token_bytes(token)
            if data is None:
                utf8.reset()
            else:
                utf8.decode(data)
        return len(utf8.getstate()[0])

    def _emit(self, count: int) -> str:
        if not count:
            return ""
        before = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._held[:count])
        self._context, self._held = (self._context + self._held[:count])[-_CONTEXT:], self._held[count:]
        return text[len(before) :]

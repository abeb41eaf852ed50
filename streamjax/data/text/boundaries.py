"""Where an unfinished text can be cut, so that what is encoded of it stays as it is however the text goes on.

Two characters that no token of the vocabulary holds side by side have a border of tokens between them, whatever stands
around them: a merge or a piece over the border would be such a token. So what is before the border and what is behind
it are encoded apart. A word of WordPiece is known or unknown as a whole: there a border is where a word begins.
"""

from __future__ import annotations

import itertools
import weakref
from typing import NamedTuple

from streamjax.data.text.hugging_face import HFTokenizer, Span, byte_level_bytes

_TRIES = 32  # borders that are looked at, from the end
_LONG = 512  # characters without a border between words, from which any border will do


class Settled(NamedTuple):
    """The beginning of a text that no continuation changes: its ids, its length, and what the rest goes on from."""

    ids: list[int]
    length: int
    behind: str


class Borders:
    """The borders of a tokenizer.

    Args:
      tokenizer: of which every token is looked at once.
    """

    def __init__(self, tokenizer: HFTokenizer):
        self._tokenizer = tokenizer
        self._words = tokenizer.model_kind in ("WordPiece", "WordLevel")
        inner = tokenizer._tokenizer
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._ahead = 2 + max((len(token.content) for token in added.values()), default=0)
        vocabulary = inner.get_vocab(with_added_tokens=False)
        self._pairs: set[tuple[str, str]] = set()
        if not self._words:
            for token in vocabulary:
                surface = self._surface(token)
                self._pairs.update(itertools.pairwise(surface))

    def settle(self, text: str, behind: str, parse_special: bool) -> Settled:
        """The longest beginning of a text that is certain, "" if none is.

        Args:
          text: as far as it is known.
          behind: what it goes on from.
          parse_special: as in `Tokenizer.encode`.
        """
        ids, spans = self._tokens(text, behind, parse_special)
        found = [i for i in range(1, len(ids)) if spans[i - 1][1] <= spans[i][0]]
        whole = [i for i in found if self._is_far_enough(text, spans[i - 1][1])]
        between = [i for i in whole if _ends_word(text, spans[i - 1][1])]
        for i in [*between[: -_TRIES - 1 : -1], *(whole[: -_TRIES - 1 : -1] if len(text) > _LONG else [])]:
            at = spans[i - 1][1]
            if self._is_border(ids, i):
                rest_of = (behind + text[:at])[-4 * self._ahead :]
                if self._tokens(text[at:], rest_of, parse_special)[0] == ids[i:]:
                    return Settled(ids[:i], at, rest_of)
        return Settled([], 0, behind)

    def _tokens(self, text: str, behind: str, parse_special: bool) -> tuple[list[int], list[Span]]:
        everywhere = [] if parse_special else [(0, len(text))]
        return self._tokenizer.tokens(text, behind=behind, text_spans=everywhere)

    def _is_far_enough(self, text: str, at: int) -> bool:
        """Whether enough stands behind a place: an added token takes white space before it, and may begin there."""
        return at > 0 and len(text[at : at + 4 * self._ahead].lstrip()) >= self._ahead

    def _is_border(self, ids: list[int], i: int) -> bool:
        """Whether token i begins where no token can reach over."""
        if ids[i - 1] in self._added or ids[i] in self._added:
            return True
        if self._words:
            return not self._token(ids[i]).startswith("##")
        left = "".join(self._token(j) for j in ids[max(i - 4, 0) : i] if j not in self._added)
        right = "".join(self._token(j) for j in ids[i : i + 4] if j not in self._added)
        before, after = self._surface(left)[-1:], self._surface(right)[:1]
        return not any((a, b) in self._pairs for a in _with_edge_byte(before, -1) for b in _with_edge_byte(after, 0))

    def _token(self, token_id: int) -> str:
        return self._tokenizer._tokenizer.id_to_token(token_id) or ""

    def _surface(self, token: str) -> str:
        """The token's text in the alphabet of the model; bytes of a character that is not whole are lone surrogates."""
        if self._tokenizer.decoding != "bytes":
            return token
        return byte_level_bytes(token).decode("utf-8", "surrogateescape")


def borders_of(tokenizer: HFTokenizer) -> Borders:
    """The borders of a tokenizer, found once."""
    if tokenizer not in _known:
        _known[tokenizer] = Borders(tokenizer)
    return _known[tokenizer]


_known: weakref.WeakKeyDictionary[HFTokenizer, Borders] = weakref.WeakKeyDictionary()


def _ends_word(text: str, at: int) -> bool:
    return at < len(text) and text[at].isspace() and text[at - 1].isalnum()


def _with_edge_byte(character: str, side: int) -> tuple[str, ...]:
    """The character, and its last (-1) or first (0) byte alone, as a token that holds a part of it would have it."""
    data = character.encode("utf-8", "surrogateescape")
    part = data[side:] if side else data[:1]
    return (character, part.decode("utf-8", "surrogateescape"))

"""A Hugging Face `tokenizer.json`, run by the `tokenizers` library.

Two things are added to what that library does. A text may go on from another (`continues`): tokenizers that mark the
beginning of a text, as SentencePiece does with a space, then mark nothing. And special tokens that a user has typed
may be text (`parse_special=False`, or `text_spans` of a text that is partly a template's).
"""

import functools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers

from streamjax.checkpoints.gguf_header import is_gguf
from streamjax.data.text.gguf.reading import read_gguf_tokenizer
from streamjax.data.text.rust_panics import without_panic_reports
from streamjax.data.text.tokenizer_files import guarded, read_parts, special_token

DecodingKind = Literal["bytes", "byte_fallback", "text"]
Span = tuple[int, int]  # characters [start, stop) of a text

_LEADS = ("\n", "a", ".", "0")  # texts to go on from: behind one of them no token reaches over its end
_REPLACEMENT = "\ufffd"
_BYTE_WORDS = {f"<0x{byte:02X}>": byte for byte in range(256)}  # SentencePiece's tokens for single bytes


class HFTokenizer:
    """A Hugging Face `tokenizer.json` and the settings beside it, or what a GGUF file has of them in its metadata.

    A special token that the settings name and the vocabulary lacks is as none: with a warning, for `bos_token` and
    `eos_token`.

    Args:
      path: a folder with `tokenizer.json`, or the file itself; or a .gguf file.

    Raises:
      ValueError: a file is damaged.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        parts = read_gguf_tokenizer(path) if is_gguf(path) else read_parts(path)
        self._file, self.name, self._tokenizer = parts.file, parts.name, parts.tokenizer
        settings, content = parts.settings, parts.content
        self.bos_token, self.bos_id = self._special_token(settings, "bos_token")
        self.eos_token, self.eos_id = self._special_token(settings, "eos_token")
        _, self.pad_id = self._special_token(settings, "pad_token")
        first = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = tuple(dict.fromkeys(first + parts.stop_ids))
        self.chat_template = parts.chat_template
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        begin = guarded(self._file, "cannot encode", without_panic_reports()(self._tokenizer.encode), "").ids[:1]
        self.adds_bos = self.bos_id is not None and begin == [self.bos_id]
        self._tokenizer.post_processor = None  # it adds tokens, which `encode` does, and cuts spaces out of spans
        self.decoding: DecodingKind = _decoding_kind(content.get("decoder"))
        self.model_kind: str = content["model"]["type"]
        self._marks_start = _marks_start(content)
        self._marks_first_segment = _marks_first_segment(content)
        unknown = content["model"].get("unk_token")
        unknown = content["model"].get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)
        self._control_ids = self.special_ids - {unknown}
        self._bytes = _fallback_bytes(self._tokenizer) if self.decoding == "byte_fallback" else {}

    def _special_token(self, settings: dict[str, Any], key: str) -> tuple[str, int | None]:
        token = special_token(settings, key, self._file.parent)
        token_id = None if token is None else self._tokenizer.token_to_id(token)
        if token is not None and token_id is None and key != "pad_token":
            warnings.warn(f"{self._file} has no token {token!r}: the {key} is left out", stacklevel=4)
        return ("", None) if token is None or token_id is None else (token, token_id)

    def __getstate__(self) -> dict[str, Any]:
        # a tokenizer forgets on the way that it does not parse; and what was cached can be made again
        return {key: value for key, value in self.__dict__.items() if key not in ("_unparsing", "vocab_size")}

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def text_vocab_size(self) -> int:
        """One more than the largest id that a text without written-out added tokens, BOS and EOS can have."""
        largest = max(self._tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
        return 1 + max(largest, *(-1 if i is None else i for i in (self.bos_id, self.eos_id)))

    def encode(
        self,
        text: str,
        add_bos: bool = False,
        *,
        parse_special: bool = True,
        continues: bool = False,
        text_spans: Sequence[Span] = (),
    ) -> list[int]:
        """Ids of a text, after BOS if asked and the model has one.

        Args:
          text: any; lone surrogates become U+FFFD.
          add_bos: whether BOS comes first.
          parse_special: whether special tokens that are written out in the text are those tokens, or text.
          continues: whether the text goes on from another one, so that nothing marks its beginning.
          text_spans: where special tokens are text even so; [start, stop) in characters.

        Raises:
          ValueError: the file's tokenizer cannot encode it.
        """
        text = well_formed(text)
        spans = text_spans if parse_special else [(0, len(text))]
        lead = self.lead(text) if continues else ""
        ids, _ = self.tokens(text, behind=lead, text_spans=spans)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def lead(self, text: str) -> str:
        """A text that `text` may go on from: no token of the two together has characters of both."""
        if not self._marks_start or not text:
            return ""
        for lead in _LEADS:
            found = self._encode(self._tokenizer, lead + text)
            spans = found.offsets
            second = next((i for i, (_, stop) in enumerate(spans) if stop > len(lead)), 0)
            apart = self.model_kind != "WordPiece" or found.word_ids[second - 1] != found.word_ids[second]
            if second and apart and spans[second][0] >= len(lead):
                return lead
        return ""

    def special_spans(self, text: str) -> list[Span]:
        """Where special tokens are written out in a text: characters [start, stop), without white space around them."""
        found = self._encode(self._tokenizer, well_formed(text))
        places = zip(found.ids, found.offsets, strict=True)
        spans = [span for token, span in places if token in self._control_ids]
        return [
            (stop - len(text[start:stop].lstrip()), start + len(text[start:stop].rstrip())) for start, stop in spans
        ]

    def tokens(self, text: str, *, behind: str = "", text_spans: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Ids and their characters in `text`, which stands behind another text whose ids are left out.

        Arguments as in `encode`; `text_spans` are in `text`.
        """
        whole, skip = behind + text, len(behind)
        found = self._encode(self._tokenizer, whole)
        ids, spans = found.ids, found.offsets
        if text_spans:
            shifted = [(0, skip), *((start + skip, stop + skip) for start, stop in text_spans)]
            typed = {
                i
                for i, (token, (start, stop)) in enumerate(zip(ids, spans, strict=True))
                if token in self._control_ids and any(start < b and a < stop for a, b in shifted)
            }
            if typed:
                ids, spans = self._unparsed(whole, ids, spans, typed)
        if not skip:
            return ids, spans
        kept = [i for i, span in enumerate(spans) if span[1] > skip]
        return [ids[i] for i in kept], [(max(spans[i][0] - skip, 0), spans[i][1] - skip) for i in kept]

    def _unparsed(
        self, text: str, ids: Sequence[int], spans: Sequence[Span], typed: set[int]
    ) -> tuple[list[int], list[Span]]:
        """The tokens with those in `typed` taken for text; between the other special tokens texts are encoded apart."""
        parsed = [i for i, token in enumerate(ids) if token in self._control_ids and i not in typed]
        new: list[tuple[int, Span]] = []
        first, start = 0, 0  # the token and the character behind the last parsed one
        for i in [*parsed, len(ids)]:
            if typed.isdisjoint(range(first, i)):
                new += zip(ids[first:i], spans[first:i], strict=True)
            else:
                stop = spans[i][0] if i < len(ids) else len(text)
                new += self._plain(text[start:stop], start, start > 0 and self._marks_first_segment)
            if i < len(ids):
                new.append((ids[i], spans[i]))
                first, start = i + 1, spans[i][1]
        return [token for token, _ in new], [span for _, span in new]

    def _plain(self, text: str, shift: int, continues: bool) -> Iterator[tuple[int, Span]]:
        """Tokens of a text without parsing anything special; none of them is special."""
        lead = self.lead(text) if continues else ""
        found, skip = self._encode(self._unparsing, lead + text), len(lead)
        for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token in self._control_ids and stop - start > 1:
                # the model itself makes a special token of these characters (Unigram may): keep them apart
                cut = (start + stop) // 2 - skip
                yield from self._plain(text[:cut], shift, continues)
                yield from self._plain(text[cut:], shift + cut, self._marks_start)
                return
        for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if stop > skip:
                yield token, (max(start - skip, 0) + shift, stop - skip + shift)

    def to_json(self) -> str:
        """The tokenizer as `tokenizer.json` has it, added tokens included, for other libraries."""
        return self._tokenizer.to_str()

    @functools.cached_property
    def _unparsing(self) -> tokenizers.Tokenizer:
        """A second tokenizer that takes special tokens for text: switching one to and fro is no thread's business."""
        other = guarded(self._file, "cannot be copied", tokenizers.Tokenizer.from_str, self._tokenizer.to_str())
        other.encode_special_tokens = True
        return other

    def _encode(self, tokenizer: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding:
        return guarded(self._file, "cannot encode this text", tokenizer.encode, text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids and ids outside the vocabulary are left out.

        Bytes that are no UTF-8 become U+FFFD. Byte tokens are characters as soon as they make one, as in SentencePiece;
        `tokenizers` alone would spoil a whole run of them for one that is wrong.
        """
        known = [i for i in ids if 0 <= i < self.vocab_size]
        if self._bytes:
            words = [self._tokenizer.id_to_token(i) for i in known if i not in self.special_ids]
            pieces = _split_bad_bytes([word for word in words if word is not None])
            if pieces is not None:
                return guarded(self._file, "cannot decode", self._tokenizer.decoder.decode, pieces)
        return guarded(self._file, "cannot decode", self._tokenizer.decode, known, skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of one id where ids are bytes or fall back to them.

        Returns None for special ids, ids outside the vocabulary, and, if `decoding` is "byte_fallback", ids of text.
        """
        if self.decoding == "byte_fallback":
            return self._bytes.get(token_id)
        known = self.decoding == "bytes" and 0 <= token_id < self.vocab_size and token_id not in self.special_ids
        token = self._tokenizer.id_to_token(token_id) if known else None
        return None if token is None else byte_level_bytes(token)


def well_formed(text: str) -> str:
    """The text with each lone surrogate as U+FFFD: what Python makes of bytes that are no UTF-8 has no encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; an added token is plain text."""
    table = _byte_level_alphabet()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8")


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which may be nested sequences."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders") or []
    return [part for entry in inner for part in _parts(entry)]


def _marks_start(content: dict[str, Any]) -> bool:
    """Whether a text is encoded otherwise at its beginning than behind another text."""
    if any(part["type"] in ("Prepend", "Strip") for part in _parts(content.get("normalizer"))):
        return True
    steps = _parts(content.get("pre_tokenizer"))
    return any(
        (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        or (part["type"] == "ByteLevel" and part.get("add_prefix_space"))
        for part in steps
    )


def _marks_first_segment(content: dict[str, Any]) -> bool:
    """Whether that is so only where the whole text begins, and not behind a special token too."""
    return any(
        part["type"] == "Metaspace" and part.get("prepend_scheme") == "first"
        for part in _parts(content.get("pre_tokenizer"))
    )


def _decoding_kind(decoder: dict[str, Any] | None) -> DecodingKind:
    kinds = [step["type"] for step in _parts(decoder)]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        return "bytes"
    return "byte_fallback" if "ByteFallback" in kinds else "text"


def _fallback_bytes(tokenizer: tokenizers.Tokenizer) -> dict[int, bytes]:
    """The ids of the tokens "<0x00>" to "<0xFF>" and their bytes."""
    ids = {byte: tokenizer.token_to_id(word) for word, byte in _BYTE_WORDS.items()}
    return {token: bytes((byte,)) for byte, token in ids.items() if token is not None}


def _split_bad_bytes(words: list[str]) -> list[str] | None:
    """The tokens with U+FFFD in place of each byte token that is in no character; None where there is no such token."""
    new, spoiled, run = [], False, bytearray()
    for word in [*words, ""]:
        if word in _BYTE_WORDS:
            run.append(_BYTE_WORDS[word])
            continue
        for character in run.decode("utf-8", "surrogateescape"):
            bad = "\udc80" <= character <= "\udcff"
            spoiled |= bad
            new += [_REPLACEMENT] if bad else [f"<0x{byte:02X}>" for byte in character.encode("utf-8")]
        run.clear()
        new.append(word)
    return new[:-1] if spoiled else None


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters for bytes (GPT-2): printable Latin-1 is itself, the rest is moved past U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + offset): byte for offset, byte in enumerate(moved)}

"""Text to token ids and back: any Hugging Face `tokenizer.json`, and plain UTF-8 bytes where a model has none.

The byte tokenizer's ids are the bytes themselves (as in ByT5, arXiv:2105.13626, without its offset), followed by three
special ids. A Hugging Face tokenizer is run by the `tokenizers` library; which ids begin, end and stop a text, and the
chat template, are read from the files that sit beside `tokenizer.json`.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import tokenizers

DecodingKind = Literal["bytes", "byte_fallback", "text"]

_BYTE_BOS, _BYTE_EOS, _BYTE_PAD = 256, 257, 258
_OTHER_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    Attributes:
      name: what to call it in a log or a model card.
      vocab_size: one more than the largest id.
      bos_id, eos_id, pad_id: the ids that begin, end and pad a text; None where the model has none.
      eos_ids: every id that stops a generation; `eos_id` is among them.
      bos_token, eos_token: the same as text, for chat templates; "" where there is none.
      adds_bos: whether the model expects a plain prompt to begin with `bos_id`.
      chat_template: a jinja template, or None.
      special_ids: ids that `decode` leaves out.
      decoding: how ids become text: "bytes" (each id is some bytes of UTF-8), "byte_fallback" (most ids are text, a
        run of byte ids is decoded together) or "text" (anything else).
    """

    name: str
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_token: str
    eos_token: str
    adds_bos: bool
    chat_template: str | None
    special_ids: frozenset[int]
    decoding: DecodingKind

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes | None: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then BOS 256, EOS 257 and PAD 258."""

    name = "bytes"
    bos_id: int | None = _BYTE_BOS
    eos_id: int | None = _BYTE_EOS
    eos_ids: tuple[int, ...] = (_BYTE_EOS,)
    pad_id: int | None = _BYTE_PAD
    bos_token = "<bos>"
    eos_token = "<eos>"
    adds_bos = True
    special_ids = frozenset((_BYTE_BOS, _BYTE_EOS, _BYTE_PAD))
    decoding: DecodingKind = "bytes"

    def __init__(self, chat_template: str | None = None):
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """259: the bytes and three special ids."""
        return 259

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """The text's UTF-8 bytes, after BOS if asked; lone surrogates become "?"."""
        ids = list(text.encode("utf-8", errors="replace"))
        return [_BYTE_BOS, *ids] if add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; bytes that are no UTF-8 become U+FFFD, ids that are no bytes are left out."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        """The byte of an id; None for a special id and for one outside the vocabulary."""
        return bytes((token_id,)) if 0 <= token_id < 256 else None


class HFTokenizer:
    """A Hugging Face `tokenizer.json` and the settings beside it.

    Args:
      path: a folder with `tokenizer.json`, or the file itself.

    Raises:
      ValueError: a file is damaged or names a token that the vocabulary lacks.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        folder = file.parent
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # `tokenizers` raises bare Exception for whatever it cannot parse
            raise ValueError(f"{file}: not a readable tokenizer.json ({_one_line(error)})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = folder.name
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        self.bos_token, self.bos_id = self._special_token(settings, "bos_token", folder)
        self.eos_token, self.eos_id = self._special_token(settings, "eos_token", folder)
        _, self.pad_id = self._special_token(settings, "pad_token", folder)
        stops = generation.get("eos_token_id")
        stops = [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
        first = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = tuple(dict.fromkeys(first + stops))
        self.chat_template = _read_chat_template(folder, settings)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.adds_bos = self.bos_id is not None and self._tokenizer.encode("").ids[:1] == [self.bos_id]
        self.decoding = _decoding_kind(json.loads(self._tokenizer.to_str()).get("decoder"))

    def _special_token(self, settings: dict[str, Any], key: str, folder: Path) -> tuple[str, int | None]:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return "", None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{folder}: {key} {token!r} is not in the vocabulary of tokenizer.json")
        return token, token_id

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Ids of a text, after BOS if asked and the model has one; special tokens written out in it are recognised."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids and ids outside the vocabulary are left out."""
        return self._tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of one id where ids are bytes or fall back to them.

        Returns None for special ids, ids outside the vocabulary, and, if `decoding` is "byte_fallback", ids of text.
        """
        token = None if token_id < 0 or token_id in self.special_ids else self._tokenizer.id_to_token(token_id)
        if token is None or self.decoding == "text":
            return None
        if self.decoding == "byte_fallback":
            return _fallback_byte(token)
        table = _byte_level_alphabet()
        if all(character in table for character in token):
            return bytes(table[character] for character in token)
        return token.encode("utf-8")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
      path: a folder with `tokenizer.json`, or the file itself. A folder without one, and None, mean bytes.

    Raises:
      ValueError: nothing at `path`, a damaged file, or a vocabulary in a format that is not `tokenizer.json`.
    """
    if path is None:
        return ByteTokenizer()
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no tokenizer at {path}: give a folder with tokenizer.json, or nothing for bytes")
    if path.is_file() or (path / "tokenizer.json").exists():
        return HFTokenizer(path)
    other = next((name for name in _OTHER_VOCABULARIES if (path / name).exists()), None)
    if other is not None:
        raise ValueError(
            f"{path} has {other} but no tokenizer.json; transformers' AutoTokenizer(...).save_pretrained writes one"
        )
    return ByteTokenizer(chat_template=_read_chat_template(path, _read_json(path / "tokenizer_config.json")))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file without its null entries; {} where there is no file."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable JSON ({_one_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a JSON object is expected, not {type(content).__name__}")
    return {key: value for key, value in content.items() if value is not None}


def _read_chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default template of a model: `chat_template.jinja`, or what `tokenizer_config.json` holds."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _decoding_kind(decoder: dict[str, Any] | None) -> DecodingKind:
    if decoder is None:
        return "text"
    steps: Sequence[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "bytes"
    return "byte_fallback" if "ByteFallback" in kinds else "text"


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token such as "<0x0A>"; None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes((int(token[3:5], 16),))
    except ValueError:
        return None


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE's letters for bytes (GPT-2): printable Latin-1 is itself, the rest is moved past U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + offset): byte for offset, byte in enumerate(moved)}

"""Text to token ids and back: any Hugging Face `tokenizer.json`, and plain UTF-8 bytes where a model has none.

The byte tokenizer's ids are the bytes themselves (as in ByT5, arXiv:2105.13626, without its offset), followed by three
special ids. Which ids begin, end and stop a text of a Hugging Face tokenizer, and the chat template, are read from the
files that sit beside `tokenizer.json`.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from streamjax.checkpoints import user_path
from streamjax.data.text.hugging_face import DecodingKind, HFTokenizer, Span, well_formed
from streamjax.data.text.tokenizer_files import read_chat_template, read_json

__all__ = ["ByteTokenizer", "DecodingKind", "HFTokenizer", "Span", "Tokenizer", "load_tokenizer"]

_BYTE_BOS, _BYTE_EOS, _BYTE_PAD = 256, 257, 258
_MOST_OF_BYTES = 1024  # ids of a model of bytes, with room for special ones
_OTHER_VOCABULARIES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer.

    Attributes:
      name: what to call it in a log or a model card.
      vocab_size: one more than the largest id.
      text_vocab_size: one more than the largest id of what a model must know: all but the ids of added tokens that no
        text has unless they are written out in it, such as Gemma 3's placeholder of an image.
      bos_id, eos_id, pad_id: the ids that begin, end and pad a text; None where the model has none.
      eos_ids: every id that stops a generation; `eos_id` is among them.
      bos_token, eos_token: the same as text, for chat templates; "" where there is none.
      adds_bos: whether the model expects a plain prompt to begin with `bos_id`.
      chat_template: a jinja template, or None.
      special_ids: ids that `decode` leaves out.
      decoding: how ids become text: "bytes" (each id is some bytes of UTF-8), "byte_fallback" (most ids are text, a
        byte ids spell the characters that have none) or "text" (anything else).
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

    @property
    def text_vocab_size(self) -> int: ...

    def encode(
        self,
        text: str,
        add_bos: bool = False,
        *,
        parse_special: bool = True,
        continues: bool = False,
        text_spans: Sequence[Span] = (),
    ) -> list[int]:
        """Ids of a text.

        Args:
          text: any.
          add_bos: whether BOS comes first, where the model has one.
          parse_special: whether special tokens that are written out in the text are those tokens, or text.
          continues: whether the text goes on from another one, so that nothing marks its beginning.
          text_spans: where special tokens are text even so; [start, stop) in characters.
        """
        ...

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

    @property
    def text_vocab_size(self) -> int:
        """All of them."""
        return self.vocab_size

    def encode(
        self,
        text: str,
        add_bos: bool = False,
        *,
        parse_special: bool = True,
        continues: bool = False,
        text_spans: Sequence[Span] = (),
    ) -> list[int]:
        """The text's UTF-8 bytes, after BOS if asked; lone surrogates become U+FFFD. All of it is text."""
        ids = list(well_formed(text).encode("utf-8"))
        return [_BYTE_BOS, *ids] if add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the bytes; bytes that are no UTF-8 become U+FFFD, ids that are no bytes are left out."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes | None:
        """The byte of an id; None for a special id and for one outside the vocabulary."""
        return bytes((token_id,)) if 0 <= token_id < 256 else None


def require_tokenizer(tokenizer: Tokenizer, vocab_size: int, message: str) -> None:
    """Raise a ValueError where the tokens would be bytes and the model plainly has other ones.

    Args:
      tokenizer: what there is.
      vocab_size: the model's.
      message: what is missing, and what to do.
    """
    if isinstance(tokenizer, ByteTokenizer) and vocab_size > _MOST_OF_BYTES:
        raise ValueError(f"{message} (the model has {vocab_size:,} ids, which are not those of bytes)")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
      path: a folder with `tokenizer.json`, or the file itself; or a model's .gguf file. A folder without one, and None,
        mean bytes.

    Raises:
      ValueError: nothing at `path`, a damaged file, or a vocabulary in a format that is not `tokenizer.json`.

    Example:
      >>> tokenizer = sj.load_tokenizer()  # of bytes; a model's own is sj.load_tokenizer(FOLDER)
      >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169])
      ([110, 195, 169], 'né')
    """
    if path is None:
        return ByteTokenizer()
    path = user_path(path)
    if not path.exists():
        raise ValueError(f"no tokenizer at {path}: give a folder with tokenizer.json, or nothing for bytes")
    if not path.is_dir() or os.path.lexists(path / "tokenizer.json"):  # a link that leads nowhere is no absent file
        return HFTokenizer(path)
    other = next((name for name in _OTHER_VOCABULARIES if (path / name).exists()), None)
    if other is not None:
        raise ValueError(
            f"{path} has {other} but no tokenizer.json; transformers' AutoTokenizer(...).save_pretrained writes one"
        )
    return ByteTokenizer(chat_template=read_chat_template(path, read_json(path / "tokenizer_config.json")))

"""The tokens that a GGUF file lists, what they are for, and which of them begin and end a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamjax.checkpoints.gguf_header import GGUFHeader
from streamjax.checkpoints.json_files import one_line

_PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens
# What ends a turn or a text. Many files name one such id only, and llama.cpp goes by these texts too.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>", "<turn|>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
_HARMONY = ("<|return|>", "<|call|>")  # where these two are, "<|end|>" ends a message and no turn


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file.

    Attributes:
      header: the file's.
      tokens: texts by id.
      types: what each is for; see `NORMAL` and the others.
    """

    header: GGUFHeader
    tokens: Sequence[str]
    types: np.ndarray

    def special(self, name: str, default: int | None = None) -> int | None:
        """The id that has a role, such as "bos"; None where no token has it, or an id that is none."""
        found = self.header.get(f"{_PREFIX}{name}_token_id", int, default)
        return found if found is not None and 0 <= found < len(self.tokens) else None

    def listed(self) -> dict[str, int]:
        """Ids by text, without the places that only fill up the embedding.

        Raises:
          ValueError: two tokens have the same text.
        """
        ids: dict[str, int] = {}
        for token_id, text in enumerate(self.tokens):
            if not text or (self.types[token_id] == UNUSED and text == f"[PAD{token_id}]"):
                continue
            if text in ids:
                twice = f"{one_line(repr(text))[:60]} has the ids {ids[text]} and {token_id}"
                raise ValueError(f"{self.header.file}: two tokens with one text: {twice}")
            ids[text] = token_id
        return ids


def read_vocabulary(header: GGUFHeader) -> Vocabulary | None:
    """The vocabulary of a file; None where it has none.

    Raises:
      ValueError: the lists of it do not fit each other.
    """
    tokens = header.get(f"{_PREFIX}tokens", list, None)
    if not tokens:
        return None
    types = header.get(f"{_PREFIX}token_type", np.ndarray, np.full(len(tokens), NORMAL))
    if not all(type(token) is str for token in tokens) or len(types) != len(tokens):
        raise ValueError(f"{header.file}: {len(types)} types of tokens, for {len(tokens)} tokens")
    return Vocabulary(header, tokens, types)


def stop_ids(header: GGUFHeader) -> list[int]:
    """The ids that end a generation: those that the file names, and control tokens that are known to."""
    vocabulary = read_vocabulary(header)
    if vocabulary is None:
        return []
    default = 2 if header.values.get(f"{_PREFIX}model") == "llama" else None  # llama.cpp's
    named = [vocabulary.special("eos", default), vocabulary.special("eot"), vocabulary.special("eom")]
    control = np.flatnonzero(np.isin(vocabulary.types, (CONTROL, USER_DEFINED))).tolist()
    by_text = {vocabulary.tokens[token_id]: token_id for token_id in control}
    ends = [text for text in _ENDS if text in by_text]
    if all(text in ends for text in _HARMONY):
        ends = [text for text in ends if text != "<|end|>"]
    found = [*named, *(by_text[text] for text in ends)]
    return list(dict.fromkeys(token_id for token_id in found if token_id is not None))


def listed_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges of a file, pairs of pieces with a space between them.

    Raises:
      ValueError: it has none.
    """
    listed = vocabulary.header.get("tokenizer.ggml.merges", list)
    return [(merge[: (at := merge.find(" ", 1))], merge[at + 1 :]) for merge in listed if " " in merge[1:]]

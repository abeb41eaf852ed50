"""GGUF's "llama" tokenizers, SentencePiece's BPE: two pieces become one that the vocabulary has, best scores first."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamjax.data.text.gguf.vocabulary import BYTE, NORMAL, UNUSED, USER_DEFINED, Vocabulary, listed_merges

_SPACE = "\u2581"
_LONGEST = 512  # characters of a piece that is put together of others; SentencePiece's own have 16


def sentencepiece(vocabulary: Vocabulary, merged: bool = False) -> dict[str, Any]:
    """The parts of a tokenizer.json that are the kind's; `merged`: the file has the merges (Gemma 4's kind).

    Raises:
      ValueError: scores that do not fit the tokens, or no merges.
    """
    header, ids = vocabulary.header, vocabulary.listed()
    scores = np.zeros(len(vocabulary.tokens)) if merged else header.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(vocabulary.tokens) or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"{header.file}: {len(scores)} scores, or some that are no numbers, for {len(vocabulary.tokens)} tokens"
        )
    prefix = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    unknown = vocabulary.special("unknown", 0)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    start = {"type": "Prepend", "prepend": _SPACE}
    return {
        "normalizer": {"type": "Sequence", "normalizers": [start, spaces]} if prefix else spaces,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*back, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else back,
        },
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else vocabulary.tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": bool(np.any(vocabulary.types == BYTE)),
            "ignore_merges": False,
            "vocab": ids,
            "merges": listed_merges(vocabulary) if merged else merges(vocabulary, ids, scores),
        },
    }


def merges(vocabulary: Vocabulary, ids: dict[str, int], scores: np.ndarray) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best scores first; the order in a piece is Hugging Face's."""
    pieces = {text for text, token_id in ids.items() if vocabulary.types[token_id] in (NORMAL, USER_DEFINED, UNUSED)}
    order = np.argsort(-scores, kind="stable").tolist()
    found: list[tuple[str, str]] = []
    for token_id in order:
        text = vocabulary.tokens[token_id]
        if text not in pieces or not 2 <= len(text) <= _LONGEST:
            continue
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [(first, second) for first, second in cuts if first in pieces and second in pieces]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found

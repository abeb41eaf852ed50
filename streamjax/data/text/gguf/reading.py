"""A tokenizer from the metadata of a GGUF file, built as the `tokenizer.json` that the file was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamjax.checkpoints.gguf_header import read_header
from streamjax.checkpoints.json_files import one_line
from streamjax.data.text.gguf.byte_level import byte_level, kind_of
from streamjax.data.text.gguf.sentencepiece import sentencepiece
from streamjax.data.text.gguf.vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, read_vocabulary, stop_ids
from streamjax.data.text.tokenizer_files import TokenizerParts, parse_tokenizer

_BYTE_LEVEL, _SENTENCEPIECE, _MERGED = "gpt2", "llama", "gemma4"
_ROLES = {"bos": 1, "eos": 2, "padding": None}  # and SentencePiece's ids for them where a file says nothing


def read_gguf_tokenizer(file: Path) -> TokenizerParts:
    """The tokenizer of a GGUF file.

    Raises:
      ValueError: the file is damaged, has no tokenizer, or one of a kind that is not known.
    """
    header = read_header(file)
    vocabulary = read_vocabulary(header)
    kind = header.get("tokenizer.ggml.model", str, "none")
    if vocabulary is None or kind not in (_BYTE_LEVEL, _SENTENCEPIECE, _MERGED):
        kinds = f"{_BYTE_LEVEL} (byte-level BPE), {_SENTENCEPIECE} (SentencePiece's BPE) and {_MERGED}"
        raise ValueError(f"{file}: its tokenizer is of the kind {one_line(kind)[:40]!r}; streamjax reads {kinds}")
    pieces = kind != _BYTE_LEVEL
    roles = {role: vocabulary.special(role, default if pieces else None) for role, default in _ROLES.items()}
    adds_bos = header.get("tokenizer.ggml.add_bos_token", bool, pieces or kind_of(vocabulary).adds_bos)
    content: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    content |= sentencepiece(vocabulary, kind == _MERGED) if pieces else byte_level(vocabulary)
    content["added_tokens"] = _added(vocabulary)
    bos = roles["bos"]
    if adds_bos and bos is not None:
        content["post_processor"] = _begin_with(vocabulary.tokens[bos], bos)
    tokenizer, content = parse_tokenizer(file, json.dumps(content, ensure_ascii=False), "its tokenizer cannot be built")
    texts = {"bos_token": bos, "eos_token": roles["eos"], "pad_token": roles["padding"]}
    return TokenizerParts(
        file=file,
        name=file.stem,
        tokenizer=tokenizer,
        content=content,
        settings={name: vocabulary.tokens[token] for name, token in texts.items() if token is not None},
        stop_ids=stop_ids(header),
        chat_template=header.get("tokenizer.chat_template", str, None),
    )


def write_tokenizer_files(file: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file into a folder, as Hugging Face's files.

    Raises:
      ValueError: as `read_gguf_tokenizer`.
    """
    parts = read_gguf_tokenizer(file)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **parts.settings}
    if parts.chat_template is not None:
        settings["chat_template"] = parts.chat_template
    contents = {
        "tokenizer.json": parts.content,
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": parts.stop_ids},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Tokens that are found in a text before it is cut: control tokens, which are special, and those of users."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": token_id, "content": text, **plain, "special": bool(vocabulary.types[token_id] != USER_DEFINED)}
        for text, token_id in vocabulary.listed().items()
        if vocabulary.types[token_id] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _begin_with(text: str, token_id: int) -> dict[str, Any]:
    token, first, second = (
        {"SpecialToken": {"id": text, "type_id": 0}},
        *({"Sequence": {"id": i, "type_id": 0}} for i in "AB"),
    )
    return {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, second],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }

"""All records of a split in tokens, cut to rows of one length; what was cut and left out is counted and said."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from streamjax.data.config import DataConfig
from streamjax.data.conversations.assistant_tokens import LearntTokens
from streamjax.data.conversations.formats import COLUMNS, Format, read_example
from streamjax.data.conversations.records import Record, read_lines, tfds_records
from streamjax.data.sources import open_tfds
from streamjax.data.text.tokenizers import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


class Text(NamedTuple):
    """Ids of one text, and which of them a model is to learn to write."""

    ids: Int32[np.ndarray, " n"]
    learnt: Bool[np.ndarray, " n"]


class PreparedExamples(NamedTuple):
    """The examples of a split.

    texts: of each example, one text, or a chosen and a rejected one. values: its record. about: what was read, cut and
    left out, in a line.
    """

    texts: Sequence[tuple[Text, ...]]
    values: Sequence[Mapping[str, Any]]
    about: str

    def __len__(self) -> int:
        return len(self.texts)

    def sha256(self) -> str:
        """Of all tokens, and of which are learnt."""
        digest = hashlib.sha256()
        for texts in self.texts:
            for text in texts:
                digest.update(np.int64(len(text.ids)).tobytes() + text.ids.tobytes() + text.learnt.tobytes())
        return digest.hexdigest()


def prepare_examples(
    config: DataConfig, split: str, *, room: int = 0, tokenizer: Tokenizer | None = None
) -> PreparedExamples:
    """Read all records of a split by the tokenizer's chat template, and log in a line what became of them.

    A text of a conversation or a pair has at most `seq_len + 1` tokens, of which each but the first is predicted. A
    longer one is treated as `config.truncation` says; one without a token left to learn is left out.

    Args:
      config: its source, `format`, `truncation`, `errors` and `train_on`, tokenizer and row length.
      split: "train", "validation" or "test"; a name or slice of a split of a TFDS dataset.
      room: tokens of a row that are kept for an answer: prompts have at most `seq_len - room` tokens.
      tokenizer: the one that `config` names, where it is loaded already.

    Raises:
      ValueError: nothing to read; the first malformed record, by its file and line, unless `errors` is "skip".
    """
    kind = config.format
    assert kind != "text"
    tokenizer = load_tokenizer(config.tokenizer) if tokenizer is None else tokenizer
    most = config.seq_len - room if kind == "prompts" else config.seq_len + 1
    if most < 1:
        raise ValueError(f"rows of {config.seq_len} tokens have no room for answers of {room} and a prompt")
    texts: list[tuple[Text, ...]] = []
    values: list[Mapping[str, Any]] = []
    counts = dict.fromkeys(("read", "cut", "long", "empty", "skipped"), 0)
    first_error = ""
    for record in _records(config, split):
        counts["read"] += 1
        try:
            if record.error:
                raise ValueError(record.error)
            found = read_example(record.values, kind, tokenizer, everything=config.train_on == "all")
        except ValueError as error:
            line = f"{record.place}: {' '.join(str(error).split())}"
            if config.errors == "raise":
                raise ValueError(f'{line}; set data.errors to "skip" to leave such records out') from error
            counts["skipped"] += 1
            first_error = first_error or line
            continue
        long = any(len(text.ids) > most for text in found)
        if long and config.truncation == "drop":
            counts["long"] += 1
            continue
        kept = tuple(_cut(text, most, config.truncation) for text in found)
        if not all(_has_something(text, kind) for text in kept):
            counts["empty"] += 1
            continue
        counts["cut"] += long
        texts.append(kept)
        values.append(record.values)
    about = _about(counts, len(texts), kind, config, split, most, first_error)
    if not texts:
        raise ValueError(f"data source {config.source!r} has nothing to learn from: {about}")
    _log.info(about)
    return PreparedExamples(texts, values, about)


def _records(config: DataConfig, split: str) -> Iterator[Record]:
    scheme, _, name = config.source.partition(":")
    if scheme != "tfds":
        return read_lines(config.source, split)
    examples = open_tfds(name, split, config.data_dir, choose=_columns)
    return tfds_records(examples, name)


def _columns(features: Sequence[str]) -> Sequence[str]:
    """All features, where there are some that records have."""
    if not set(features) & set(COLUMNS):
        raise ValueError(f"has no feature {' or '.join(COLUMNS[:5])}: it has {', '.join(features)}")
    return features


def _cut(text: LearntTokens, most: int, truncation: str) -> Text:
    kept = slice(-most, None) if truncation == "start" else slice(most)
    return Text(np.asarray(text.ids[kept], np.int32), np.asarray(text.learnt[kept], bool))


def _has_something(text: Text, kind: Format) -> bool:
    """Whether a prompt has a token, or another text one that is learnt and has one before it."""
    return len(text.ids) > 0 if kind == "prompts" else bool(text.learnt[1:].any())


def _about(
    counts: Mapping[str, int], kept: int, kind: str, config: DataConfig, split: str, most: int, first_error: str
) -> str:
    line = f"{config.source}, {split}: {kept:,} {kind} of {counts['read']:,} records"
    end = "first" if config.truncation == "start" else "last"
    parts = [
        (counts["cut"], f"{counts['cut']:,} cut to {most:,} tokens, without their {end}"),
        (counts["long"], f"{counts['long']:,} left out for having more than {most:,} tokens"),
        (counts["empty"], f"{counts['empty']:,} left out with nothing to learn in {most:,} tokens"),
        (counts["skipped"], f"{counts['skipped']:,} skipped as malformed, the first at {first_error}"),
    ]
    return "; ".join([line, *(text for count, text in parts if count)])


def text_row(text: Text, seq_len: int) -> dict[str, np.ndarray]:
    """A text as tokens and targets, each the token after, padded to `seq_len`; the weights are 1 where it is learnt."""
    count = len(text.ids) - 1
    tokens, targets = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.int32)
    weights = np.zeros(seq_len, np.float32)
    tokens[:count], targets[:count], weights[:count] = text.ids[:-1], text.ids[1:], text.learnt[1:]
    return {"tokens": tokens, "targets": targets, "weights": weights}

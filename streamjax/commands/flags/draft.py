"""The flag that says who guesses the tokens that a model then reads several at a time."""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags

import streamjax as sj
from streamjax.checkpoints import user_path
from streamjax.commands.flags.cache import parse_cache
from streamjax.commands.flags.checks import refuse_empty
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.streaming.speculative import Drafter, NGrams, Retrieval, SmallModel, trained_drafter

DRAFT_HELP = (
    "Guess tokens, so that the model reads several in one pass; what it says is the same. ngram: from what was said "
    "before, for nothing; ngram:FILE asks a text too. model:FOLDER: by a smaller model of the same vocabulary. "
    "small_cache, or small_cache:NAME:OPTION=VALUE: by the model itself under a small cache, for long contexts in a "
    "cache that keeps them. retrieved, or retrieved:NAME:OPTION=VALUE: the same, which reads of a long context what "
    "has most to do with its end, and not the end alone. heads:FILE: by what python -m train.draft_heads has trained "
    "for the model. Guessing pauses where it fails. Nobody guesses by default."
)
_KINDS = "use ngram, ngram:FILE, small_cache, small_cache:CACHE, retrieved, retrieved:CACHE, model:FOLDER or heads:FILE"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SMALL, _RETRIEVED = "streaming_llm:sinks=4,window=508", "streaming_llm:sinks=4,window=1020"


ENGINE_DRAFT_HELP = (
    "Guess tokens, so that the model reads several of a row in one pass; answers are the same. ngram: from what was "
    "said before, for nothing; ngram:FILE asks a text too. heads:FILE: by what python -m train.draft_heads has trained "
    "for the model. model:FOLDER: by a smaller model of the same vocabulary, with a stream beside each row; "
    "small_cache[:CACHE] and retrieved[:CACHE]: by the model itself under a small cache, see infer.chat. Guessing "
    "rests where it would make others wait. Nobody guesses by default."
)


def define_draft(values: flags.FlagValues, about: str = DRAFT_HELP) -> None:
    """The flag `--draft`."""
    flags.DEFINE_string("draft", None, about, flag_values=values)
    flags.DEFINE_string("draft_memory", None, "What guesses may take of the device's memory, such as 64MB: "
                        "weights of their own, what they keep of streams, and a pass that reads them. As many tokens "
                        "are guessed as fit. By default nobody asks.", flag_values=values)  # fmt: skip
    refuse_empty(values, "draft", "draft_memory")


def parse_draft(text: str | None, model: sj.Decoder, tokenizer: Tokenizer) -> Drafter | None:
    """The drafter that `--draft` describes; None where there is no text.

    Raises:
      ValueError: an unknown kind, a file or a model that is not there, or a model of another vocabulary.
    """
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    if kind == "ngram":
        return NGrams(text=tokenizer.encode(_text(rest)) if rest else ())
    if kind == "small_cache":
        return SmallModel(model=model, cache=parse_cache(rest or _SMALL, model.config.max_position), drafter=NGrams())
    if kind == "retrieved":  # 512 tokens that were found, 256 newest ones, and room for an answer
        cache = parse_cache(rest or _RETRIEVED, model.config.max_position)
        return SmallModel(model=model, cache=cache, context=256, retrieval=Retrieval(), drafter=NGrams())
    if kind == "heads" and rest:
        try:
            return trained_drafter(model, user_path(rest))
        except ValueError as error:
            raise ValueError(f"--draft={text}: {error}") from None
    if kind == "model" and rest:
        path = user_path(rest)
        if not path.is_dir():
            raise ValueError(f"--draft={text}: no model folder {path}")
        small = sj.load(path, dtype=str(model.dtype))
        theirs, own = small.config.vocab_size, model.config.vocab_size
        if theirs != own:
            raise ValueError(
                f"--draft={text}: its vocabulary has {theirs} ids and the model's {own}; they must be equal"
            )
        return SmallModel(model=small, cache=parse_cache(_SMALL, small.config.max_position), drafter=NGrams())
    raise ValueError(f"--draft={text}: nobody of that kind guesses; {_KINDS}")


def parse_draft_memory(values: flags.FlagValues) -> int | None:
    """The bytes that `--draft_memory` names; None where it is not given.

    Raises:
      ValueError: no number of bytes, or nobody who guesses.
    """
    text = values.draft_memory
    if text is None:
        return None
    if values.draft is None:
        raise ValueError(f"--draft_memory={text}: nobody guesses; add --draft, or leave it away")
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    factor = _UNITS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise ValueError(f"--draft_memory={text}: give a number of bytes, such as 64MB or 1.5GiB")
    return int(float(found[1]) * factor)


def _text(name: str) -> str:
    path: Path = user_path(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"--draft=ngram:{name}: no text could be read: {reason}") from None

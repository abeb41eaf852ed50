"""Flags of commands that answer requests with a serving engine, and what their service is called and stops at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from streamjax.commands.flags.adapters import define_adapters
from streamjax.commands.flags.cache import CACHE_HELP
from streamjax.commands.flags.draft import ENGINE_DRAFT_HELP, define_draft
from streamjax.commands.flags.model import define_model
from streamjax.data.text.tokenizers import Tokenizer
from streamjax.models import Decoder
from streamjax.serving.engine import Engine
from streamjax.serving.http.service import Service
from streamjax.streaming.generate import stop_ids


def define_engine(values: flags.FlagValues) -> None:
    """The model, the cache, and what an engine does with them."""
    define_model(values)
    values.set_default("chunk_size", 64)  # beside a token of every row: more read faster, and answers wait
    flags.DEFINE_string("cache", "streaming_llm", CACHE_HELP, flag_values=values)
    flags.DEFINE_integer(
        "rows", 16, "Streams that are computed at once; more requests wait.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer("pool_tokens", None, "Tokens that all streams together may hold, of caches that keep every "
                         "token (dense): they lie in pages of one pool. By default as many as --rows streams of full "
                         "length.", lower_bound=1, flag_values=values)  # fmt: skip
    flags.DEFINE_boolean("fused", False, "Read prompts in the programs in which streams decode: weights are read once "
                         "for both then. Starting takes longer, and the last bits of what a stream computes depend on "
                         "what is read beside it. Not with --adapter, nor for caches in pages (dense), nor while "
                         "guesses are read.", flag_values=values)  # fmt: skip
    flags.DEFINE_string("name", None, "What requests call the model; the name of its folder by default.",
                        flag_values=values)  # fmt: skip
    flags.DEFINE_integer("max_new_tokens", 512, "Of an answer, where a request does not say.", lower_bound=1,
                         flag_values=values)  # fmt: skip
    define_adapters(values)
    define_draft(values, ENGINE_DRAFT_HELP)


def refuse_mesh(values: flags.FlagValues) -> None:
    """Raise ValueError where --mesh is given."""
    if values.mesh:
        raise ValueError(f"--mesh={values.mesh}: the engine serves on one device; leave --mesh away")


def make_service(
    values: flags.FlagValues, engine: Engine, model: Decoder, tokenizer: Tokenizer, adapters: Mapping[str, Any],
    **options: Any,
) -> Service:  # fmt: skip
    """The service of an engine, by the flags; options are `Service`'s."""
    vocabulary = model.config.vocab_size
    return Service(
        engine,
        values.name or Path(os.path.abspath(values.model)).name,
        tokenizer,
        vocabulary,
        stop_ids((*tokenizer.eos_ids, *model.config.eos_token_ids), vocabulary),
        adapters=tuple(adapters),
        default_tokens=values.max_new_tokens,
        **options,
    )

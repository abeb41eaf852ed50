"""Text in: corpora, tokenizers, chat templates and input pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamjax.lazy_names import lazy_names

if TYPE_CHECKING:
    from streamjax.data.config import DataConfig
    from streamjax.data.pipeline import make_eval_batches, make_train_iterator
    from streamjax.data.sources import DocumentSource, open_source
    from streamjax.data.stdlib_corpus import (
        StdlibCorpus,
        builtin_corpus,
        corpus_documents,
        corpus_text,
        default_data_dir,
    )
    from streamjax.data.text.chat_templates import encode_chat, render_chat
    from streamjax.data.text.incremental_decoder import IncrementalDecoder
    from streamjax.data.text.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

# TFDS, Grain and Jinja take a second to import; whoever only reads a tokenizer waits for none of them.
_HOMES = {
    "streamjax.data.stdlib_corpus": (
        "StdlibCorpus", "builtin_corpus", "corpus_documents", "corpus_text", "default_data_dir",
    ),
    "streamjax.data.config": ("DataConfig",),
    "streamjax.data.pipeline": ("make_eval_batches", "make_train_iterator"),
    "streamjax.data.sources": ("DocumentSource", "open_source"),
    "streamjax.data.text.chat_templates": ("encode_chat", "render_chat"),
    "streamjax.data.text.incremental_decoder": ("IncrementalDecoder",),
    "streamjax.data.text.tokenizers": ("ByteTokenizer", "HFTokenizer", "Tokenizer", "load_tokenizer"),
}  # fmt: skip
__getattr__, __dir__ = lazy_names(__name__, _HOMES)

__all__ = [
    "ByteTokenizer",
    "DataConfig",
    "DocumentSource",
    "HFTokenizer",
    "IncrementalDecoder",
    "StdlibCorpus",
    "Tokenizer",
    "builtin_corpus",
    "corpus_documents",
    "corpus_text",
    "default_data_dir",
    "encode_chat",
    "load_tokenizer",
    "make_eval_batches",
    "make_train_iterator",
    "open_source",
    "render_chat",
]

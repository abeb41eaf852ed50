"""Text in: corpora, tokenizers, chat templates and input pipelines."""

from streamjax.data.builtin_corpus import StdlibCorpus, builtin_corpus, corpus_documents, corpus_text, default_data_dir
from streamjax.data.config import DataConfig
from streamjax.data.pipeline import make_eval_batches, make_train_iterator
from streamjax.data.sources import DocumentSource, open_source
from streamjax.data.text.chat_templates import encode_chat, render_chat
from streamjax.data.text.incremental_decoder import IncrementalDecoder
from streamjax.data.text.tokenizers import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

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

"""A tiny model of bytes, sessions with it, and what they should say."""

import codecs

import jax
import numpy as np

import streamjax as sj
from streamjax.data import ByteTokenizer
from tests.streaming.tiny_models import GQA

BYTES = GQA.replace(vocab_size=259, num_layers=1, bos_token_id=256)
CACHE = sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(14))
PROMPT = "Once upon a time, there was one"  # 32 tokens with BOS: four chunks of one width


class Endless(ByteTokenizer):
    """Bytes, without a token that ends a text."""

    eos_ids = ()


def start(model, cache=CACHE, chunk_size=8, **options) -> sj.Session:
    return sj.Session(model, Endless(), cache, chunk_size=chunk_size, **options)


def continued(model, prompt: str, count: int, sampler: sj.Sampler, seed: int = 0) -> bytes:
    """The same by the library's function, on tokens; ids that are no bytes are left out."""
    ids = np.array([[256, *prompt.encode()]])
    _, tokens = sj.generate(
        model, sj.init_state(model, CACHE), ids, max_new_tokens=count, sampler=sampler, key=jax.random.key(seed)
    )
    return bytes(int(t) for t in tokens[0] if t < 256)


def certain(data: bytes) -> str:
    """The text of bytes without a last character that is not whole."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)

"""Trained drafts of the tiny model of bytes, made without training: they know texts by heart."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype
from streamjax.streaming.speculative import Hydra, ParallelPrompts
from streamjax.streaming.speculative.heads.hydra_file import HydraHeads
from streamjax.streaming.speculative.heads.prompt_file import PromptTokens
from streamjax.streaming.step import advance
from tests.serving.engines import bytes_model

IDS = np.arange(0, 256, dtype=np.int32)  # bytes: what the model says besides is never guessed


@functools.partial(jax.jit, static_argnames="cache")
def _hidden(model, cache, tokens):
    return advance(model, sj.init_state(model, cache), tokens)[1]


def knowing_heads(model: sj.Decoder, cache: sj.kv.Cascade, *texts: list[int], length: int = 2) -> Hydra:
    """Heads that say of these texts what the model says there: the last matrix of each is solved for it."""
    draw, width = np.random.default_rng(0), 512
    table = np.asarray(model.embedding[...], np.float64)
    table = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True) + 1e-6)
    inward, outward = [], []
    longest = max(map(len, texts))
    padded = [[*text, *[0] * (longest - len(text))] for text in texts]
    hidden = [
        np.asarray(_hidden(model, cache, jnp.array([row])))[0, : len(text)].astype(np.float64)
        for text, row in zip(texts, padded, strict=True)
    ]
    for head in range(1, length + 1):
        read, wanted = [], []
        for text, states in zip(texts, hidden, strict=True):
            unit = states / np.sqrt(np.mean(states**2, axis=1, keepdims=True) + 1e-6)
            for t in range(len(text) - head):
                read.append(np.concatenate((unit[t], *(table[text[t + i]] for i in range(1, head + 1)))))
                wanted.append(states[t + head] - states[t])
        one = draw.normal(size=(len(read[0]), width)) / np.sqrt(len(read[0]))
        inner = np.array(read) @ one
        inward.append(one.astype(np.float32))
        solved = np.linalg.lstsq(inner / (1 + np.exp(-inner)), np.array(wanted), rcond=1e-6)[0]
        outward.append(solved.astype(np.float32))
    heads = HydraHeads(tuple(inward), tuple(outward), IDS, fingerprint_in_any_dtype(model), 1)
    return Hydra(model=model, heads=heads, length=length, width=2, size=3)


def prompts_of(*tokens: int, model: sj.Decoder | None = None) -> ParallelPrompts:
    """Prompt tokens that are tokens of the model's own."""
    model = model or bytes_model()
    embedded = np.asarray(model.embed(jnp.array([tokens])))[0]
    prompts = PromptTokens(embedded, IDS, fingerprint_in_any_dtype(model), 1)
    return ParallelPrompts(model=model, heads=prompts, length=len(tokens), width=2, size=3)

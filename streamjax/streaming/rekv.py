"""ReKV (2503.00540): read a stream through a window, keep all of its keys on disk, fetch what a question needs.

Reading costs what a window costs; the keys and values that every layer made go to files. A question, possibly in
another process, chooses pages once: in each layer those whose mean keys are most like the mean of the question's
queries. They are loaded beside each other, in the order of the stream, and held while the answer is generated.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, Int

from streamjax.kv.cascade import Cascade
from streamjax.kv.pages.disk_files import PageFiles, PageLayout, PageWriter
from streamjax.kv.query import State
from streamjax.kv.slots.ring_buffer import read_ring
from streamjax.kv.slots.ring_state import RingState
from streamjax.kv.tiers.full import Full, LinearState
from streamjax.kv.tiers.window import Window
from streamjax.models.block import Block
from streamjax.models.config import LatentAttentionConfig, ModelConfig, UniformConfig
from streamjax.models.decoder import Decoder
from streamjax.models.mixers.attention import Attention, ChunkContext
from streamjax.models.rope import make_rotary
from streamjax.streaming.scan import read
from streamjax.streaming.state import StreamState, init_state


class StreamWriter:
    """One stream that is read through a window while its pages go to disk.

    Args:
      model: reads the stream; all its layers have full attention.
      folder: for the pages; new or empty.
      window: tokens that a token sees; the model reads as with the preset "window".
      page: tokens of a page, at most the window.
      chunk_size: tokens read in one step.

    Raises:
      ValueError: sizes that do not fit, a model with layers that keep no keys of their own, a folder with something in.
    """

    def __init__(
        self, model: Decoder, folder: str | Path, *, window: int = 1024, page: int = 64, chunk_size: int = 512
    ):
        if not 1 <= page <= window:
            raise ValueError(f"page is {page}: use 1 to {window}, the window")
        self._model, self._chunk_size, self._waiting = model, chunk_size, np.zeros(0, np.int32)
        self._piece = window // page * page
        self.state = init_state(model, Cascade(Window(window)))
        layout = page_layout(model, page, str(self.state.layers[0][0].k.dtype))
        self._writer = PageWriter(folder, layout)

    @property
    def tokens(self) -> int:
        """Tokens so far, those that wait for the next page among them."""
        return self._writer.tokens + len(self._waiting)

    def read(self, tokens: Int[np.ndarray, " T"]) -> None:
        """Read more of the stream; what does not fill the window yet waits."""
        self._waiting = np.concatenate((self._waiting, np.asarray(tokens, np.int32)))
        while len(self._waiting) >= self._piece:
            self._take(self._piece)

    def close(self) -> None:
        """Read and write what waits, and end the files."""
        if len(self._waiting):
            self._take(len(self._waiting))
        self._writer.close()

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, count: int) -> None:
        piece, self._waiting = self._waiting[:count], self._waiting[count:]
        self.state = read(self._model, self.state, piece[None], self._chunk_size)
        size = self._writer.layout.size
        slots = -(-count // size) * size
        keys, values = _newest(self._model.config, self.state, jnp.int32(count), slots)
        self._writer.append([np.asarray(k) for k in keys], [np.asarray(v) for v in values], count)


def page_layout(model: Decoder, page: int, dtype: str) -> PageLayout:
    """The layout of a model's pages.

    Raises:
      ValueError: a model with sliding windows, a chunk memory or recurrent layers, or whose layers differ in their
        heads.
    """
    config = model.config
    if config.hsa is not None or any(block.mixer.reach is not None for block in config.blocks):
        raise ValueError(
            "pages on disk are for models with full attention in every layer: this one has windows or chunks"
        )
    if any(block.mixer.keys_of is not None for block in config.blocks):
        raise ValueError("pages on disk are for models whose layers have keys of their own: this one's share them")
    if any(block.recurrent for block in config.blocks):
        raise ValueError("pages on disk are for models with attention in every layer: this one has recurrent layers")
    if any(isinstance(block.mixer, LatentAttentionConfig) for block in config.blocks):
        raise ValueError("pages on disk are for models with keys and values in each head: this one has latents")
    shapes = {(block.attention.num_kv_heads, block.attention.head_dim) for block in config.blocks}
    if len(shapes) > 1:
        raise ValueError("pages on disk are for models whose layers have equal heads: this one's differ")
    return PageLayout(config.num_layers, *shapes.pop(), page, dtype, fingerprint(model))


# Fields that came after the first pages were written, and what they mean where they are absent.
_LATER = {"qk_norm_over": "head", "pre_norms": True, "residual_scale": 1.0, "logit_scale": 1.0}


def fingerprint(model: Decoder) -> str:
    """A short text that differs between models: of the configuration and of the embedding's first rows."""
    try:
        values = dataclasses.asdict(UniformConfig.from_model_config(model.config))
        values = {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}
    except ValueError:
        values = model.config.to_json_dict()
    config = json.dumps(values, sort_keys=True).encode()
    rows = np.asarray(model.embedding[:64].astype(jnp.float32)).tobytes()
    return f"{zlib.crc32(config):08x}{zlib.crc32(rows):08x}"


@partial(jax.jit, static_argnums=(0, 3))
def _newest(
    config: ModelConfig, state: StreamState, count: Int[Array, ""], slots: int
) -> tuple[list[Float[Array, "K N D"]], list[Float[Array, "K N D"]]]:
    """Keys, turned back to position 0, and values of the newest `count` tokens of every layer, and zeros behind."""
    keys, values = [], []
    for i, (ring,) in enumerate(state.layers):
        assert isinstance(ring, RingState)
        oldest = (ring.cursor - count) % ring.k.shape[2]
        k, v, position = (read_ring(x, oldest, slots, axis=2) for x in (ring.k, ring.v, ring.position))
        mixer = config.blocks[i].attention
        if mixer.rope is not None:
            k = make_rotary(mixer.rope, mixer.head_dim, state.span).moved(k, -position)
        there = (jnp.arange(slots) < count)[:, None]
        keys.append(jnp.where(there, k[0], 0))
        values.append(jnp.where(there, v[0], 0))
    return keys, values


def ask(
    model: Decoder, pages: PageFiles, question: Int[np.ndarray, " T"], *, top_k: int, room: int = 512
) -> StreamState:
    """The state of a stream that has read some pages of another one, and the question; `sj.generate` goes on from it.

    Args:
      model: the model that read the stream.
      pages: what it left.
      question: token ids, at least one.
      top_k: pages that each layer reads; at most as many as there are. They take positions 0, 1, ... in their order,
        the question follows them.
      room: for tokens of the answer.

    Raises:
      ValueError: another model's pages, no question, a damaged page among those that are needed.
    """
    if pages.layout.model != fingerprint(model):
        raise ValueError(f"{pages.folder}: these pages were written by another model")
    tokens = np.asarray(question, np.int32)[None]
    if not tokens.size:
        raise ValueError("the question has no tokens")
    top_k = min(top_k, pages.pages)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, of {pages.pages} pages: at least 1 is needed")
    count = top_k * pages.layout.size
    cache = Cascade(Full(count + tokens.shape[1] + room))
    empty = init_state(model, cache)
    x, layers = model.embed(jnp.asarray(tokens)), []
    for i in range(model.config.num_layers):
        block = model.layer(i)
        chosen = choose_pages(pages, i, np.asarray(_mean_query(block, x)), top_k)
        k, v = pages.read(i, chosen)
        filled = sum(pages.tokens_in(page) for page in chosen.tolist())
        x, state = _read_layer(block, x, empty.layers[i], k, v, jnp.int32(filled), cache)
        layers.append(state)
    position = count + tokens.shape[1]
    return dataclasses.replace(
        empty,
        layers=tuple(layers),
        position=jnp.full((1,), position, jnp.uint32),
        seen=jnp.full((1,), position, jnp.int32),
        hidden=model.norm(x)[:, -1],
    )


def choose_pages(pages: PageFiles, layer: int, query: Float[np.ndarray, "K D"], top_k: int) -> Int[np.ndarray, " N"]:
    """The pages whose mean keys have the largest cosine with a query, in the order of the stream.

    Damaged pages are not chosen.

    Raises:
      ValueError: fewer than `top_k` pages can be read.
    """
    means, good = pages.means(layer)
    if good.sum() < top_k:
        raise ValueError(f"{pages.folder}: {top_k} pages are asked for, and {good.sum()} can be read in layer {layer}")
    flat, wanted = means.reshape(len(means), -1), query.reshape(-1)
    norms = np.linalg.norm(flat, axis=1) * np.linalg.norm(wanted)
    scores = np.where(good, flat @ wanted / np.maximum(norms, 1e-30), -np.inf)
    return np.sort(np.argsort(-scores, kind="stable")[:top_k])


@jax.jit
def _mean_query(block: Block, x: Float[Array, "1 T E"]) -> Float[Array, "K D"]:
    """The mean of a question's queries, before rotation, over its tokens and the heads that share a key head."""
    assert isinstance(block.mixer, Attention)
    q = block.mixer.projections.split(block.mixer_input(x))[0]
    return reduce(q.astype(jnp.float32), "1 t (k g) d -> k d", "mean", k=block.mixer.config.num_kv_heads)


@partial(jax.jit, static_argnames="cache")
def _read_layer(
    block: Block, x: Float[Array, "1 T E"], state: State, k: Any, v: Any, filled: Int[Array, ""], cache: Cascade
) -> tuple[Float[Array, "1 T E"], State]:
    """A layer over the question behind loaded pages, and the state it leaves."""
    (empty,) = state
    count, width = k.shape[0] * k.shape[2], x.shape[1]
    keys, values = (rearrange(jnp.asarray(y), "n k s d -> 1 k (n s) d") for y in (k, v))
    place = jnp.arange(count + width, dtype=jnp.uint32)[None]
    mixer = block.attention.config
    if mixer.rope is not None:
        keys = make_rotary(mixer.rope, mixer.head_dim, cache.span).moved(keys, place[:, None, :count])
    loaded = LinearState(
        empty.k.at[:, :, :count].set(keys.astype(empty.k.dtype)),
        empty.v.at[:, :, :count].set(values.astype(empty.v.dtype)),
        empty.position.at[:, :, :count].set(place[:, None, :count]),
        jnp.full((1,), filled, jnp.int32),
    )
    context = ChunkContext(
        position=place[:, count:],
        valid=jnp.ones((1, width), bool),
        seen=jnp.full((1,), filled, jnp.int32),
        span=cache.span,
    )
    x, state, _ = block.stream(x, (loaded,), cache, context)
    return x, state

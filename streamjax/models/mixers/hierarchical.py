"""Hierarchical sparse attention as modules: what encodes pages of a stream, and what reads them.

`PageEncoder` turns the hidden states of one layer into a chunk memory; `HierarchicalAttention` is a residual branch
of the layers that read it (2504.16795, 2511.23319). Neither rotates by a position in the stream, which is why the
memory can be longer than any sequence of the training: the encoder's RoPE counts from the start of each page.

A page is seen by tokens behind its end; so each form needs for every token how many pages are complete before it.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from streamjax.attention.context.landmarks import cut_pages, pages_over_devices, read_over_devices
from streamjax.attention.dense import attend
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.attention.landmarks.page_choice import VisiblePages
from streamjax.attention.sharded import context_shards
from streamjax.kv.tiers.landmark_memory import ChunkMemory, ChunkMemoryState
from streamjax.models.config import AttentionConfig, BlockConfig, HSAConfig, NormConfig
from streamjax.models.mixers.projections import Projections
from streamjax.models.mlps.build import build_mlp
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product
from streamjax.models.quantisation import merge_axes
from streamjax.models.rope import make_rotary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadablePages:
    """What some tokens may read: pages, and which of them each token sees.

    top_k: pages that each reads. start: index of the first token in the sequence whose pages these are, in order,
    where it is known to the compiler. over_devices: tokens and pages lie over the mesh axis `context`.
    """

    chunks: LandmarkPages
    visible: VisiblePages
    top_k: int = dataclasses.field(metadata={"static": True})
    start: int | None = dataclasses.field(default=None, metadata={"static": True})
    over_devices: bool = dataclasses.field(default=False, metadata={"static": True})


class EncoderLayer(nnx.Module):
    """A Transformer layer in which the tokens of a page all see each other."""

    def __init__(self, config: BlockConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        key_mixer, key_mlp = jax.random.split(key)
        assert isinstance(config.mixer, AttentionConfig)
        assert config.mlp is not None
        self.config = config.mixer
        self.mixer_norm = Norm(d_model, config.norm, dtype)
        self.projections = Projections(config.mixer, d_model, key_mixer, dtype, gain)
        self.mlp_norm = Norm(d_model, config.norm, dtype)
        self.mlp = build_mlp(config.mlp, d_model, key_mlp, dtype, gain)

    def __call__(self, x: Float[Array, "N T E"], size: int) -> Float[Array, "N T E"]:
        """Of rows of T tokens, in which pages of `size` tokens follow each other."""
        q, k, v, gate = self.projections.split_gated(self.mixer_norm(x))
        if self.config.rope is not None:
            rotary = make_rotary(self.config.rope, self.config.head_dim, size)
            position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.uint32) % size, x.shape[:2])
            q, k = rotary(q, position), rotary(k, position)
        x = x + self.projections.join(self._attend(q, k, v, size=size), x.dtype, gate)
        return x + self.mlp(self.mlp_norm(x))

    def _attend(self, *heads: Float[Array, "N T _ D"], size: int) -> Float[Array, "N T H D"]:
        """Attention of queries to keys and values, page by page."""
        everything = jnp.ones((1, 1, 1, size), bool)

        def of_page(q: Array, k: Array, v: Array) -> Array:
            k, v = (jnp.swapaxes(y, 1, 2) for y in (k, v))
            return attend(q, k, v, everything, scale=self.config.softmax_scale, softcap=self.config.softcap).out

        if heads[0].shape[1] == size:
            return of_page(*heads)
        pages = (rearrange(y, "n (p s) h d -> n p s h d", s=size) for y in heads)
        return rearrange(jax.vmap(of_page, 1, 1)(*pages), "n p s h d -> n (p s) h d")


class PageEncoder(nnx.Module):
    """Keys, values and a landmark of every page of a layer's input, from a bidirectional encoder.

    The landmark is read from a learned token behind the page's own (2504.16795, section 3.2).
    """

    def __init__(
        self, config: BlockConfig, hsa: HSAConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0
    ):
        self.hsa = hsa
        key_token, key_out, *keys = jax.random.split(key, 2 + hsa.encoder_layers)
        d, heads, width = d_model, config.attention.num_kv_heads, config.attention.head_dim
        self.token = kernel(key_token, (d,), ("activation_embed",), 1, dtype, inputs=())
        self.layers = nnx.List([EncoderLayer(config, d, k, dtype, gain) for k in keys])
        self.norm = Norm(d, config.norm, dtype)
        axes = ("embed", "kv_heads", "group", "head_dim")
        self.out = kernel(key_out, (d, heads, 3, width), axes, d, dtype)  # keys, values, landmarks
        self.k_norm = Norm(width, _head_norm(config.norm), dtype, "head_dim")

    def encode(self, x: Float[Array, "B P S E"]) -> LandmarkPages:
        """The memory of P pages of a layer's input."""
        b, p, s, d = x.shape
        token = jnp.broadcast_to(self.token[...].astype(x.dtype), (b, p, 1, d))
        y = jnp.concatenate((x, token), axis=2)
        # Pages are rows; where devices share a sequence they follow each other, since a mesh splits rows otherwise.
        shared = context_shards(p) > 1
        y = rearrange(y, "b p s e -> b (p s) e" if shared else "b p s e -> (b p) s e")
        for layer in self.layers:
            y = layer(y, s + 1)
        y = self.norm(y).reshape(b, p, s + 1, d)
        pairs = product("bpse,ekgd->bpskgd", y[:, :, :s], self.out[:, :, :2])
        k, v = rearrange(pairs, "b p s k g d -> g b k p s d")
        landmarks = product("bpe,ekd->bpkd", y[:, :, s], self.out[:, :, 2])
        return LandmarkPages(self.k_norm(k), v, jnp.swapaxes(landmarks, 1, 2))

    def parallel(self, x: Float[Array, "B T E"], segments: Int32[Array, "B T"] | None = None) -> ReadablePages:
        """What tokens of whole sequences may read: all pages of them; what is behind the last full page is in none."""
        size, length = self._size, x.shape[1]
        if context_shards(length) > 1:
            visible = pages_over_devices(segments, x.shape[:2], size)
            return ReadablePages(self.encode(cut_pages(x, size)[0]), visible, self.hsa.top_k, over_devices=True)
        count = length // size
        chunks = self.encode(rearrange(x[:, : count * size], "b (p s) e -> b p s e", s=size))
        of_pages = None if segments is None else page_segments(segments[:, : count * size], size)
        return whole_view(chunks, of_pages, segments, self.hsa, 0, length)

    def stream(
        self, x: Float[Array, "B C E"], state: ChunkMemoryState, memory: ChunkMemory, count: Int32[Array, " B"]
    ) -> tuple[ChunkMemoryState, ReadablePages]:
        """Take a chunk of a stream in, of which each row has `count` tokens; what these tokens may read."""
        limit = state.complete_before(x.shape[1])
        state = memory.insert(state, x, count, self.encode)
        return state, ReadablePages(state.chunks, VisiblePages(state.number[:, 0], limit), memory.top_k)

    @property
    def _size(self) -> int:
        return self.hsa.chunk_size


def _head_norm(norm: NormConfig) -> NormConfig:
    """RMSNorm of heads, with the numbers of the layer's norm."""
    return NormConfig("rms", norm.eps, norm.offset)


def page_segments(segments: Int32[Array, "B T"], size: int) -> Int32[Array, "B P"]:
    """The segment of every page; -1 of those with tokens of several."""
    cut = rearrange(segments, "b (p s) -> b p s", s=size)
    return jnp.where((cut == cut[:, :, :1]).all(axis=-1), cut[:, :, 0], -1)


def whole_view(
    chunks: LandmarkPages,
    of_chunks: Int32[Array, "B P"] | None,
    segments: Int32[Array, "B C"] | None,
    hsa: HSAConfig,
    start: Int[Array, ""] | int,
    width: int,
) -> ReadablePages:
    """What tokens `start`, `start + 1`, ... of a sequence may read, of which `chunks` is the memory."""
    rows, count = chunks.k.shape[0], chunks.k.shape[2]
    number = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (rows, count))
    limit = (jnp.asarray(start, jnp.int32) + jnp.arange(width, dtype=jnp.int32)) // hsa.chunk_size
    visible = VisiblePages(number, jnp.broadcast_to(limit, (rows, width)), segments, of_chunks)
    return ReadablePages(chunks, visible, hsa.top_k, start if isinstance(start, int) else None)


class HierarchicalAttention(nnx.Module):
    """A residual branch that reads a chunk memory: norm, queries, `LandmarkPages.read`, output projection.

    `query` is `[d_model, K, G + 1, D]`: for each group its query heads, then the query of the landmarks.
    """

    def __init__(self, config: BlockConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        mixer = config.attention
        d, heads, group, width = d_model, mixer.num_kv_heads, mixer.group_size, mixer.head_dim
        key_in, key_out = jax.random.split(key)
        self.config = mixer
        self.norm = Norm(d, config.norm, dtype)
        self.query = kernel(key_in, (d, heads, group + 1, width), ("embed", "kv_heads", "group", "head_dim"), d, dtype)
        axes = ("kv_heads", "group", "head_dim", "embed")
        self.out = kernel(key_out, (heads, group, width, d), axes, mixer.num_heads * width, dtype, gain, (0, 1, 2))
        self.q_norm = Norm(width, _head_norm(config.norm), dtype, "head_dim")

    def __call__(
        self, x: Float[Array, "B C E"], memory: ReadablePages | Float[Array, "B C H D"]
    ) -> Float[Array, "B C E"]:
        """What the tokens read, which is zero where there is no page yet; the heads' outputs may be known."""
        if isinstance(memory, ReadablePages):
            if not memory.chunks.k.shape[2]:
                return jnp.zeros_like(x)
            memory = self.read(*self.queries(x), memory)
        heads = rearrange(memory, "b c h d -> b c (h d)").astype(x.dtype)
        return product("bcf,fe->bce", heads, merge_axes(self.out[...], 0, 3))

    def queries(self, x: Float[Array, "B C E"]) -> tuple[Float[Array, "B C H D"], Float[Array, "B C K D"]]:
        """Queries of the attention inside pages, and of the landmarks."""
        found = product("bce,ekgd->bckgd", self.norm(x), self.query[...])
        return self.q_norm(rearrange(found[..., :-1, :], "b c k g d -> b c (k g) d")), found[..., -1, :]

    def read(
        self, q: Float[Array, "B C H D"], retrieval: Float[Array, "B C K D"], memory: ReadablePages
    ) -> Float[Array, "B C H D"]:
        """The heads' outputs, in the dtype of sums."""
        known = q, retrieval, memory.visible, memory.top_k, self.config.softmax_scale
        if memory.over_devices:
            return read_over_devices(memory.chunks, *known)
        return memory.chunks.read(*known, start=memory.start)

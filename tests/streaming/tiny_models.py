"""Tiny models with strong random weights, and a reader that cuts a stream as it is told."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import streamjax as sj
from streamjax.models.mixers.attention import SequenceContext

VOCAB = 40

GQA = sj.UniformConfig(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=24,
    rope=sj.RopeConfig(theta=100.0),
)
# Gemma-like: windows of its own, soft caps, norms everywhere
LOCAL = GQA.replace(
    family="gemma2",
    windows=(5, None),
    local_rope=sj.RopeConfig(theta=20.0),
    attention_softcap=3.0,
    logit_softcap=8.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    tie_embeddings=True,
    embedding_scale=2.0,
    activation="gelu_tanh",
)
# MPT-like and Falcon-like: ALiBi, one key/value head, LayerNorm, parallel residual, plain MLP
ALIBI = GQA.replace(
    family="mpt",
    num_kv_heads=1,
    position="alibi",
    alibi_slopes=(0.7, 0.35, 0.2, 0.05),
    norm="layer",
    norm_bias=True,
    parallel_residual=True,
    shared_norm=True,
    gated_mlp=False,
    mlp_bias=True,
    qkv_bias=True,
    out_bias=True,
    activation="gelu",
)
# Pythia-like: part of a head rotates, every head has its own keys
PARTIAL = GQA.replace(
    family="gpt_neox",
    num_kv_heads=4,
    head_dim=10,
    rope=sj.RopeConfig(theta=100.0, rotary_dim=4),
    norm="layer",
    norm_bias=True,
    parallel_residual=True,
    gated_mlp=False,
    activation="relu",
    qkv_bias=True,
)


def build(config: sj.UniformConfig | sj.ModelConfig, seed: int = 0, scan_layers: bool = False) -> sj.Decoder:
    """A float32 model whose every parameter is random, biases and norms included, and whose attention is peaked."""
    draw = np.random.default_rng(seed)

    def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        spread = 0.2 if leaf.size <= 400 else 2.2 / np.sqrt(config.d_model)
        return jnp.asarray(draw.normal(scale=spread, size=leaf.shape) + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(fill, _shapes(config, scan_layers))


@functools.lru_cache(maxsize=64)
def _shapes(config: sj.UniformConfig | sj.ModelConfig, scan_layers: bool) -> sj.Decoder:
    """A model whose parameters are shapes alone; what `build` fills is a copy."""
    return jax.eval_shape(
        lambda key: sj.Decoder(config, key, dtype=jnp.float32, scan_layers=scan_layers), jax.random.key(0)
    )


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def read_stream(model, state, tokens: np.ndarray, widths) -> tuple[sj.StreamState, np.ndarray]:
    """Read tokens [B, T] in chunks of these widths, again from the first width when they run out; all the logits."""
    pieces, start, turn = [], 0, 0
    while start < tokens.shape[1]:
        width = min(widths[turn % len(widths)], tokens.shape[1] - start)
        state, logits = sj.step(model, state, tokens[:, start : start + width])
        pieces.append(np.asarray(logits))
        start, turn = start + width, turn + 1
    return state, np.concatenate(pieces, axis=1)


def read_padded(model, state, tokens: np.ndarray, counts, width: int) -> tuple[sj.StreamState, np.ndarray]:
    """Read one row's tokens [T] in right-padded chunks of one static width that hold `counts` tokens each."""
    pieces, start = [], 0
    for count in counts:
        chunk = np.full((1, width), VOCAB - 1, np.int32)
        chunk[0, :count] = tokens[start : start + count]
        state, logits = sj.step(model, state, chunk, jnp.array([count], jnp.int32))
        pieces.append(np.asarray(logits)[0, :count])
        start += count
    return state, np.concatenate(pieces)


@jax.jit
def _layer(block, x):
    context = SequenceContext.from_start(*x.shape[:2])
    return block.project(x, context), block.parallel(x, context)[0]


def parts_of_layers(model: sj.Decoder, tokens: np.ndarray) -> list[list[np.ndarray]]:
    """Of each layer, in float64, the queries, keys and values [B, T, H or K, D] of sequences read from their start."""
    x, found = jax.jit(sj.Decoder.embed)(model, jnp.asarray(tokens)), []
    for i in range(model.config.num_layers):
        parts, x = _layer(model.layer(i), x)
        found.append([np.asarray(part, np.float64) for part in parts])
    return found


@functools.cache
def read_prompt(length: int) -> tuple[sj.Decoder, np.ndarray, sj.StreamState, list[list[np.ndarray]]]:
    """A model, two prompts that it has read into a dense cache, and the parts of its layers; the same for all tests."""
    model, tokens = build(GQA), random_tokens(2, length)
    state = sj.read(model, sj.init_state(model, sj.kv.preset("dense", capacity=64), batch_size=2), tokens, 16)
    return model, tokens, state, parts_of_layers(model, tokens)


def with_sink_logits(config: sj.UniformConfig) -> sj.ModelConfig:
    """The model with a learned logit in every head's softmax that stands for no token."""
    model = config.expand()
    blocks = [dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, sink_logits=True)) for b in model.blocks]
    return model.replace(blocks=tuple(blocks))

"""A small model whose every dimension has its own size, meshes of eight devices, and the caches to try on them."""

import jax

import streamjax as sj
from streamjax.models.config import RopeConfig
from streamjax.models.layer_stacking import with_layers

BATCH, SLOTS = 8, 12
MESHES = {
    "data2-fsdp2-tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data2-tensor4": {"data": 2, "tensor": 4},
    "fsdp8": {"fsdp": 8},
    "context2-tensor4": {"context": 2, "tensor": 4},
}
CACHES = {
    "streaming_llm": sj.kv.preset("streaming_llm", sinks=4, window=SLOTS - 4),
    "cascade": sj.kv.Cascade(sj.kv.Sink(4), sj.kv.Window(SLOTS - 4), fuse=False),
    "window": sj.kv.Cascade(sj.kv.Window(SLOTS)),
    "dense": sj.kv.preset("dense", capacity=48),
    "pages": sj.kv.preset("quest", sinks=2, window=3, capacity=24, page=4, top_k=2),
    "content": sj.kv.preset("dhsa", sinks=2, window=3, capacity=24, page=4, top_k=2, context=2, threshold=0.3, least=2),
    "scored": sj.kv.Cascade(sj.kv.Sink(2), sj.kv.Window(3), sj.kv.Scored(8, sj.kv.H2O(), every=4)),
    "clusters": sj.kv.preset(
        "retro_infer",
        sinks=1,
        window=3,
        segment=6,
        capacity=12,
        retrieve=2,
        estimate=2,
        size=3,
        most=4,
        iterations=2,
        block=1,
    ),
}
CONFIG = sj.UniformConfig(
    vocab_size=80,
    d_model=40,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=6,
    mlp_dim=56,
    qkv_bias=True,
    out_bias=True,
    qk_norm=True,
    rope=RopeConfig(rotary_dim=4),
)


def _build(scan_layers: bool) -> sj.Decoder:
    return jax.jit(lambda key: sj.Decoder(CONFIG, key, scan_layers=scan_layers))(jax.random.key(0))


# Built here, outside every mesh: a model built under one would lie on its devices.
_MODELS = {scan_layers: _build(scan_layers) for scan_layers in (False, True)}


def small_model(scan_layers: bool = False) -> sj.Decoder:
    return _MODELS[scan_layers]


def one_layer() -> sj.Decoder:
    """The first layer of the model, and its two ends."""
    model = small_model()
    cut = with_layers(model, [], list(model.layers)[:1])
    cut.config = model.config.replace(blocks=model.config.blocks[:1])
    return cut

"""Published systems as cascades, one file each; importing a file registers its preset."""

from streamjax.kv.presets import (
    dense,
    dhsa,
    duo_attention,
    hip,
    hsa,
    inf_llm,
    lserve,
    quest,
    razor_attention,
    rekv,
    retro_infer,
    sentence_kv,
    streaming_llm,
    window,
)
from streamjax.kv.presets.registry import Preset, parse_preset, preset, presets

__all__ = [
    "Preset",
    "dense",
    "dhsa",
    "duo_attention",
    "hip",
    "hsa",
    "inf_llm",
    "lserve",
    "parse_preset",
    "preset",
    "presets",
    "quest",
    "razor_attention",
    "rekv",
    "retro_infer",
    "sentence_kv",
    "streaming_llm",
    "window",
]

"""Published systems as cascades, one file each; importing a file registers its preset."""

from streamjax.kv.presets import dense, streaming_llm, window
from streamjax.kv.presets.registry import Preset, preset, presets

__all__ = ["Preset", "dense", "preset", "presets", "streaming_llm", "window"]

"""Frequencies of rotary position embeddings and their published scalings, computed in float64.

`default` (2104.09864), `linear` (position interpolation, 2306.15595), `dynamic` (NTK-aware base, as Hugging Face
defines it), `yarn` (2309.00071), `longrope` (2402.13753), `llama3` (the Llama 3.1 release) and `proportional` (the
Gemma 4 release). All but `dynamic` and `longrope` are fixed; those two depend on the longest distance that is in use,
the `span`.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from streamjax.attention.rotary import Rotary
from streamjax.models.config import RopeConfig


@functools.lru_cache(maxsize=256)
def make_rotary(config: RopeConfig, head_dim: int, span: int) -> Rotary:
    """The rotation that `config` describes.

    Args:
      config: base, width and scaling.
      head_dim: channels of a head, of which `config.rotary_dim` rotate.
      span: number of positions in use: the length of the sequence, or for a stream the reach of its cache.

    Raises:
      ValueError: a LongRoPE factor list of the wrong length.
    """
    dim = config.rotary_dim or head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    frequency = config.theta**-exponent
    if config.kind == "default":
        return Rotary.from_frequencies(frequency)
    if config.kind == "proportional":
        pairs = np.arange(head_dim // 2)
        frequency = np.where(pairs < dim // 2, config.theta ** (-2.0 * pairs / head_dim), 0.0)
        return Rotary.from_frequencies(frequency / config.factor)
    if config.kind == "linear":
        return Rotary.from_frequencies(frequency / config.factor)
    original = config.original_max_position
    assert original is not None  # RopeConfig checks it
    if config.kind == "dynamic":
        length = max(span, original)
        growth = config.factor * length / original - (config.factor - 1)
        base = config.theta * growth ** (dim / (dim - 2))
        return Rotary.from_frequencies(base**-exponent)
    if config.kind == "llama3":
        return Rotary.from_frequencies(_llama3(config, frequency, original))
    if config.kind == "yarn":
        return Rotary.from_frequencies(_yarn(config, frequency, dim, original), _yarn_scale(config))
    return _longrope(config, exponent, span, original)


def _llama3(config: RopeConfig, frequency: np.ndarray, original: int) -> np.ndarray:
    """Long wavelengths are divided by `factor`, short ones kept, with a linear blend between."""
    wavelength = 2.0 * math.pi / frequency
    low, high = config.low_freq_factor, config.high_freq_factor
    if low == high:
        return np.where(original / wavelength > low, frequency, frequency / config.factor)
    keep = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / config.factor)


def _yarn(config: RopeConfig, frequency: np.ndarray, dim: int, original: int) -> np.ndarray:
    """NTK-by-parts: interpolate channels that turn fewer than `beta_slow` times in the original context."""

    def channel(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2.0 * math.pi)) / (2.0 * math.log(config.theta))

    low, high = channel(config.beta_fast), channel(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    interpolate = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return frequency * (1.0 - interpolate) + frequency / config.factor * interpolate


def _yarn_scale(config: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.mscale) / mscale(config.mscale_all_dim)
    return mscale(1.0)


def _longrope(config: RopeConfig, exponent: np.ndarray, span: int, original: int) -> Rotary:
    """Per-channel divisors searched for short and for long contexts; the span picks the list."""
    divisors = config.long_factor if span > original else config.short_factor
    if len(divisors) != len(exponent):
        raise ValueError(f"longrope needs {len(exponent)} factors, one a channel pair; the config has {len(divisors)}")
    scale = config.attention_factor
    if scale is None:
        scale = 1.0 if config.factor <= 1.0 else math.sqrt(1.0 + math.log(config.factor) / math.log(original))
    return Rotary.from_frequencies(config.theta**-exponent / np.array(divisors), scale)

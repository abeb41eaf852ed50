"""Where the tensors of recurrent layers lie, in the layouts that several families share.

A checkpoint has the parts of all groups behind each other, a parameter those of a group (`RecurrentMixer.inside`).
"""

from __future__ import annotations

from collections.abc import Sequence

from streamjax.models.config import GatedConvConfig, GatedDeltaConfig, SSDConfig
from streamjax.models.families.family import Source
from streamjax.models.families.tensor_tables import Entries

Part = tuple[int, int]  # a range of a group's channels


def ssd(mixer: SSDConfig, prefix: str) -> Entries:
    """Mamba-2: gates, inputs, B, C and steps in one projection, and a convolution over inputs, B and C."""
    inputs, both, gates, steps = mixer.group_channels
    b, c = (inputs, inputs + both // 2), (inputs + both // 2, inputs + both)
    gate = inputs + both, inputs + both + gates
    inside = [gate, (0, inputs), b, c, (gate[1], gate[1] + steps)]
    return {
        "layers.mixer.inside": _groups(mixer.num_groups, f"{prefix}.in_proj.weight", "(k g) e -> e k g", inside),
        "layers.mixer.inside_bias": _groups(mixer.num_groups, f"{prefix}.in_proj.bias", "(k g) -> k g", inside),
        **_conv(mixer.num_groups, prefix, [(0, inputs), b, c]),
        **_rates(prefix),
        "layers.mixer.skip": (Source(f"{prefix}.D", "h -> h"),),
        "layers.mixer.norm": (Source(f"{prefix}.norm.weight", "(k g) -> k g"),),
        "layers.mixer.out": (Source(f"{prefix}.out_proj.weight", "e (k g d) -> k g d e"),),
        "layers.mixer.out_bias": (Source(f"{prefix}.out_proj.bias", "e -> e"),),
    }


def gated_delta(mixer: GatedDeltaConfig, prefix: str, apart: bool) -> Entries:
    """Gated DeltaNet: queries, keys, values and gates, and what writes and decays, in two projections by groups
    (Qwen3-Next), or in four with the parts of all groups `apart` (Qwen3.5)."""
    keys, values, gates, rest = mixer.group_channels
    query, key, value = (0, keys // 2), (keys // 2, keys), (keys, keys + values)
    gate, last = (value[1], value[1] + gates), value[1] + gates
    write, step = (last, last + rest // 2), (last + rest // 2, last + rest)
    into, groups = "(k g) e -> e k g", mixer.num_groups
    if apart:
        tensors = {"qkv": [query, key, value], "z": [gate], "b": [write], "a": [step]}
        inside = [
            source
            for name, parts in tensors.items()
            for source in _groups(groups, f"{prefix}.in_proj_{name}.weight", into, parts)
        ]
    else:
        tensors = {"qkvz": [(0, last)], "ba": [(last, last + rest)]}
        inside = [Source(f"{prefix}.in_proj_{name}.weight", into, parts[0]) for name, parts in tensors.items()]
    return {
        "layers.mixer.inside": tuple(inside),
        **_conv(groups, prefix, [query, key, value]),
        **_rates(prefix),
        "layers.mixer.norm.weight": (Source(f"{prefix}.norm.weight", "d -> d"),),
        "layers.mixer.out": (Source(f"{prefix}.out_proj.weight", "e (k g d) -> k g d e"),),
    }


def gated_conv(mixer: GatedConvConfig, prefix: str) -> Entries:
    """A short convolution between two gates: both and what they gate in one projection."""
    width = mixer.channels
    inside = [(part * width, (part + 1) * width) for part in range(3)]
    return {
        "layers.mixer.inside": _groups(mixer.num_groups, f"{prefix}.in_proj.weight", "(k g) e -> e k g", inside),
        "layers.mixer.inside_bias": _groups(mixer.num_groups, f"{prefix}.in_proj.bias", "(k g) -> k g", inside),
        **_conv(mixer.num_groups, prefix, [(0, width)], "conv"),
        "layers.mixer.out": (Source(f"{prefix}.out_proj.weight", "e (k g d) -> k g d e"),),
        "layers.mixer.out_bias": (Source(f"{prefix}.out_proj.bias", "e -> e"),),
    }


def _rates(prefix: str) -> Entries:
    """What decays and steps are made of."""
    return {
        "layers.mixer.rate_log": (Source(f"{prefix}.A_log", "h -> h"),),
        "layers.mixer.step_bias": (Source(f"{prefix}.dt_bias", "h -> h"),),
    }


def _conv(groups: int, prefix: str, parts: Sequence[Part], name: str = "conv1d") -> Entries:
    """The short convolution."""
    return {
        "layers.mixer.conv.weight": _groups(groups, f"{prefix}.{name}.weight", "(k g) 1 w -> w k g", parts),
        "layers.mixer.conv.bias": _groups(groups, f"{prefix}.{name}.bias", "(k g) -> k g", parts),
    }


def _groups(groups: int, name: str, pattern: str, parts: Sequence[Part]) -> tuple[Source, ...]:
    """A tensor with, for each of `parts`, the rows of all groups behind each other."""
    found, row = [], 0
    for first, last in parts:
        stop = row + groups * (last - first)
        found.append(Source(name, pattern, (first, last), (row, stop)))
        row = stop
    return tuple(found)

"""Where the tensors of recurrent layers lie, in the layouts that several families share.

A checkpoint has the parts of all groups behind each other, a parameter those of a group (`RecurrentMixer.inside`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from streamjax.models.config import GatedConvConfig, GatedDeltaConfig, KimiDeltaConfig, RGLRUConfig, SSDConfig
from streamjax.models.families.family import Source
from streamjax.models.families.tensor_tables import Entries

Part = tuple[int, int]  # a range of a group's channels


def ssd(mixer: SSDConfig, prefix: str, path: str = "layers.mixer") -> Entries:
    """Mamba-2: gates, inputs, B, C and steps in one projection, and a convolution over inputs, B and C."""
    inputs, both, gates, steps = mixer.group_channels
    b, c = (inputs, inputs + both // 2), (inputs + both // 2, inputs + both)
    gate = inputs + both, inputs + both + gates
    inside = [gate, (0, inputs), b, c, (gate[1], gate[1] + steps)]
    return {
        f"{path}.inside": _groups(mixer.num_groups, f"{prefix}.in_proj.weight", "(k g) e -> e k g", inside),
        f"{path}.inside_bias": _groups(mixer.num_groups, f"{prefix}.in_proj.bias", "(k g) -> k g", inside),
        **_conv(mixer.num_groups, prefix, [(0, inputs), b, c], path=path),
        **_rates(prefix, path),
        f"{path}.skip": (Source(f"{prefix}.D", "h -> h"),),
        f"{path}.norm": (Source(f"{prefix}.norm.weight", "(k g) -> k g"),),
        f"{path}.out": (Source(f"{prefix}.out_proj.weight", "e (k g d) -> k g d e"),),
        f"{path}.out_bias": (Source(f"{prefix}.out_proj.bias", "e -> e"),),
    }


Layout = Literal["grouped", "apart", "single"]
# Tensors of Gated DeltaNet's projections, and which parts each has: query, key, value, gate, write, step.
_PROJECTIONS: Mapping[Layout, Mapping[str, Sequence[int]]] = {
    "apart": {"in_proj_qkv": (0, 1, 2), "in_proj_z": (3,), "in_proj_b": (4,), "in_proj_a": (5,)},
    "single": {f"{letter}_proj": (part,) for part, letter in enumerate("qkvgba")},
}


def gated_delta(mixer: GatedDeltaConfig, prefix: str, layout: Layout) -> Entries:
    """Gated DeltaNet: queries, keys, values and gates, and what writes and decays, in two projections by groups
    (Qwen3-Next), in four with the parts of all groups `apart` (Qwen3.5), or each in a `single` one (OLMo-hybrid)."""
    keys, values, gates, rest = mixer.group_channels
    query, key, value = (0, keys // 2), (keys // 2, keys), (keys, keys + values)
    gate, last = (value[1], value[1] + gates), value[1] + gates
    write, step = (last, last + rest // 2), (last + rest // 2, last + rest)
    into, groups, parts = "(k g) e -> e k g", mixer.num_groups, (query, key, value, gate, write, step)
    if layout == "grouped":
        tensors = {"qkvz": (0, last), "ba": (last, last + rest)}
        inside = tuple(Source(f"{prefix}.in_proj_{name}.weight", into, part) for name, part in tensors.items())
    else:
        named = {name: [parts[i] for i in which] for name, which in _PROJECTIONS[layout].items()}
        inside = _several(groups, prefix, into, named)
    single = layout == "single"
    norm, out = ("o_norm", "o_proj") if single else ("norm", "out_proj")
    conv = _convs(groups, prefix, parts[:3]) if single else _conv(groups, prefix, parts[:3])
    return {
        "layers.mixer.inside": inside,
        **conv,
        **_rates(prefix),
        "layers.mixer.norm.weight": (Source(f"{prefix}.{norm}.weight", "d -> d"),),
        "layers.mixer.out": (Source(f"{prefix}.{out}.weight", "e (k g d) -> k g d e"),),
    }


def kimi_delta(mixer: KimiDeltaConfig, prefix: str) -> Entries:
    """Kimi Delta Attention: a projection for each part, and two of a few channels that steps and gates are made of."""
    keys, values, _ = mixer.group_channels
    parts = [(0, keys // 2), (keys // 2, keys), (keys, keys + values), (keys + values, keys + values + 1)]
    into, groups = "(k g) e -> e k g", mixer.num_groups
    named = {f"{letter}_proj": [part] for letter, part in zip("qkvb", parts, strict=True)}
    low = (Source(f"{prefix}.{name}_a_proj.weight", "(g r) e -> e g r", (i, i + 1)) for i, name in enumerate("fg"))
    return {
        "layers.mixer.inside": _several(groups, prefix, into, named),
        **_convs(groups, prefix, parts[:3]),
        "layers.mixer.down": tuple(low),
        "layers.mixer.step_up": (Source(f"{prefix}.f_b_proj.weight", "(k d) r -> r k d"),),
        "layers.mixer.gate_up": (Source(f"{prefix}.g_b_proj.weight", "(k d) r -> r k d"),),
        "layers.mixer.rate_log": (Source(f"{prefix}.A_log", "1 1 h 1 -> h"),),
        "layers.mixer.step_bias": (Source(f"{prefix}.dt_bias", "(k d) -> k d"),),
        "layers.mixer.norm.weight": (Source(f"{prefix}.o_norm.weight", "d -> d"),),
        "layers.mixer.out": (Source(f"{prefix}.o_proj.weight", "e (k g d) -> k g d e"),),
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


def rg_lru(mixer: RGLRUConfig, prefix: str) -> Entries:
    """Griffin's recurrent block: a projection for what is convolved and one for what gates, and gates by block."""
    width, groups, unit = mixer.channels, mixer.num_groups, f"{prefix}.rg_lru"
    named = {"linear_x": (0, width), "linear_y": (width, 2 * width)}
    weights, biases = (
        tuple(Source(f"{prefix}.{name}.{leaf}", pattern, part) for name, part in named.items())
        for leaf, pattern in (("weight", "(k g) e -> e k g"), ("bias", "(k g) -> k g"))
    )
    gates = {"input_gate": "input_gate", "decay_gate": "recurrent_gate"}
    return {
        "layers.mixer.inside": weights,
        "layers.mixer.inside_bias": biases,
        **_conv(groups, prefix, [(0, width)], "conv_1d"),
        **{
            f"layers.mixer.{ours}": (Source(f"{unit}.{name}_weight", "k c d -> k c d"),) for ours, name in gates.items()
        },
        **{f"layers.mixer.{ours}_bias": (Source(f"{unit}.{name}_bias", "k d -> k d"),) for ours, name in gates.items()},
        "layers.mixer.rate": (Source(f"{unit}.recurrent_param", "(k d) -> k d"),),
        "layers.mixer.out": (Source(f"{prefix}.linear_out.weight", "e (k g d) -> k g d e"),),
        "layers.mixer.out_bias": (Source(f"{prefix}.linear_out.bias", "e -> e"),),
    }


def _rates(prefix: str, path: str = "layers.mixer") -> Entries:
    """What decays and steps are made of."""
    return {
        f"{path}.rate_log": (Source(f"{prefix}.A_log", "h -> h"),),
        f"{path}.step_bias": (Source(f"{prefix}.dt_bias", "h -> h"),),
    }


def _conv(groups: int, prefix: str, parts: Sequence[Part], name: str = "conv1d", path: str = "layers.mixer") -> Entries:
    """The short convolution."""
    return {
        f"{path}.conv.weight": _groups(groups, f"{prefix}.{name}.weight", "(k g) 1 w -> w k g", parts),
        f"{path}.conv.bias": _groups(groups, f"{prefix}.{name}.bias", "(k g) -> k g", parts),
    }


def _convs(groups: int, prefix: str, parts: Sequence[Part]) -> Entries:
    """The short convolution with a tensor each for queries, keys and values."""
    named = {f"{letter}_conv1d": [part] for letter, part in zip("qkv", parts, strict=True)}
    return {"layers.mixer.conv.weight": _several(groups, prefix, "(k g) 1 w -> w k g", named)}


def _several(groups: int, prefix: str, pattern: str, tensors: Mapping[str, Sequence[Part]]) -> tuple[Source, ...]:
    """Tensors, each with the rows of its parts as `_groups` has them."""
    return tuple(
        source
        for name, parts in tensors.items()
        for source in _groups(groups, f"{prefix}.{name}.weight", pattern, parts)
    )


def _groups(groups: int, name: str, pattern: str, parts: Sequence[Part]) -> tuple[Source, ...]:
    """A tensor with, for each of `parts`, the rows of all groups behind each other."""
    found, row = [], 0
    for first, last in parts:
        stop = row + groups * (last - first)
        found.append(Source(name, pattern, (first, last), (row, stop)))
        row = stop
    return tuple(found)

"""RoPE fields of a `config.json`, in both of the forms that checkpoints have.

Older files hold `rope_theta` beside `rope_scaling`; files written by transformers 5 hold one `rope_parameters`. Written
is the older form, which both generations read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamjax.models.config import RopeConfig
from streamjax.models.families.config_fields import Fields

# what a kind reads from its dictionary: name in the file -> name in RopeConfig
_SCALES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
    "proportional": ("factor",),
}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_LARGEST = 1e30  # of a scaling's numbers; NaN and infinity are none of them
_LISTS = ("short_factor", "long_factor")
_ORIGINAL = ("dynamic", "llama3", "yarn", "longrope")  # kinds that know the length of the original model
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_IGNORED = {"finetuned"}  # of early YaRN files: how the checkpoint came about


def read_rope(
    fields: Fields,
    *,
    head_dim: int,
    max_position: int,
    theta: float = 10_000.0,
    theta_field: str = "rope_theta",
    partial: float | None = None,
    partial_field: str = "partial_rotary_factor",
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """The rotation of a model with one RoPE for all layers.

    Args:
      fields: the config.
      head_dim: width of a head.
      max_position: `max_position_embeddings`.
      theta: base where the config names none.
      theta_field: top-level field of the base in the older form.
      partial: default of the rotated fraction of a head; None where the architecture rotates all of it.
      partial_field: top-level field of that fraction in the older form.
      original: default of `original_max_position_embeddings` as a field of its own, which wins; None: the scaling's.
      aliases: kinds that the architecture reads as another one (Phi-3: `su` and `yarn` mean longrope).

    Raises:
      ValueError: an unknown kind, a field that it does not have or one that it lacks.
    """
    scaling = fields.get("rope_scaling", dict, None) or fields.get("rope_parameters", dict, None) or {}
    top_theta = fields.positive(theta_field, theta)
    top_partial = fields.positive(partial_field, 1.0 if partial is None else partial)
    original = fields.get("original_max_position_embeddings", int, original)
    return parse_rope(
        scaling,
        head_dim=head_dim,
        max_position=max_position,
        theta=top_theta,
        partial=top_partial,
        partial_allowed=partial is not None,
        original=original,
        aliases=aliases or {},
    )


def read_layer_ropes(
    fields: Fields, *, head_dim: int, max_position: int, theta: float, local_theta: float
) -> tuple[RopeConfig, RopeConfig]:
    """The rotations of layers with full attention and of those with a window; `rope_scaling` is about the first."""
    nested = fields.get("rope_parameters", dict, None) or {}
    unknown = sorted(set(nested) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"rope_parameters has {unknown[0]!r}; expected full_attention and sliding_attention")
    scaling = {**(nested.get("full_attention") or {}), **(fields.get("rope_scaling", dict, None) or {})}
    local = nested.get("sliding_attention") or {}
    return (
        parse_rope(scaling, head_dim=head_dim, max_position=max_position, theta=theta),
        parse_rope(local, head_dim=head_dim, max_position=max_position, theta=local_theta),
    )


def parse_rope(
    scaling: Mapping[str, Any],
    *,
    head_dim: int,
    max_position: int,
    theta: float,
    partial: float = 1.0,
    partial_allowed: bool = False,
    original: int | None = None,
    aliases: Mapping[str, str] | None = None,
    proportional: bool = False,
) -> RopeConfig:
    """A RopeConfig from one `rope_scaling` or `rope_parameters` dictionary; what it lacks comes from the arguments.

    `proportional`: whether the architecture has that kind, which takes any fraction.
    """
    kind, values = _scale_fields(scaling, aliases or {}, proportional)
    if kind == "proportional":
        partial_allowed = True
    if kind == "dynamic":
        values["original_max_position"] = max_position
    elif kind in _ORIGINAL:
        named = original, _value(scaling, "original_max_position_embeddings"), max_position
        values["original_max_position"] = next(length for length in named if length is not None)
    if kind in ("yarn", "longrope"):
        values.setdefault("factor", max_position / max(1, values["original_max_position"]))
    fraction = _value(scaling, "partial_rotary_factor")
    fraction = partial if fraction is None else float(fraction)
    if not partial_allowed and fraction != 1.0:
        raise ValueError(f"field 'partial_rotary_factor' is {fraction}; this architecture rotates whole heads")
    if not 0 < fraction <= 1:
        raise ValueError(f"field 'partial_rotary_factor' is {fraction}; it must be above 0 and at most 1")
    rotary_dim = int(head_dim * fraction)
    if kind == "proportional":
        rotary_dim -= rotary_dim % 2
    base = _value(scaling, "rope_theta")
    return RopeConfig(
        theta=float(theta if base is None else base),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        kind=kind,  # type: ignore[arg-type]
        **values,
    )


def _scale_fields(
    scaling: Mapping[str, Any], aliases: Mapping[str, str], proportional: bool
) -> tuple[str, dict[str, Any]]:
    """The kind of a scaling and the fields of RopeConfig that it sets."""
    named = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = aliases.get(named, named) if isinstance(named, str) else named
    known = [name for name in _SCALES if proportional or name != "proportional"]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"rope_scaling has rope_type {named!r}; streamjax has {', '.join(known)}")
    unknown = sorted(k for k in set(scaling) - _COMMON - _IGNORED - set(_SCALES[kind]) if scaling[k] is not None)
    if unknown:
        raise ValueError(f"rope_scaling field {unknown[0]!r} is not implemented for rope_type {named!r}")
    missing = [name for name in _REQUIRED.get(kind, ()) if scaling.get(name) is None]
    if missing:
        raise ValueError(f"rope_scaling of rope_type {named!r} lacks {missing[0]!r}")
    values = {name: _value(scaling, name) for name in _SCALES[kind]}
    return kind, {name: value for name, value in values.items() if value is not None}


def _value(scaling: Mapping[str, Any], name: str) -> Any:
    """A field of a scaling, checked; None where it is absent, null, or a zero that transformers takes for absent."""
    value = scaling.get(name)
    if value is None or (name in ("beta_fast", "beta_slow") and value == 0):
        return None
    numbers = value if name in _LISTS and isinstance(value, list) else [value]
    allowed = (bool,) if name == "truncate" else (int,) if name == "original_max_position_embeddings" else (int, float)
    if not all(isinstance(n, allowed) and isinstance(n, bool) == (bool in allowed) for n in numbers):
        raise ValueError(
            f"rope_scaling field {name!r} is {value!r}; expected {' or '.join(t.__name__ for t in allowed)}"
        )
    if not all(abs(n) < _LARGEST for n in numbers):
        raise ValueError(f"rope_scaling field {name!r} is {value!r}; expected finite numbers")
    return tuple(float(n) for n in numbers) if name in _LISTS else value


def write_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """The `rope_scaling` dictionary of a rotation, None where it is not scaled."""
    if rope.kind == "default":
        return None
    default = RopeConfig()
    values: dict[str, Any] = {"rope_type": rope.kind}
    for name in _SCALES[rope.kind]:
        value = getattr(rope, name)
        if value != getattr(default, name) or name in _REQUIRED.get(rope.kind, ()) or name == "factor":
            values[name] = list(value) if isinstance(value, tuple) else value
    if rope.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.original_max_position
    return values


def rotary_fraction(rope: RopeConfig, head_dim: int) -> float:
    """The fraction of a head that rotates, such that `int(head_dim * fraction)` gives the width back."""
    if rope.rotary_dim is None:
        return 1.0
    fraction = rope.rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rope.rotary_dim else (rope.rotary_dim + 0.5) / head_dim


def plain_rope(rope: RopeConfig, head_dim: int) -> RopeConfig:
    """An equal rotation with the fields that its kind does not use at their defaults."""
    values = {name: getattr(rope, name) for name in _SCALES[rope.kind]}
    return RopeConfig(
        theta=rope.theta,
        rotary_dim=None if rope.rotary_dim == head_dim else rope.rotary_dim,
        kind=rope.kind,
        original_max_position=rope.original_max_position if rope.kind in _ORIGINAL else None,
        **values,
    )

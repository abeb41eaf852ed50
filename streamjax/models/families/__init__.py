"""Hugging Face architectures: from a `config.json` to a `ModelConfig` and back, and where the tensors lie.

One file an architecture, each with a reader of the config, a writer, and a table of tensors (see `family.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from streamjax.models.config import BlockConfig, ModelConfig, UniformConfig, expanded
from streamjax.models.families.cohere2 import COHERE2
from streamjax.models.families.config_fields import Fields, read_quantisation
from streamjax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from streamjax.models.families.exaone4 import EXAONE4
from streamjax.models.families.falcon import FALCON
from streamjax.models.families.falcon_h1 import FALCON_H1
from streamjax.models.families.family import Family, Source, Table
from streamjax.models.families.gemma import GEMMA2, GEMMA3
from streamjax.models.families.gemma4 import GEMMA4
from streamjax.models.families.gla import GLA
from streamjax.models.families.glm4 import GLM4
from streamjax.models.families.gpt_neox import GPT_NEOX
from streamjax.models.families.gpt_oss import GPT_OSS
from streamjax.models.families.granite import GRANITE
from streamjax.models.families.granite_hybrid import GRANITE_HYBRID
from streamjax.models.families.kimi_linear import KIMI_LINEAR
from streamjax.models.families.lfm2 import LFM2, LFM2_MOE
from streamjax.models.families.llama import LLAMA
from streamjax.models.families.llama4 import LLAMA4
from streamjax.models.families.mamba2 import MAMBA2
from streamjax.models.families.ministral3 import MINISTRAL3
from streamjax.models.families.mistral import MISTRAL
from streamjax.models.families.mixtral import MIXTRAL
from streamjax.models.families.mpt import MPT
from streamjax.models.families.nemotron_h import NEMOTRON_H
from streamjax.models.families.olmo import OLMO2, OLMO3
from streamjax.models.families.olmo_hybrid import OLMO_HYBRID
from streamjax.models.families.phi3 import PHI3
from streamjax.models.families.qwen import QWEN2, QWEN3
from streamjax.models.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from streamjax.models.families.qwen3_next import QWEN3_NEXT
from streamjax.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from streamjax.models.families.recurrent_gemma import RECURRENT_GEMMA
from streamjax.models.families.rope_fields import plain_rope
from streamjax.models.families.rwkv7 import RWKV7
from streamjax.models.families.smollm3 import SMOLLM3
from streamjax.models.families.starcoder2 import STARCODER2

__all__ = ["FAMILIES", "Family", "Source", "Table", "find_family", "read_config", "write_config"]

_ALL = (
    *(LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, GPT_NEOX, FALCON, MPT),
    *(SMOLLM3, OLMO2, OLMO3, GRANITE, QWEN2_MOE, QWEN3_MOE, GPT_OSS),
    *(COHERE2, GLM4, EXAONE4, STARCODER2, MINISTRAL3, DEEPSEEK_V2, DEEPSEEK_V3),
    *(LLAMA4, GEMMA4, QWEN3_NEXT, QWEN3_5, MAMBA2, GRANITE_HYBRID),
    *(LFM2, LFM2_MOE, QWEN3_5_MOE, OLMO_HYBRID, KIMI_LINEAR, RECURRENT_GEMMA, NEMOTRON_H, FALCON_H1, RWKV7, GLA),
)
FAMILIES: Mapping[str, Family] = {family.name: family for family in _ALL}


def find_family(values: Mapping[str, Any]) -> Family:
    """The family of a config.json: by `architectures`, or by `model_type` where that is absent.

    Raises:
      ValueError: an architecture that the library does not have (the message names the nearest one, and the families
        that it has), or the two disagree.
    """
    known = {architecture: family for family in FAMILIES.values() for architecture in family.architectures}
    kinds = {kind: family for family in FAMILIES.values() for kind in family.model_types}
    named, kind = values.get("architectures") or None, values.get("model_type")
    named = named[0] if isinstance(named, list) else named
    table, shown = (kinds, kind) if named is None else (known, named)
    family = table.get(shown) if isinstance(shown, str) else None
    if family is None and str(kind or shown).lower().startswith("gemma3n"):
        raise ValueError(
            "Gemma 3n is not implemented: it has several residual streams (AltUp), low-rank branches beside its layers "
            "(Laurel) and sparse activations; Gemma 4 E2B and E4B, which have none of these, can be read"
        )
    if family is None:
        near = _nearest(str(shown)[:60], table)
        has = ", ".join(sorted(FAMILIES))
        raise ValueError(f"unknown architecture {str(shown)[:60]!r}; did you mean {near!r}? Known families: {has}")
    if kind is not None and kind not in family.model_types:
        raise ValueError(f"architecture {shown!r} and model_type {kind!r} contradict each other")
    return family


def _nearest(name: str, known: Iterable[str]) -> str:
    """The known architecture or model type that a name is nearest to, by its model and not by its task."""

    def model(name: str) -> str:
        return re.split(r"(For[A-Z]|LMHead|Model$)", name)[0].lower()

    models: dict[str, str] = {}
    for other in known:
        models.setdefault(model(other), other)
    return models[difflib.get_close_matches(model(name), models, 1, 0.0)[0]]


def read_config(values: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The ModelConfig of a config.json.

    Args:
      values: the parsed config.json.
      generation: the parsed generation_config.json. Its BOS wins, as in transformers; its stop ids are joined by those
        of config.json: a model that was tuned to end its turns often has them in one of the two files only.

    Raises:
      ValueError: one line that names a field which is missing, malformed or not implemented.
    """
    fields = Fields(values)
    config = expanded(find_family(values).read(fields))
    fields.seen.add("quantization_config")
    read_quantisation(values)  # refused here where it is; whoever loads the weights asks again
    fields.only("is_encoder_decoder", (None, False))
    fields.only("add_cross_attention", (None, False))
    fields.only("tie_encoder_decoder", (None, False))
    config = config.replace(sink_token=fields.flag("sink_token", False))
    unread = fields.unread()
    if unread:
        warnings.warn(f"config.json has fields that streamjax does not know: {', '.join(unread)}", stacklevel=2)
    text = values.get("text_config")
    places = (generation or {}, values, text if isinstance(text, dict) else {})
    bos = next((ids for place in places if (ids := _token_ids("bos_token_id", place))), ())
    eos = dict.fromkeys(token for place in places for token in _token_ids("eos_token_id", place))
    wrong = next((token for token in eos if not 0 <= token < config.vocab_size), None)
    if wrong is not None:
        raise ValueError(f"field 'eos_token_id' has {wrong}, which is outside the vocabulary of {config.vocab_size}")
    return config.replace(bos_token_id=bos[0] if bos else None, eos_token_ids=tuple(eos))


def _token_ids(name: str, place: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids of a field: one, a list, or none where it is null or missing."""
    ids: Any = place.get(name)
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"field {name!r} is {ids!r}; expected token ids")
    return tuple(ids)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, such that reading it gives the model's config back.

    Raises:
      ValueError: the architecture of `config.family` cannot express a field; the message names it, and the families
        that can.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"unknown ModelConfig.family {config.family!r}; use one of {', '.join(FAMILIES)}")
    values, lost = _try_write(FAMILIES[config.family], config)
    if lost is None:
        return values
    others = [name for name, family in FAMILIES.items() if _try_write(family, config.replace(family=name))[1] is None]
    hint = f"; family {' or '.join(others)} can" if others else ""
    raise ValueError(f"family {config.family!r} cannot express {lost}{hint}")


def _try_write(family: Family, config: ModelConfig) -> tuple[dict[str, Any], str | None]:
    """The config.json, and what it loses: the first field that reads back differently (None where none does)."""
    eos = config.eos_token_ids
    values: dict[str, Any] = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    try:
        values |= family.write(config)
        values |= {
            "pad_token_id": None,  # a family's default may lie beyond the vocabulary
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }
        if config.sink_token:
            values["sink_token"] = True
        back = _plain(read_config(values))
    except ValueError as error:
        return values, f"this model: {error}"
    return values, _difference(_plain(config), back)


def _difference(mine: ModelConfig, theirs: ModelConfig) -> str | None:
    """The first field in which two models differ, in words; None where they are equal."""
    if mine == theirs:
        return None
    with contextlib.suppress(ValueError):
        flat = [UniformConfig.from_model_config(config) for config in (mine, theirs)]
        for field in dataclasses.fields(UniformConfig):
            one, other = (getattr(config, field.name) for config in flat)
            if one != other:
                return f"{field.name} = {one!r} (it would read back as {other!r})"
    if mine.num_layers != theirs.num_layers:
        return f"{mine.num_layers} layers (it would read back as {theirs.num_layers})"
    places: list[tuple[str, Any, Any]] = [("ModelConfig", mine.replace(blocks=theirs.blocks), theirs)]
    places += [(f"layer {i}'s ", *pair) for i, pair in enumerate(zip(mine.blocks, theirs.blocks, strict=True))]
    while places:
        where, one, other = places.pop(0)
        if one == other:
            continue
        if type(one) is type(other) and dataclasses.is_dataclass(one):
            joint = "" if where.endswith(" ") else "."
            places = [
                (f"{where}{joint}{field.name}", getattr(one, field.name), getattr(other, field.name))
                for field in dataclasses.fields(one)
            ]
            continue
        return f"{where} = {one!r} (it would read back as {other!r})"
    return None


def _plain(config: ModelConfig) -> ModelConfig:
    """An equivalent config in one canonical spelling."""
    plain = {block: _plain_block(block) for block in dict.fromkeys(config.blocks)}
    return config.replace(blocks=tuple(plain[block] for block in config.blocks))


def _plain_block(block: BlockConfig) -> BlockConfig:
    if block.mixer.recurrent:
        return block
    mixer = block.attention
    changes: dict[str, Any] = {"scale": mixer.softmax_scale}
    if mixer.rope is not None:
        changes["rope"] = plain_rope(mixer.rope, mixer.head_dim)
    return block.with_mixer(**changes)

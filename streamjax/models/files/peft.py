"""Adapters in and out of the folders that PEFT reads and writes: adapter_config.json and adapter_model.safetensors.

PEFT puts an adapter beside a module of a Hugging Face model and names its factors after it:
`base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]. Where one module holds several
targets (`lora_modules.py`), their adapters become one, of the ranks' sum: the A's on top of each other, the B's along a
diagonal of blocks. The file's metadata say how to take it apart again; without them, as PEFT trains it, it is read as
one adapter on each of the targets, with the same A.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.checkpoints import check_manifest, parse_json, read_json, replaced_folder, whole
from streamjax.models.decoder import Decoder
from streamjax.models.families import FAMILIES
from streamjax.models.files.peft_modules import Part, modules, rows_of
from streamjax.models.files.safetensors_files import (
    PendingTensor,
    StoredTensor,
    read_header,
    read_metadata,
    write_file,
)
from streamjax.models.lora.adapters import Adapter
from streamjax.models.lora.attaching import Shape, adapter_dtype, adapter_of, attach, ranks_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SPLIT = "streamjax.split"  # metadata: module -> [[target, rank], ...], where a module holds several targets
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json that mean another computation, unless they are empty.
_OTHER_METHODS = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication", "arrow_config"),
    *("kasa_config", "monteclora_config", "target_parameters", "trainable_token_indices", "alora_invocation_tokens"),
)
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")  # all others change the base's weights too
Split = Mapping[str, Sequence[tuple[str, int]]]


def save_lora(model: Decoder, path: str | Path, base: str | None = None) -> None:
    """Write a model's adapters, without the model, such that PEFT can load them.

    Args:
      model: a model with adapters, in either layout.
      path: folder, created where it is missing. Not the base model's own: transformers would take the two for one.
      base: name or path of the base model, for who reads it.

    The folder is the old one or the new one at any time, and has a manifest, as with `save_hf`.

    Raises:
      ValueError: the model has no adapters.
      SaveError: the disk is full, or does not let itself be written to; what was there before is as it was.
    """
    ranks = ranks_of(model)
    if not ranks:
        raise ValueError("the model has no LoRA adapters: add_lora makes them, and save_hf writes a model without")
    about: dict[str, tuple[int, float]] = {}  # module -> rank and alpha
    split: dict[str, list[tuple[str, int]]] = {}
    tensors: list[PendingTensor] = []
    dtype = np.dtype(adapter_dtype(model))
    for template, parts in modules(model).items():
        used = [part for part in parts if part.target in ranks]
        if not used:
            continue
        rank, alpha = ranks[used[0].target]
        scale, rank, rows = alpha / rank, sum(ranks[part.target][0] for part in used), rows_of(parts)
        module = template.rpartition(".")[2]
        about[module] = rank, scale * rank
        if len(parts) > 1:
            split[module] = [(part.target, ranks[part.target][0]) for part in used]
        for layer in range(model.config.num_layers):
            name, factors = f"base_model.model.{template.format(layer=layer)}", _Factors(model, layer, used)
            b = partial(factors.b, rows, scale)
            tensors.append(PendingTensor(f"{name}.lora_A.weight", (rank, used[0].width), dtype, factors.a))
            tensors.append(PendingTensor(f"{name}.lora_B.weight", (rows, rank), dtype, b))
    with replaced_folder(path, (CONFIG, WEIGHTS, f"{WEIGHTS}.partial").__contains__) as folder:
        write_file(folder / WEIGHTS, tensors, {_SPLIT: json.dumps(split)} if split else None)
        (folder / CONFIG).write_text(json.dumps(_config(about, base), indent=2) + "\n", encoding="utf-8")


def load_lora(model: Decoder, path: str | Path) -> Decoder:
    """The model with the adapters of a folder that `save_lora` or PEFT wrote.

    Args:
      model: the base, without adapters, in either layout.
      path: folder with adapter_config.json and adapter_model.safetensors.

    Adapters are float32 (float64 for a float64 model), and lie on the mesh that the model lies on.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, damaged, made for another base
        model, or of a method that is not plain LoRA.
    """
    folder = whole(path)
    values, file = _read_config(folder / CONFIG), folder / WEIGHTS
    if not file.exists():
        raise ValueError(f"{file}: this file is missing; adapters in pickle files (*.bin) are not read")
    tensors = _by_module(model, file)
    split = _read_split(file)
    found: dict[str, list[_Stored]] = {}  # target -> one a layer
    for template, parts in modules(model).items():
        names = [template.format(layer=layer) for layer in range(model.config.num_layers)]
        if not any((name, factor) in tensors for name in names for factor in "AB"):
            continue
        for name in names:
            rank, scale = _rank_and_scale(folder / CONFIG, values, name)
            a = _take(file, tensors, name, "A", (rank, parts[0].width))
            b = _take(file, tensors, name, "B", (rows_of(parts), rank))
            for part, columns in _columns(file, parts, split.get(template.rpartition(".")[2]), rank):
                found.setdefault(part.target, []).append(_Stored(part, a, b, columns, scale))
    if tensors:
        name = next(iter(tensors.values())).name
        raise ValueError(f"{file}: tensor {name!r} has no place in this {model.config.family} model: another base?")
    if not found:
        raise ValueError(f"{file}: there are no adapters in it")
    ranks = {target: _shared_rank(stored) for target, stored in found.items()}
    check_manifest(folder)

    def factors(target: str, layer: int, a: Shape, b: Shape) -> tuple[jax.Array, jax.Array]:
        return found[target][layer].read(adapter_dtype(model))

    return attach(model, ranks, factors)


@dataclasses.dataclass(frozen=True)
class _Factors:
    """A module's factors in one layer, from the adapters of its parts."""

    model: Decoder
    layer: int
    parts: Sequence[Part]

    def _adapters(self) -> list[tuple[Part, Adapter]]:
        found = [(part, adapter_of(self.model, self.layer, part.target)) for part in self.parts]
        return [(part, adapter) for part, adapter in found if adapter is not None]

    def a(self) -> np.ndarray:
        return np.concatenate([part.write_a(np.asarray(adapter.a[...])) for part, adapter in self._adapters()])

    def b(self, rows: int, scale: float) -> np.ndarray:
        columns = []
        for part, adapter in self._adapters():
            b = part.write_b(np.asarray(adapter.b[...]), rows)
            columns.append(b if adapter.scale == scale else b * (adapter.scale / scale))
        return np.concatenate(columns, axis=1)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """One layer's adapter of a target in a file: some of the ranks of a module's factors."""

    part: Part
    a: StoredTensor
    b: StoredTensor
    columns: tuple[int, int]
    scale: float

    @property
    def rank_and_alpha(self) -> tuple[int, float]:
        rank = self.columns[1] - self.columns[0]
        return rank, self.scale * rank

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The factors as the model has them."""
        a, b = self.a.read()[slice(*self.columns)], self.b.read()[:, slice(*self.columns)]
        return jnp.asarray(self.part.read_a(a), dtype), jnp.asarray(self.part.read_b(b), dtype)


def _config(about: Mapping[str, tuple[int, float]], base: str | None) -> dict[str, Any]:
    """adapter_config.json of modules with these ranks and alphas."""
    about = {module: (rank, int(alpha) if alpha == int(alpha) else alpha) for module, (rank, alpha) in about.items()}
    rank, alpha = next(iter(about.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(about),
        "rank_pattern": {module: r for module, (r, _) in about.items() if r != rank},
        "alpha_pattern": {module: a for module, (_, a) in about.items() if a != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def _read_config(file: Path) -> dict[str, Any]:
    """adapter_config.json, if it is plain LoRA."""
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {values.get('peft_type')!r}; only 'LORA' is read")
    for name in _OTHER_METHODS:
        if values.get(name):
            raise ValueError(f"{file}: field {name!r} is {values[name]!r}, which is not implemented")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{file}: field 'bias' is {values['bias']!r}; only adapters without trained biases are read")
    if values.get("init_lora_weights") not in _INITS:
        method = values["init_lora_weights"]
        raise ValueError(f"{file}: init_lora_weights {method!r} changes the base model too: convert it with PEFT first")
    return values


def _read_split(file: Path) -> Split:
    """What the file's metadata say of modules that hold several targets; nothing if PEFT wrote the file."""
    text = read_metadata(file).get(_SPLIT, "{}")
    try:
        return {
            module: [(str(target), int(rank)) for target, rank in pairs] for module, pairs in parse_json(text).items()
        }
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file}: its metadata field {_SPLIT!r} is damaged: {text[:80]!r}") from None


def _rank_and_scale(file: Path, values: Mapping[str, Any], module: str) -> tuple[int, float]:
    """What adapter_config.json says of a module."""

    def number(field: str, patterns: str) -> float:
        special = values.get(patterns) or {}
        key = next((key for key in special if re.fullmatch(rf"(.*\.)?({key})", module)), None)
        name, value = (field, values.get(field)) if key is None else (patterns, special[key])
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{file}: field {name!r} has {value!r} for {module}: a positive number is needed")
        return value

    rank, alpha = int(number("r", "rank_pattern")), number("lora_alpha", "alpha_pattern")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _by_module(model: Decoder, file: Path) -> dict[tuple[str, str], StoredTensor]:
    """A file's tensors by module, as the family's table names it, and factor, "A" or "B"."""
    found: dict[tuple[str, str], StoredTensor] = {}
    for tensor in read_header(file):
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"{file}: tensor {tensor.name!r} is no factor of a LoRA adapter on a projection")
        name = f"{match[1]}.weight"
        for pattern, replacement in FAMILIES[model.config.family].renames:
            name = re.sub(pattern, replacement, name)
        found[name.removesuffix(".weight"), match[2]] = tensor
    return found


def _take(
    file: Path, tensors: dict[tuple[str, str], StoredTensor], module: str, factor: str, shape: Shape
) -> StoredTensor:
    if (module, factor) not in tensors:
        raise ValueError(f"{file}: lora_{factor} of {module} is missing: a target needs its adapter in every layer")
    tensor = tensors.pop((module, factor))
    if tensor.shape != shape:
        wrong = f"has shape {list(tensor.shape)}; this base model and {CONFIG} ask for {list(shape)}"
        raise ValueError(f"{file}: tensor {tensor.name!r} {wrong}")
    return tensor


def _columns(
    file: Path, parts: Sequence[Part], split: Sequence[tuple[str, int]] | None, rank: int
) -> list[tuple[Part, tuple[int, int]]]:
    """Which ranks of a module's adapter are whose: all of them every part's, unless `split` says otherwise."""
    if split is None:
        return [(part, (0, rank)) for part in parts]
    by_target, found, start = {part.target: part for part in parts}, [], 0
    for target, size in split:
        if target in by_target:
            found.append((by_target[target], (start, start + size)))
        start += size
    if len(found) != len(split) or start != rank:
        raise ValueError(f"{file}: its metadata split {rank} ranks into {split!r}, which does not fit this base model")
    return found


def _shared_rank(stored: Sequence[_Stored]) -> tuple[int, float]:
    """Rank and alpha of a target, the same in all layers."""
    first = stored[0]
    for other in stored:
        if other.rank_and_alpha != first.rank_and_alpha:
            differ = f"tensors {first.a.name!r} and {other.a.name!r} differ in rank or alpha"
            raise ValueError(f"{first.a.file}: {differ}; a target's must be the same in every layer")
    return first.rank_and_alpha

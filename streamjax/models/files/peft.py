"""Adapters in and out of the folders that PEFT reads and writes: adapter_config.json and adapter_model.safetensors.

PEFT puts an adapter beside a module of a Hugging Face model and names its factors after it:
`base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight` [out, rank]. Where one module holds several
targets (`peft_modules.py`), their adapters become one, of the ranks' sum: the A's on top of each other, the B's along a
diagonal of blocks. The file's metadata say how to take it apart again; without them, as PEFT trains it, it is read as
one adapter on each of the targets, with the same A. A target has one rank in all layers here: what has less, or no
adapter in some layers, is filled up with zeros.

What an adapter beside a projection cannot express becomes a change of the base's weights (`base_changes.py`): DoRA,
adapters on embedding and head, modules that were trained whole, biases.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamjax.checkpoints import check_manifest, parse_json, replaced_folder, whole
from streamjax.models.decoder import Decoder
from streamjax.models.families import FAMILIES
from streamjax.models.files.base_changes import Change, change_tensors, tensor_shapes, untie
from streamjax.models.files.peft_config import CONFIG, AdapterConfig, adapter_config, read_adapter_config
from streamjax.models.files.peft_modules import Part, modules, rows_of
from streamjax.models.files.safetensors_files import (
    PendingTensor,
    StoredTensor,
    read_header,
    read_metadata,
    write_file,
)
from streamjax.models.lora.adapters import Adapter
from streamjax.models.lora.attaching import (
    Factors,
    Ranks,
    Shape,
    adapter_dtype,
    adapter_of,
    attach,
    ranks_of,
    refuse_adapters,
)

WEIGHTS = "adapter_model.safetensors"
_SPLIT = "streamjax.split"  # metadata: module -> [[target, rank], ...], where a module holds several targets
_FACTOR = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.default)?(?:\.weight)?")
_WHOLE = re.compile(r"(.+)\.(weight|bias)")
_log = logging.getLogger(__name__)
Split = Mapping[str, Sequence[tuple[str, int]]]
Tensors = dict[tuple[str, str], StoredTensor]  # by module, and what it is of it: "A", "B", "weight", ...


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

    Example:
      >>> import os
      >>> tuned = sj.add_lora(model, rank=4, alpha=8.0, targets=("q", "v"), key=jax.random.key(0))
      >>> sj.save_lora(tuned, "adapter", base="HuggingFaceTB/SmolLM2-135M")
      >>> sorted(os.listdir("adapter"))
      ['adapter_config.json', 'adapter_model.safetensors', 'checksums.json']
    """
    ranks = ranks_of(model)
    if not ranks:
        raise ValueError("the model has no LoRA adapters: add_lora makes them, and save_hf writes a model without")
    about: dict[str, tuple[int, float]] = {}  # module -> rank and alpha
    split: dict[str, list[tuple[str, int]]] = {}
    tensors: list[PendingTensor] = []
    dtype = np.dtype(adapter_dtype(model))
    numbers = FAMILIES[model.config.family].layer_numbers(model.config)
    for template, layers in modules(model).items():
        module = template.rpartition(".")[2]
        everywhere = len(layers) == model.config.num_layers
        for layer, parts in layers.items():
            used = [part for part in parts if part.target in ranks]
            if not used:
                continue
            rank, alpha = ranks[used[0].target]
            scale, rank, rows = alpha / rank, sum(ranks[part.target][0] for part in used), rows_of(parts)
            # to PEFT a module's last name means all that are called so, such as those of a shared expert
            about[module if everywhere else template.format(**numbers[layer])] = rank, scale * rank
            if len(parts) > 1:
                split[module] = [(part.target, ranks[part.target][0]) for part in used]
            name, factors = f"base_model.model.{template.format(**numbers[layer])}", _Factors(model, layer, used)
            b = partial(factors.b, rows, scale)
            tensors.append(PendingTensor(f"{name}.lora_A.weight", (rank, used[0].width), dtype, factors.a))
            tensors.append(PendingTensor(f"{name}.lora_B.weight", (rows, rank), dtype, b))
    with replaced_folder(path, (CONFIG, WEIGHTS, f"{WEIGHTS}.partial").__contains__) as folder:
        write_file(folder / WEIGHTS, tensors, {_SPLIT: json.dumps(split)} if split else None)
        (folder / CONFIG).write_text(json.dumps(adapter_config(about, base), indent=2) + "\n", encoding="utf-8")


def load_lora(model: Decoder, path: str | Path) -> Decoder:
    """The model with the adapters of a folder that `save_lora` or PEFT wrote.

    Args:
      model: the base, without adapters, in either layout.
      path: folder with adapter_config.json and adapter_model.safetensors.

    Adapters are float32 (float64 for a float64 model), and lie on the mesh that the model lies on. DoRA (2402.09353),
    adapters on the embedding or the head, modules that were trained whole (`modules_to_save`) and biases are merged
    into the weights, in their dtype, which the log tells; a head that was tied to the embedding gets its own then.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, damaged, made for another base
        model, or of a method that is not implemented.

    Example:
      >>> tuned = sj.add_lora(model, rank=4, alpha=8.0, targets=("q", "v"), key=jax.random.key(0))
      >>> sj.save_lora(tuned, "adapter")
      >>> sj.load_lora(model, "adapter").config == model.config
      True
    """
    refuse_adapters(model)
    folder = whole(path)
    config, file = read_adapter_config(folder / CONFIG), folder / WEIGHTS
    if not file.exists():
        raise ValueError(f"{file}: this file is missing; adapters in pickle files (*.bin) are not read")
    tensors, changes = _by_module(model, file), dict[str, Change]()
    found = _beside_projections(model, config, file, tensors, changes)
    untied = _whole_modules(model, config, file, tensors, changes)
    if tensors:
        name = next(iter(tensors.values())).name
        raise ValueError(f"{file}: tensor {name!r} has no place in this {model.config.family} model: another base?")
    if not found and not changes:
        raise ValueError(f"{file}: there are no adapters in it")
    check_manifest(folder)
    if changes:
        _log.info("%s: merged into the weights: %s", folder, ", ".join(_in_short(changes)))
        model = change_tensors(untie(model) if untied else model, changes)
    return attach(model, *_filled_up(found, adapter_dtype(model))) if found else model


def _beside_projections(
    model: Decoder, config: AdapterConfig, file: Path, tensors: Tensors, changes: dict[str, Change]
) -> dict[str, dict[int, _Stored]]:
    """The adapters on projections, by target and layer; those with magnitudes become changes of the weights."""
    split, numbers = _read_split(file), FAMILIES[model.config.family].layer_numbers(model.config)
    found: dict[str, dict[int, _Stored]] = {}
    for template, layers in modules(model).items():
        names = {layer: template.format(**numbers[layer]) for layer in layers}
        if not any((name, factor) in tensors for name in names.values() for factor in "AB"):
            continue
        for layer, name in names.items():
            parts = layers[layer]
            if (name, "A") not in tensors and (name, "B") not in tensors:
                if config.demands(name):
                    raise ValueError(f"{file}: lora_A of {name} is missing: {CONFIG} says that it has an adapter")
                continue
            rank, scale = config.rank_and_scale(name)
            a = _take(file, tensors, name, "A", (rank, parts[0].width))
            b = _take(file, tensors, name, "B", (rows_of(parts), rank))
            if config.dora:
                magnitude = _take(file, tensors, name, "magnitude_vector", (rows_of(parts),))
                changes[f"{name}.weight"] = partial(_decomposed, a, b, scale, magnitude)
                continue
            for part, columns in _columns(file, parts, split.get(template.rpartition(".")[2]), rank):
                found.setdefault(part.target, {})[layer] = _Stored(part, a, b, columns, scale)
    return found


def _whole_modules(
    model: Decoder, config: AdapterConfig, file: Path, tensors: Tensors, changes: dict[str, Change]
) -> bool:
    """What changes the embedding, the head and whole modules; whether the head stops being the embedding's."""
    table, shapes = FAMILIES[model.config.family].tensors(model.config.blocks[0]), tensor_shapes(model)
    ends = {end: table[end][0].name for end in ("embedding", "head")}
    shapes.setdefault(ends["head"], shapes[ends["embedding"]])
    embedding, head = (ends[end].removesuffix(".weight") for end in ends)
    vocab, width = shapes[ends["embedding"]]
    saved = {}  # PEFT writes the base's embedding and head along where there is an adapter on them
    for module, kind in [key for key in tensors if key[1] in ("weight", "bias") and ".".join(key) in shapes]:
        name = f"{module}.{kind}"
        saved[name] = _take(file, tensors, module, kind, shapes[name])
        changes[name] = partial(_replaced, saved[name], changes.get(name))
    adapted = False
    if (head, "A") in tensors or (head, "B") in tensors:
        rank, scale = config.rank_and_scale(head)
        a, b = _take(file, tensors, head, "A", (rank, width)), _take(file, tensors, head, "B", (vocab, rank))
        magnitude = _take(file, tensors, head, "magnitude_vector", (vocab,)) if config.dora else None
        changes[ends["head"]] = partial(_decomposed, a, b, scale, magnitude, before=changes.get(ends["head"]))
        adapted = True
    if (embedding, "embedding_A") in tensors or (embedding, "embedding_B") in tensors:
        if config.dora:
            raise ValueError(f"{file}: use_dora on {embedding}, an embedding, is not implemented")
        rank, scale = config.rank_and_scale(embedding)
        a = _take(file, tensors, embedding, "embedding_A", (rank, vocab))
        b = _take(file, tensors, embedding, "embedding_B", (width, rank))
        changes[ends["embedding"]] = partial(_looked_up, a, b, scale, before=changes.get(ends["embedding"]))
        adapted = True
    if not model.config.tie_embeddings or not changes.keys() & set(ends.values()):
        return False
    both = [saved[name].read(np.float32) for name in ends.values() if name in saved]
    if adapted or (len(both) == 2 and not np.array_equal(both[0], both[1])):
        return True
    if len(both) == 2:
        del changes[ends["head"]]
        return False
    return ends["head"] in saved or config.saves_whole(embedding)


def _decomposed(
    a: StoredTensor,
    b: StoredTensor,
    scale: float,
    magnitude: StoredTensor | None,
    weight: np.ndarray,
    before: Change | None = None,
) -> np.ndarray:
    """Weights [out, in] with LoRA's change; with magnitudes, rows of that length in its direction (DoRA)."""
    weight = weight if before is None else before(weight)
    changed = weight + scale * (b.read(np.float32) @ a.read(np.float32))
    if magnitude is None:
        return changed
    return magnitude.read(np.float32)[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)


def _looked_up(
    a: StoredTensor, b: StoredTensor, scale: float, weight: np.ndarray, before: Change | None = None
) -> np.ndarray:
    """An embedding [vocabulary, width] with LoRA's change."""
    weight = weight if before is None else before(weight)
    return weight + scale * (b.read(np.float32) @ a.read(np.float32)).T


def _replaced(stored: StoredTensor, behind: Change | None, weight: np.ndarray) -> np.ndarray:
    """The stored values, and what an adapter makes of them."""
    return stored.read(np.float32) if behind is None else behind(stored.read(np.float32))


def _in_short(changes: Mapping[str, Change]) -> list[str]:
    """Names of tensors without their layers, each once."""
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in changes})


def _filled_up(found: Mapping[str, Mapping[int, _Stored]], dtype: Any) -> tuple[Ranks, Factors]:
    """One rank and alpha for each target, and its factors in each layer, with zeros where a layer has less."""
    widest = {target: max(layers.values(), key=lambda stored: stored.rank) for target, layers in found.items()}

    def factors(target: str, layer: int, a: Shape, b: Shape) -> tuple[jax.Array, jax.Array]:
        stored = found[target].get(layer)
        if stored is None:
            return jnp.zeros(a, dtype), jnp.zeros(b, dtype)
        own_a, own_b = stored.read(dtype)
        scale = widest[target].scale
        own_b = own_b if stored.scale == scale else own_b * (stored.scale / scale)
        room = a[-1] - stored.rank
        return (
            jnp.pad(own_a, [(0, 0)] * (own_a.ndim - 1) + [(0, room)]),
            jnp.pad(own_b, [(0, room)] + [(0, 0)] * (own_b.ndim - 1)),
        )

    return {target: (stored.rank, stored.scale * stored.rank) for target, stored in widest.items()}, factors


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
    def rank(self) -> int:
        return self.columns[1] - self.columns[0]

    def read(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The factors as the model has them."""
        a, b = self.a.read()[slice(*self.columns)], self.b.read()[:, slice(*self.columns)]
        return jnp.asarray(self.part.read_a(a), dtype), jnp.asarray(self.part.read_b(b), dtype)


def _read_split(file: Path) -> Split:
    """What the file's metadata say of modules that hold several targets; nothing if PEFT wrote the file."""
    text = read_metadata(file).get(_SPLIT, "{}")
    try:
        return {
            module: [(str(target), int(rank)) for target, rank in pairs] for module, pairs in parse_json(text).items()
        }
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file}: its metadata field {_SPLIT!r} is damaged: {text[:80]!r}") from None


def _by_module(model: Decoder, file: Path) -> Tensors:
    """A file's tensors by module, as the family's table names it, and what they are of it."""
    found: Tensors = {}
    for tensor in read_header(file):
        name = tensor.name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        match = _FACTOR.fullmatch(name) or _WHOLE.fullmatch(name)
        if match is None:
            raise ValueError(f"{file}: tensor {tensor.name!r} is no part of a LoRA adapter")
        name = f"{match[1]}.weight"
        for pattern, replacement in FAMILIES[model.config.family].renames:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)  # the text part of a larger model
        key = name.removesuffix(".weight"), match[2]
        if key in found:
            raise ValueError(f"{file}: tensors {tensor.name!r} and {found[key].name!r} are for the same place")
        found[key] = tensor
    return found


def _take(file: Path, tensors: Tensors, module: str, kind: str, shape: Shape) -> StoredTensor:
    if (module, kind) not in tensors:
        raise ValueError(f"{file}: lora_{kind} of {module} is missing: a file that was cut, or another base?")
    tensor = tensors.pop((module, kind))
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

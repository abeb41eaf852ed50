"""Loading a model from a GGUF file, tensor by tensor."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from streamjax.checkpoints.gguf_header import GGUFHeader, GGUFTensor, read_header
from streamjax.checkpoints.json_files import one_line
from streamjax.data.text.gguf.vocabulary import stop_ids
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.families import find_family, read_config
from streamjax.models.files.gguf import metadata as md
from streamjax.models.files.gguf.architectures import ARCHITECTURES, Architecture
from streamjax.models.files.gguf.metadata import Metadata
from streamjax.models.files.gguf.weights import DequantisedTensor
from streamjax.models.files.hugging_face import Slot, check_tensors, loaded_decoder, parameter_slots
from streamjax.models.files.model_folders import check_sizes
from streamjax.models.files.safetensors_files import AnyTensor
from streamjax.models.quantising import quantised_shapes
from streamjax.models.rounding import Weights

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ONE_ROW = ".ffn_gate_inp_shexp.weight"  # a matrix of one row, of which llama.cpp makes a vector
_LEAVES = ("weight", "bias", "scale")
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # in the config, or by it


def load_gguf(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    weights: Weights | None = None,
) -> Decoder:
    """Load a model from a GGUF file; its weights are dequantised, a few rows at a time.

    Args:
      path: the file.
      dtype: of parameters and activations; `default_dtype()` where None.
      mesh: place every parameter by `streamjax.parallel.rules`, each device reading its own part; the default device
        where None.
      scan_layers: stack repeating layers (see `Decoder`).
      weights: "int8" or "int4": each kernel is quantised again as it is read; `dtype` where None.

    Raises:
      ValueError: one line that names the file, and the tensor or key, that is missing, unexpected, mis-shaped, damaged
        or not implemented. Nothing has been loaded then.
    """
    file = Path(path)
    header = read_header(file)
    architecture, values = read_values(header)
    try:
        family, config = find_family(values), read_config(values)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{file}: its metadata, as a config.json: {one_line(error)}") from error
    dtype = jnp.dtype(dtype or default_dtype())
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0), dtype=dtype, scan_layers=scan_layers))
    slots = parameter_slots(model, family)
    tensors = _renamed(header, architecture, values, slots)
    check_tensors(file, family, config, tensors, slots, "its metadata")
    target = quantised_shapes(model, weights)
    return loaded_decoder(target, slots, tensors, dtype, mesh, weights)


def read_values(header: GGUFHeader) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and its metadata as fields of a Hugging Face config.json.

    Raises:
      ValueError: an architecture that is not known, or metadata that are missing or contradict the tensors.
    """
    metadata = Metadata(header)
    name, file = metadata.architecture, header.file
    if header.get("split.count", int, 0) > 1:
        raise ValueError(
            f"{file}: one of several files of a model; join them with llama.cpp's llama-gguf-split --merge"
        )
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.5)
        hint = f" (the nearest is {near[0]})" if near else ""
        raise ValueError(
            f"{file}: architecture {name[:60]!r}; of GGUF files streamjax reads {', '.join(ARCHITECTURES)}{hint}"
        )
    if _EMBEDDING not in header.tensors:
        raise ValueError(f"{file}: no tensor {_EMBEDDING!r}: a vocabulary alone, or an adapter, is no model")
    architecture = ARCHITECTURES[name]
    values: dict[str, Any] = {"model_type": architecture.model_type, "vocab_size": header.tensors[_EMBEDDING].shape[0]}
    values |= {"tie_word_embeddings": _HEAD not in header.tensors}
    values |= metadata.fields(architecture.keys)
    if md.GROUPS.keys() <= architecture.keys.keys():
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    check_sizes(file, values, header.tensors)
    try:
        values |= architecture.more(metadata, values)
    except KeyError as error:
        raise ValueError(f"{file}: its metadata lack what is {error} in config.json") from None
    _check_widths(metadata, values)
    if rest := metadata.unread():
        warnings.warn(f"{file} has metadata that streamjax does not know: {', '.join(rest)[:300]}", stacklevel=2)
    values["bos_token_id"] = header.get("tokenizer.ggml.bos_token_id", int, None)
    values["eos_token_id"] = stop_ids(header)
    return architecture, values


def _check_widths(metadata: Metadata, values: Mapping[str, Any]) -> None:
    """Values must be as wide as keys, which are as wide as the library's heads; latent attention has its own widths."""
    if metadata.get("attention.kv_lora_rank", int) is not None:
        return
    keys, width = metadata.get("attention.key_length", int), metadata.get("attention.value_length", int)
    heads, d_model = values.get("num_attention_heads"), values.get("hidden_size")
    keys = keys or (d_model // heads if heads and d_model else None)
    if width is not None and keys is not None and width != keys:
        raise ValueError(
            f"{metadata.header.file}: keys are {keys} wide and values {width}, which streamjax does not read"
        )


def _renamed(
    header: GGUFHeader, architecture: Architecture, values: dict[str, Any], slots: list[Slot]
) -> dict[str, AnyTensor]:
    """The tensors by Hugging Face's names; those that no parameter has keep their own."""
    import gguf

    names = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = names[header.get("general.architecture", str)]
    table = gguf.get_tensor_name_map(kind, int(values.get("num_hidden_layers", values.get("n_layers", 0))))
    needed = dict.fromkeys(source.name for slot in slots for sources in slot.sources for source in sources)
    whole = {name for name in needed if _place(table, name)[0] in header.tensors}
    split = {name: parts for name in needed if name not in whole and (parts := architecture.parts_of(name))}
    wanted = dict.fromkeys(part for name in needed for part in split.get(name, (name,)))
    places = {name: _place(table, name) for name in wanted}
    experts = Counter(theirs for theirs, expert in places.values() if expert is not None)
    found: dict[str, AnyTensor] = {}
    used = set(_COMPUTED)
    for name, (theirs, expert) in places.items():
        stored = header.tensors.get(theirs)
        if stored is None:
            continue  # it is missing, and `check_tensors` says so
        used.add(theirs)
        if expert is not None and (len(stored.shape) < 3 or stored.shape[0] != experts[theirs]):
            wrong = f"has the shape {list(stored.shape)}; its metadata ask for {experts[theirs]} experts"
            raise ValueError(f"{header.file}: tensor {theirs!r} {wrong}")
        found[name] = _tensor(header, stored, architecture, values, expert)
    for name, parts in split.items():
        present = [part for part in parts if part in found]
        stored_parts = [part for name in present if isinstance(part := found.pop(name), DequantisedTensor)]
        if present == list(parts):
            found[name] = architecture.join(*stored_parts)
    for name, stored in header.tensors.items():
        if name not in used:
            found[name] = DequantisedTensor(header.file, name, stored.shape, stored)
    return found


def _place(table: Any, name: str) -> tuple[str, int | None]:
    """What a tensor of Hugging Face is called in GGUF files, "" if it has no name there; and which expert's it is."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
    if expert is not None:
        name = expert[1] + expert[3]
    stem, _, leaf = name.rpartition(".")
    theirs = table.get_name(stem) if leaf in _LEAVES else table.get_name(name)
    if theirs is not None and leaf in _LEAVES:
        theirs = f"{theirs}.{leaf}"
    return theirs or "", None if expert is None else int(expert[2])


def _tensor(
    header: GGUFHeader, stored: GGUFTensor, architecture: Architecture, values: dict[str, Any], expert: int | None
) -> DequantisedTensor:
    """A tensor, or one expert of it, with the order of rows and the values that Hugging Face has."""
    if expert is not None:
        first = expert * (stored.rows // stored.shape[0])
        return DequantisedTensor(header.file, stored.name, stored.shape[1:], stored, first)
    count = stored.rows if len(stored.shape) > 1 else stored.shape[0]
    shape = stored.shape
    if stored.name.endswith(_ONE_ROW) and len(shape) == 1:
        shape = (1, *shape)
    try:
        order = architecture.order(values, stored.name, count)
    except ValueError as error:
        raise ValueError(f"{header.file}: {error}") from None
    return DequantisedTensor(header.file, stored.name, shape, stored, 0, order, architecture.shifted(stored.name))

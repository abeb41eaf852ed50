"""Hugging Face checkpoints in and out: a folder with `config.json` and `*.safetensors`.

Everything is checked against the headers before the first value is read. Then each parameter is put together from its
tensors, cast and placed on its devices, one after the other: host memory holds one (fused) parameter at a time, or one
device's part of it. On CPU, where the host's memory is the device's, a parameter stays where it was put together.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from streamjax.checkpoints import check_manifest, read_json
from streamjax.models.calibration import output_factor
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.families import FAMILIES, Family, Source, Table, find_family, read_config, write_config
from streamjax.models.families.config_fields import read_quantisation
from streamjax.models.files.model_folders import CONFIG, check_sizes, replaced_model
from streamjax.models.files.quantised_weights import dequantised
from streamjax.models.files.safetensors_files import (
    DTYPES,
    AnyTensor,
    PendingTensor,
    list_tensors,
    write_tensors,
)
from streamjax.models.lora.attaching import refuse_adapters
from streamjax.models.quantising import (
    aligned_empty,
    input_axes,
    layout_here,
    output_of,
    quantised_parts,
    quantised_shapes,
    refuse_quantised,
)
from streamjax.models.rounding import Weights
from streamjax.parallel.rules import partition_spec

_BUFFERS = (r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",)  # recomputed from the config
_STRIP = 16
Index = tuple[slice, ...]
Tensors = Mapping[str, AnyTensor]


def load_hf(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    weights: Weights | None = None,
) -> Decoder:
    """Load a Hugging Face checkpoint.

    Args:
      path: folder with config.json and safetensors, single or sharded.
      dtype: of parameters and activations; `default_dtype()` where None.
      mesh: place every parameter by `streamjax.parallel.rules`, each device reading its own part; the default device
        where None.
      scan_layers: stack repeating layers (see `Decoder`).
      weights: "int8" or "int4": each kernel is quantised as it is read; as they are where None.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, unexpected, mis-shaped,
        damaged or not implemented. Nothing has been loaded then.
    """
    folder = Path(path)
    family, config, stored = read_folder(folder)
    tensors = _renamed(family, stored)
    dtype = jnp.dtype(dtype or default_dtype())
    model = jax.eval_shape(lambda: Decoder(config, jax.random.key(0), dtype=dtype, scan_layers=scan_layers))
    slots = parameter_slots(model, family, tensors)
    check_tensors(folder, family, config, tensors, slots)
    target = quantised_shapes(model, weights)
    check_manifest(folder)
    return loaded_decoder(target, slots, tensors, dtype, mesh, weights)


def save_hf(model: Decoder, path: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Write a model as a Hugging Face checkpoint that transformers can load.

    Args:
      model: any `Decoder`, in either layout; its config's `family` says which architecture to write.
      path: folder, created where it is missing; an earlier checkpoint in it is replaced.
      max_shard_size: bytes of a file beyond which the checkpoint is split and gets an index.

    The folder is the old one or the new one at any time, and has a manifest, `checksums.json`, that `load` checks.
    Files in it that are no part of a checkpoint, such as a tokenizer, stay.

    Raises:
      ValueError: the architecture cannot express the model's config, or the model has adapters; nothing was written.
      SaveError: the disk is full, or does not let itself be written to; what was there before is as it was.

    Example:
      >>> import os
      >>> sj.save_hf(model, "exported")
      >>> sorted(os.listdir("exported"))
      ['checksums.json', 'config.json', 'model.safetensors']
    """
    refuse_adapters(model)
    refuse_quantised(model, "Hugging Face's folders have no such; write them with streamjax.save or save_safetensors")
    values = write_config(model.config)
    values["torch_dtype"] = str(model.embedding[...].dtype)
    pending: dict[str, list[tuple[int, PendingTensor]]] = {}  # and which row each begins at
    for slot in parameter_slots(model, FAMILIES[model.config.family]):
        dtype = np.dtype(slot.parameter.get_value().dtype)
        for row, sources in enumerate(slot.sources):
            for source in sources:
                export = partial(export_tensor, slot, row, source)
                tensor = PendingTensor(source.name, source.shape(slot.shape), dtype, export)
                pending.setdefault(source.name, []).append((source.rows[0] if source.rows else 0, tensor))
    with replaced_model(path, values) as folder:
        write_tensors(folder, [_join(parts) for parts in pending.values()], max_shard_size)


def read_folder(folder: Path) -> tuple[Family, ModelConfig, Tensors]:
    """The family, the config and the tensors of a checkpoint folder.

    Raises:
      ValueError: a file is missing or damaged, or config.json asks for something that is not implemented, or for more
        than there are weights of.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with config.json and *.safetensors")
    file = folder / CONFIG
    values = read_json(file, finite=False)  # Mamba-2 has steps up to Infinity; `Fields` refuses it elsewhere
    generation = folder / "generation_config.json"
    extra = read_json(generation) if generation.exists() else None
    stored = list_tensors(folder)
    check_sizes(file, values, stored)
    try:
        family, config, quantisation = find_family(values), read_config(values, extra), read_quantisation(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return family, config, dequantised(stored, quantisation)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A parameter of a decoder and the checkpoint tensors that hold it: one tuple, or one a layer of a stack."""

    name: str
    parameter: nnx.Param
    stacked: bool
    sources: tuple[tuple[Source, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one layer's parameter."""
        full = self.parameter.get_value().shape
        return full[1:] if self.stacked else full


def parameter_slots(model: Decoder, family: Family, stored: Collection[str] = ()) -> list[Slot]:
    """Every parameter of the model, in the order of its leaves; where it is packed in `stored`, as it is there."""
    blocks, numbers = model.config.blocks, family.layer_numbers(model.config)
    tables = {block: family.tensors(block) for block in dict.fromkeys(blocks)}
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    slots = []
    for path, parameter in leaves:
        name = jax.tree_util.keystr(path)[1:]
        place = re.fullmatch(r"(stack|layers)\[(\d+)\]\.(.*)", name)
        if place is None:
            slots.append(Slot(name, parameter, False, (tables[blocks[0]][name],)))
            continue
        stacked, position = place[1] == "stack", int(place[2])
        first, step = (position, len(model.stack)) if stacked else (position + model.stacked_layers, 1)
        layers = range(first, model.stacked_layers, step) if stacked else (first,)
        shape = parameter.get_value().shape[1 if stacked else 0 :]
        key = f"layers.{place[3]}"
        sources = tuple(
            tuple(
                source
                for entry in _stored_entries(family, tables[blocks[layer]], key, numbers[layer], stored)
                for source in entry.of_layer(numbers[layer], shape)
            )
            for layer in layers
        )
        slots.append(Slot(name, parameter, stacked, sources))
    return slots


def _stored_entries(
    family: Family, table: Table, key: str, numbers: Mapping[str, int], stored: Collection[str]
) -> tuple[Source, ...]:
    """The entries of a table for a parameter of a layer, or those of its packed form where that is stored."""
    packed = family.packed.get(key, ())
    return packed if packed and all(entry.name.format(**numbers) in stored for entry in packed) else table[key]


def _renamed(family: Family, tensors: Tensors) -> Tensors:
    """The tensors by the names of the family's table."""
    renamed: dict[str, AnyTensor] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"{tensor.file}: tensors {tensor.name!r} and {renamed[name].name!r} are both {name!r}")
        renamed[name] = tensor
    return renamed


def check_tensors(
    folder: Path, family: Family, config: ModelConfig, tensors: Tensors, slots: Sequence[Slot], says: str = CONFIG
) -> None:
    """Refuse a checkpoint whose tensors are not exactly the ones that the model needs; `says` is what described it."""
    expected: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        for source in (source for layer in slot.sources for source in layer):
            shape = source.shape(slot.shape)
            rows = shape[0] if source.rows is None else max(source.rows[1], expected.get(source.name, (0,))[0])
            expected[source.name] = (rows, *shape[1:])
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name!r} of shape {list(shape)} is missing from the checkpoint")
        tensor = tensors[name]
        if tensor.shape != shape:
            wrong = f"has shape {list(tensor.shape)}; {says} asks for {list(shape)}"
            raise ValueError(f"{tensor.file}: tensor {tensor.name!r} {wrong}")
        if tensor.code not in DTYPES:
            wrong = f"has dtype {tensor.code}; streamjax reads {', '.join(DTYPES)}"
            raise ValueError(f"{tensor.file}: tensor {tensor.name!r} {wrong}")
    table = family.tensors(config.blocks[0])
    head = table["head"][0].name
    ignored = re.compile("|".join((*family.ignored, *_BUFFERS)))
    for name, tensor in tensors.items():
        if name == head and config.tie_embeddings:
            _check_tied(tensor, tensors[table["embedding"][0].name])
        elif name not in expected and not ignored.search(name):
            wrong = f"{says} describes a {family.name} model without it"
            raise ValueError(f"{tensor.file}: unexpected tensor {tensor.name!r}; {wrong}")


def _check_tied(head: AnyTensor, embedding: AnyTensor) -> None:
    """A tied head that is stored all the same must be the embedding."""
    if head.shape == embedding.shape:
        blocks = head.blocks(0, head.shape[0])
        if all(np.array_equal(head.read_rows(*block), embedding.read_rows(*block)) for block in blocks):
            return
    raise ValueError(
        f"{head.file}: tensor {head.name!r} differs from {embedding.name!r}, although config.json ties them; "
        "set tie_word_embeddings to false there if the two are meant to differ"
    )


def loaded_decoder(
    target: Decoder,
    slots: Sequence[Slot],
    tensors: Tensors,
    dtype: np.dtype,
    mesh: Mesh | None,
    weights: Weights | None,
) -> Decoder:
    """The decoder of `target`'s shapes, each array on its devices; of quantised kernels their parts.

    The output matrix of int4 comes last: its codes depend on what the other layers make of tokens.
    """
    structure, output = jax.tree.structure(target), output_of(target) if weights == "int4" else ""
    embedding = next(slot for slot in slots if slot.name == "embedding")

    def read_embeddings(ids: np.ndarray) -> np.ndarray:
        places = [(slice(i, i + 1), slice(None)) for i in ids.tolist()]
        read = partial(_read, tensors, embedding.sources[0], embedding.shape, np.dtype(np.float32))
        return np.concatenate([read(place) for place in places])

    parts = {slot.name: _load_parameter(slot, tensors, dtype, mesh, weights) for slot in slots if slot.name != output}
    for slot in slots:
        if slot.name == output:
            leaves = (parts.get(slot.name, [None, None, None]) for slot in slots)
            others: Decoder = jax.tree.unflatten(structure, itertools.chain.from_iterable(leaves))
            factor = output_factor(others, read_embeddings)
            parts[output] = _load_parameter(slot, tensors, dtype, mesh, weights, factor)
    loaded: Decoder = jax.tree.unflatten(structure, [leaf for slot in slots for leaf in parts[slot.name]])
    return loaded


def _load_parameter(
    slot: Slot,
    tensors: Tensors,
    dtype: np.dtype,
    mesh: Mesh | None,
    weights: Weights | None,
    factor: np.ndarray | None = None,
) -> list[jax.Array]:
    """The arrays of one parameter; of a quantised kernel codes, offsets if any, and scales."""
    axes, inputs = slot.parameter.get_metadata("axes"), input_axes(slot.parameter)

    def placed(sources: Sequence[Source]) -> Iterator[jax.Array]:
        if weights is None or inputs is None:
            return iter([_place(partial(_read, tensors, sources, slot.shape, dtype), slot.shape, axes, mesh)])
        read = partial(_read, tensors, sources, slot.shape, np.dtype(np.float32))
        return (
            _place(part.__getitem__, part.shape, axes, mesh)
            for part in quantised_parts(read, slot.shape, inputs, weights, layout_here(), factor)
        )

    if not slot.stacked:
        return list(placed(slot.sources[0]))
    stacks: list[jax.Array] = []
    for row, sources in enumerate(slot.sources):
        for i, layer in enumerate(placed(sources)):
            if len(stacks) == i:
                stacks.append(_empty_stack(len(slot.sources), layer))
            inserted = _inserter(stacks[i].sharding)(stacks[i], layer, row)
            stacks[i] = jax.block_until_ready(inserted)  # no more than two layers' memory beside the stack
    return stacks


def _empty_stack(rows: int, layer: jax.Array) -> jax.Array:
    """Zeros for so many layers, split as one is."""
    sharding: Any = layer.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jax.jit(partial(jnp.zeros, (rows, *layer.shape), layer.dtype), out_shardings=sharding)()


@lru_cache(maxsize=64)
def _inserter(sharding: jax.sharding.Sharding) -> Callable[..., jax.Array]:
    """Write one layer into a stack, in place."""

    def insert(stack: jax.Array, layer: jax.Array, row: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, row, 0)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _place(
    read: Callable[[Index], np.ndarray], shape: tuple[int, ...], axes: Sequence[str], mesh: Mesh | None
) -> jax.Array:
    """An array on the default device, or in parts on the devices of a mesh; each part is read once.

    It waits for every transfer: those that are under way hold on to their copy on the host.
    """
    if mesh is None:
        return jax.block_until_ready(jax.device_put(read((slice(None),) * len(shape))))
    sharding = NamedSharding(mesh, partition_spec(axes, shape, mesh))
    parts: dict[str, list[jax.Device]] = {}
    indices: dict[str, Index] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts.setdefault(str(index), []).append(device)
        indices[str(index)] = tuple(index or ())
    shards: list[jax.Array] = []
    for key, devices in parts.items():
        values = read(indices[key])
        shards += jax.block_until_ready([jax.device_put(values, device) for device in devices])
        del values
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(
    tensors: Tensors, sources: Sequence[Source], shape: tuple[int, ...], dtype: np.dtype, index: Index
) -> np.ndarray:
    """The part of a parameter at `index`, put together from its tensors; only that part is read from disk."""
    ranges = [range(size)[s] for size, s in zip(shape, index, strict=True)]
    values = aligned_empty([len(r) for r in ranges], dtype)
    for source in sources:
        stored, sizes = tensors[source.name], source.sizes(shape)
        filled, taken = [], []
        for wanted, held in zip(ranges, source.index(), strict=True):
            start, stop = held.start or 0, wanted.stop if held.stop is None else held.stop
            low, high = max(wanted.start, start), min(wanted.stop, stop)
            filled.append(slice(low - wanted.start, max(low, high) - wanted.start))
            taken.append(slice(low - start, max(low, high) - start))
        if any(part.start == part.stop for part in filled):
            continue
        if source.one_row:
            _copy(values[tuple(filled)], source.load(stored.read_rows(0, 1), sizes)[tuple(taken)])
            continue
        letter, axis = source.outermost(sizes)
        unit = source.shape(shape)[0] // sizes[letter]  # rows of the tensor for one place on the parameter's axis
        above = source.rows[0] if source.rows else 0
        into = filled[axis].start
        if source.pairs and letter == "d":  # one head: its channels change places
            view = source.load(stored.read_rows(above, above + sizes["d"]), sizes)
            _copy(values[tuple(filled)], view[tuple(taken)])
            continue
        for first, last in stored.blocks(above + unit * taken[axis].start, above + unit * taken[axis].stop, unit):
            count = (last - first) // unit
            view = source.load(stored.read_rows(first, last), {**sizes, letter: count})
            filled[axis], taken[axis] = slice(into, into + count), slice(count)
            _copy(values[tuple(filled)], view[tuple(taken)])
            into += count
            del view  # before the next rows are read
    return values


def _copy(into: np.ndarray, view: np.ndarray) -> None:
    """`into[...] = view` for a transposed view, in strips that stay in the CPU's caches: ten times as fast."""
    view = view.astype(into.dtype, copy=False)  # in the order in which it lies: three times as fast as on the way
    if into.itemsize == 2:
        into, view = into.view(np.uint16), view.view(np.uint16)  # bfloat16 has no fast loops of its own
    along = [axis for axis, stride in enumerate(view.strides) if stride == view.itemsize]
    last = view.ndim - 1
    if not along or last in along:
        into[...] = view
        return
    loops: list[Any] = [(slice(None),) if axis == along[0] else range(size) for axis, size in enumerate(view.shape)]
    loops[last] = [slice(start, start + _STRIP) for start in range(0, view.shape[last], _STRIP)]
    for place in itertools.product(*loops):
        into[place] = view[place]


def export_tensor(slot: Slot, row: int, source: Source) -> np.ndarray:
    """What a checkpoint tensor (or its rows) holds of a parameter."""
    value = slot.parameter.get_value()[row] if slot.stacked else slot.parameter.get_value()
    return source.save(np.asarray(value[source.index()]))


def _join(found: Sequence[tuple[int, PendingTensor]]) -> PendingTensor:
    """A tensor from its parts, each with the row that it begins at."""
    parts = [tensor for _, tensor in sorted(found, key=lambda part: part[0])]
    first = parts[0]
    if len(parts) == 1:
        return first
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return PendingTensor(first.name, shape, first.dtype, lambda: np.concatenate([part.values() for part in parts]))

"""streamjax's own folder of safetensors: for models that no Hugging Face architecture can express.

`config.json` holds the `ModelConfig` under `model_type: streamjax`; tensors have the names of their places in the
decoder ("layers.0.mlp.up"), one module a layer, in the decoder's own layout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from streamjax.checkpoints import check_manifest, read_json
from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models import config as model_config
from streamjax.models.calibration import output_factor
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.files.model_folders import CONFIG, check_sizes, replaced_model
from streamjax.models.files.quantised_weights import raw_rows
from streamjax.models.files.safetensors_files import PendingTensor, StoredTensor, code_of, list_tensors, write_tensors
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.lora.attaching import refuse_adapters
from streamjax.models.quantisation import QuantisedArray
from streamjax.models.quantising import (
    FILES,
    input_axes,
    layout_here,
    output_of,
    quantised_parts,
    quantised_shapes,
    weights_of,
    with_codes,
)
from streamjax.models.rounding import Weights
from streamjax.parallel.mesh import with_placement

MODEL_TYPE = "streamjax"


def save_safetensors(model: Decoder, path: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Write any model as safetensors and a config.json, which `streamjax.load` reads. transformers cannot.

    The folder is the old one or the new one at any time, and has a manifest, as with `save_hf`.

    Args:
      model: any `Decoder`, in either layout.
      path: folder, created where it is missing; an earlier checkpoint in it is replaced.
      max_shard_size: bytes of a file beyond which the checkpoint is split and gets an index.

    Raises:
      ValueError: the model has adapters; nothing was written.
      SaveError: the disk is full, or does not let itself be written to; what was there before is as it was.

    Example:
      >>> sj.save_safetensors(model, "native")
      >>> sj.load("native").config == model.config
      True
    """
    refuse_adapters(model)
    weights = weights_of(model)
    tensors = [
        PendingTensor(name, leaf.shape, np.dtype(leaf.dtype), partial(np.asarray, leaf))
        for name, leaf in named_arrays(with_codes(unstack_layers(model), FILES)).items()
    ]
    values = {"model_type": MODEL_TYPE, "model": model.config.to_json_dict()}
    with replaced_model(path, values | ({"weights": weights} if weights else {})) as folder:
        write_tensors(folder, tensors, max_shard_size)


def parse_config(file: Path, values: Any) -> ModelConfig:
    """The configuration that a file has in JSON.

    Raises:
      ValueError: it is none; the message names the file.
    """
    try:
        return model_config.parse_config(values)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: no model's configuration: {' '.join(str(error).split())[:200]}") from error


def is_native(folder: Path) -> bool:
    """Whether a folder with a config.json is one that `save_safetensors` wrote."""
    return read_json(folder / CONFIG).get("model_type") == MODEL_TYPE


def load_native(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    weights: Weights | None = None,
) -> Decoder:
    """Load what `save_safetensors` wrote; arguments as in `streamjax.load`.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, unexpected or mis-shaped.
    """
    folder = Path(path)
    values, stored = read_json(folder / CONFIG), list_tensors(folder)
    check_sizes(folder / CONFIG, values, stored)
    config = parse_config(folder / CONFIG, values.get("model"))
    saved = values.get("weights")
    check_saved(folder / CONFIG, saved, weights)
    dtype = jnp.dtype(dtype or default_dtype())
    model = jax.eval_shape(partial(Decoder, config, dtype=dtype), jax.random.key(0))
    source = quantised_shapes(model, saved, FILES)
    wanted, variables = named_arrays(source), _variables(source)
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        if name not in wanted:
            raise ValueError(f"{stored[name].file}: tensor {name!r} has no place in the model of config.json")
        if tuple(stored[name].shape) != wanted[name].shape:
            shapes = f"{list(stored[name].shape)}; config.json asks for {list(wanted[name].shape)}"
            raise ValueError(f"{stored[name].file}: tensor {name!r} has shape {shapes}")
        if isinstance(variables[name], QuantisedArray) and stored[name].code != code_of(wanted[name].dtype):
            codes = f"{stored[name].code}; of {saved} weights it is {code_of(wanted[name].dtype)}"
            raise ValueError(f"{stored[name].file}: tensor {name!r} has dtype {codes}")
    target = with_placement(source if saved else quantised_shapes(model, weights), mesh)
    check_manifest(folder)
    places, structure = _by_variable(jax.tree.leaves(target), variables, weights), jax.tree.structure(target)
    found: dict[str, list[Any]] = {}
    output = output_of(model) if weights == "int4" and not saved else ""
    for name in sorted(variables, key=lambda name: name == output):  # the output matrix last
        factor = None
        if name == output:
            others = [leaf for each in variables for leaf in found.get(each, places[each])]
            embeddings = partial(_read_single_rows, stored["embedding"])
            factor = output_factor(jax.tree.unflatten(structure, others), embeddings)
        arrays = _read(stored[name], variables[name], dtype, weights, factor)
        # Without a mesh they are not bound to a device: `jit` compiles a second program for arguments that are.
        found[name] = [
            jax.device_put(x, None if mesh is None else place.sharding)
            for x, place in zip(arrays, places[name], strict=True)
        ]
    read = jax.tree.unflatten(structure, [leaf for name in variables for leaf in found[name]])
    loaded = with_codes(read, layout_here())
    return stack_layers(loaded) if scan_layers else loaded


def check_saved(file: Path, saved: Any, weights: Weights | None) -> None:
    """Raise ValueError unless a model that was saved with such weights can be loaded with these."""
    if saved is not None and saved not in get_args(Weights):
        raise ValueError(f"{file}: field 'weights' is {saved!r}; expected {' or '.join(get_args(Weights))}")
    if saved is not None and weights not in (None, saved):
        raise ValueError(f"{file}: the weights are {saved}, and {weights} is asked for: load what they were made of")


def _variables(source: Decoder) -> dict[str, nnx.Variable]:
    """Every parameter, and what holds codes, offsets and scales, by name, in the order of the leaves."""
    variables = jax.tree.leaves(source, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return dict(zip(named_arrays(source), variables, strict=True))


def _read_single_rows(tensor: StoredTensor, places: np.ndarray) -> np.ndarray:
    return np.concatenate([tensor.read_rows(i, i + 1) for i in places.tolist()])


def _by_variable(
    leaves: Sequence[Any], variables: dict[str, nnx.Variable], weights: Weights | None
) -> dict[str, list[Any]]:
    """The leaves of a model, those of a parameter that is quantised as it is read together, by its name."""
    remaining = iter(leaves)
    parts = {None: 1, "int8": 2, "int4": 3}[weights]
    quantised = {name: weights is not None and input_axes(variable) is not None for name, variable in variables.items()}
    return {name: [next(remaining) for _ in range(parts if quantised[name] else 1)] for name in variables}


def _read(
    tensor: StoredTensor, variable: nnx.Variable, dtype: Any, weights: Weights | None, factor: np.ndarray | None
) -> Sequence[np.ndarray]:
    """A parameter, or its codes, offsets and scales; those that are stored, as they are."""
    if isinstance(variable, QuantisedArray):
        return [raw_rows(tensor, 0, tensor.shape[0], np.dtype(variable.get_value().dtype))]
    inputs = input_axes(variable)
    if weights is None or inputs is None:
        return [tensor.read(dtype)]
    whole = functools.cache(tensor.read)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(tensor.shape[0])
        return whole()[index] if stop - start == tensor.shape[0] else tensor.read_rows(start, stop)

    return quantised_parts(part, tensor.shape, inputs, weights, layout_here(), factor)

"""streamjax's own folder of safetensors: for models that no Hugging Face architecture can express.

`config.json` holds the `ModelConfig` under `model_type: streamjax`; tensors have the names of their places in the
decoder ("layers.0.mlp.up"), one module a layer, in the decoder's own layout.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from streamjax.checkpoints import check_manifest, read_json
from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models import config as model_config
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.files.model_folders import CONFIG, check_sizes, replaced_model
from streamjax.models.files.safetensors_files import PendingTensor, list_tensors, write_tensors
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.lora.attaching import refuse_adapters
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
    """
    refuse_adapters(model)
    tensors = [
        PendingTensor(name, leaf.shape, np.dtype(leaf.dtype), partial(np.asarray, leaf))
        for name, leaf in named_arrays(unstack_layers(model)).items()
    ]
    with replaced_model(path, {"model_type": MODEL_TYPE, "model": model.config.to_json_dict()}) as folder:
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


def load_native(path: str | Path, dtype: Any = None, mesh: Mesh | None = None, scan_layers: bool = False) -> Decoder:
    """Load what `save_safetensors` wrote; arguments as in `streamjax.load`.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, unexpected or mis-shaped.
    """
    folder = Path(path)
    values, stored = read_json(folder / CONFIG), list_tensors(folder)
    check_sizes(folder / CONFIG, values, stored)
    config = parse_config(folder / CONFIG, values.get("model"))
    dtype = jnp.dtype(dtype or default_dtype())
    model = with_placement(jax.eval_shape(partial(Decoder, config, dtype=dtype), jax.random.key(0)), mesh)
    wanted = named_arrays(model)
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        if name not in wanted:
            raise ValueError(f"{stored[name].file}: tensor {name!r} has no place in the model of config.json")
        if tuple(stored[name].shape) != wanted[name].shape:
            shapes = f"{list(stored[name].shape)}; config.json asks for {list(wanted[name].shape)}"
            raise ValueError(f"{stored[name].file}: tensor {name!r} has shape {shapes}")
    check_manifest(folder)
    leaves = [jax.device_put(stored[name].read(dtype), leaf.sharding) for name, leaf in wanted.items()]
    loaded = jax.tree.unflatten(jax.tree.structure(model), leaves)
    return stack_layers(loaded) if scan_layers else loaded

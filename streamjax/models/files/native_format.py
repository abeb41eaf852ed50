"""streamjax's own folder of safetensors: for models that no Hugging Face architecture can express.

`config.json` holds the `ModelConfig` under `model_type: streamjax`; tensors have the names of their places in the
decoder ("layers.0.mlp.up"), one module a layer, in the decoder's own layout.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from streamjax.checkpoints.pytrees import named_arrays
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.files.safetensors_files import PendingTensor, list_tensors, read_json, write_tensors
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.lora.attaching import refuse_adapters
from streamjax.parallel.mesh import with_placement

MODEL_TYPE = "streamjax"


def save_safetensors(model: Decoder, path: str | Path, max_shard_size: int = 5_000_000_000) -> None:
    """Write any model as safetensors and a config.json, which `streamjax.load` reads. transformers cannot.

    Args:
      model: any `Decoder`, in either layout.
      path: folder, created where it is missing; an earlier checkpoint in it is replaced.
      max_shard_size: bytes of a file beyond which the checkpoint is split and gets an index.

    Raises:
      ValueError: the model has adapters; nothing was written.
    """
    refuse_adapters(model)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = [
        PendingTensor(name, leaf.shape, np.dtype(leaf.dtype), partial(np.asarray, leaf))
        for name, leaf in named_arrays(unstack_layers(model)).items()
    ]
    write_tensors(folder, tensors, max_shard_size)
    values = {"model_type": MODEL_TYPE, "model": model.config.to_json_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def is_native(folder: Path) -> bool:
    """Whether a folder with a config.json is one that `save_safetensors` wrote."""
    return read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def load_native(path: str | Path, dtype: Any = None, mesh: Mesh | None = None, scan_layers: bool = False) -> Decoder:
    """Load what `save_safetensors` wrote; arguments as in `streamjax.load`.

    Raises:
      ValueError: one line that names the file, and the tensor or field, that is missing, unexpected or mis-shaped.
    """
    folder = Path(path)
    try:
        config = ModelConfig.from_json_dict(read_json(folder / "config.json")["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: no model's configuration: {error}") from error
    dtype = jnp.dtype(dtype or default_dtype())
    model = with_placement(jax.eval_shape(partial(Decoder, config, dtype=dtype), jax.random.key(0)), mesh)
    wanted, stored = named_arrays(model), list_tensors(folder)
    for name in sorted({*wanted, *stored}):
        if name not in stored:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        if name not in wanted:
            raise ValueError(f"{stored[name].file}: tensor {name!r} has no place in the model of config.json")
        if tuple(stored[name].shape) != wanted[name].shape:
            shapes = f"{list(stored[name].shape)}; config.json asks for {list(wanted[name].shape)}"
            raise ValueError(f"{stored[name].file}: tensor {name!r} has shape {shapes}")
    leaves = [
        jax.device_put(jnp.asarray(np.asarray(stored[name].open()), dtype), leaf.sharding)
        for name, leaf in wanted.items()
    ]
    loaded = jax.tree.unflatten(jax.tree.structure(model), leaves)
    return stack_layers(loaded) if scan_layers else loaded

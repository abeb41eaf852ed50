"""Models on disk: streamjax's own Orbax checkpoints, and `load`, which reads every layout of a model."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from streamjax.checkpoints import read_about, restore_pytree, save_pytree, user_path, whole
from streamjax.checkpoints.gguf_header import is_gguf
from streamjax.checkpoints.pytrees import ABOUT
from streamjax.models.decoder import Decoder, default_dtype
from streamjax.models.files.gguf.loading import load_gguf
from streamjax.models.files.hugging_face import load_hf
from streamjax.models.files.native_format import check_saved, is_native, load_native, parse_config
from streamjax.models.layer_stacking import stack_layers, unstack_layers
from streamjax.models.lora.attaching import empty_adapters, ranks_of
from streamjax.models.quantising import (
    Layout,
    check_weights,
    layout_here,
    quantised_model,
    quantised_shapes,
    weights_of,
    with_codes,
)
from streamjax.parallel.mesh import with_placement


def save(model: Decoder, path: str | Path) -> None:
    """Save a model: its arrays and its configuration, to be read by `load`. An earlier checkpoint there is replaced.

    Raises:
      ValueError: `path` holds something that is no checkpoint.

    Example:
      >>> sj.save(model, "checkpoint")
      >>> sj.load("checkpoint").config == model.config
      True
    """
    about = {"kind": "model", "model": model.config.to_json_dict(), "stacked": bool(len(model.stack))}
    about["lora"], about["weights"] = ranks_of(model), weights_of(model)
    save_pytree(model, path, about)


def load(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    scan_layers: bool | None = None,
    weights: str | None = None,
) -> Decoder:
    """Load a model: a Hugging Face folder or streamjax's own, a GGUF file, or a checkpoint that `save` wrote.

    Args:
      path: folder with config.json and *.safetensors, a .gguf file, or a checkpoint.
      dtype: of parameters and activations; bfloat16 on TPU and GPU, float32 on CPU where None.
      mesh: place every parameter by `streamjax.parallel.rules`, each device reading its own part; the default device
        where None.
      scan_layers: whether repeating layers lie stacked (see `Decoder`); as it was saved where None.
      weights: "int8" (a scale a channel) or "int4" (a scale for 32 weights): kernels are quantised as they are read,
        one after the other; those of a checkpoint of `save` once all have been read. As they were saved where None.

    Raises:
      ValueError: one line that says what is wrong with the folder, or the file.

    Example:
      >>> sj.load("SmolLM2-135M", dtype=jnp.bfloat16).dtype
      dtype(bfloat16)
    """
    kind = check_weights(weights)
    path = whole(user_path(path))
    if is_gguf(path):
        return load_gguf(path, jnp.dtype(dtype) if dtype else None, mesh, bool(scan_layers), kind)
    if not (path / ABOUT).exists():
        if (path / "config.json").exists():
            read = load_native if is_native(path) else load_hf
            return read(path, jnp.dtype(dtype) if dtype else None, mesh, bool(scan_layers), kind)
        if (path / "model").exists():
            raise ValueError(f"{path} holds no model, but {path / 'model'} may: load that")
        raise ValueError(f"no model at {path}: neither config.json with *.safetensors, nor a streamjax checkpoint")
    about = read_about(path, "model")
    config = parse_config(path / ABOUT, about.get("model"))
    stacked = about.get("stacked") is True
    try:
        adapters = {target: (int(rank), float(alpha)) for target, (rank, alpha) in about.get("lora", {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path / ABOUT}: its ranks of adapters are {about['lora']!r}") from None
    rows = max((shape[0] for _, *shape in about["arrays"].values() if shape), default=0) if stacked else 1
    if config.num_layers > rows * len(about["arrays"]):
        raise ValueError(f"{path / ABOUT}: {config.num_layers} layers, in {len(about['arrays'])} arrays")
    dtype = jnp.dtype(dtype or default_dtype())
    saved = about.get("weights")
    check_saved(path / ABOUT, saved, kind)
    kinds = {kind for kind, *_ in about["arrays"].values()}
    layout: Layout = "cpu" if "uint16" in kinds else "gpu" if "uint8" in kinds else "tpu"

    def build(key: jax.Array) -> Decoder:
        model = Decoder(config, key, dtype=dtype, scan_layers=stacked)
        return empty_adapters(model, adapters)

    template = quantised_shapes(jax.eval_shape(build, jax.random.key(0)), saved, layout)
    model: Decoder = restore_pytree(with_placement(template, mesh), path, cast=True)
    model = quantised_model(with_codes(model, layout_here()), kind)
    if scan_layers is None or scan_layers == stacked:
        return model
    return stack_layers(model) if scan_layers else unstack_layers(model)

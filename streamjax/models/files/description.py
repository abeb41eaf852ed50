"""What a model on disk is, without its weights."""

from __future__ import annotations

from pathlib import Path

from streamjax.checkpoints import read_about, read_json, user_path, whole
from streamjax.checkpoints.gguf_header import is_gguf, read_header
from streamjax.checkpoints.pytrees import ABOUT
from streamjax.models.config import ModelConfig
from streamjax.models.families import read_config
from streamjax.models.files.gguf.loading import read_values
from streamjax.models.files.hugging_face import read_folder
from streamjax.models.files.model_folders import CONFIG
from streamjax.models.files.native_format import is_native, parse_config


def describe_model(path: str | Path) -> ModelConfig:
    """The configuration of a model that `load` reads: a folder, a .gguf file, or a checkpoint.

    Raises:
      ValueError: one line that says what is wrong with the folder, or the file.
    """
    path = whole(user_path(path))
    if is_gguf(path):
        return read_config(read_values(read_header(path))[1])
    if (path / ABOUT).exists():
        return parse_config(path / ABOUT, read_about(path, "model").get("model"))
    if not (path / CONFIG).exists():
        raise ValueError(f"no model at {path}: neither {CONFIG} with *.safetensors, nor a streamjax checkpoint")
    if is_native(path):
        return parse_config(path / CONFIG, read_json(path / CONFIG).get("model"))
    return read_folder(path)[1]

"""The folder of a run: its configuration, which may not change under it, and the model that it leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from streamjax.checkpoints import read_json, replace_text, user_path
from streamjax.checkpoints.gguf_header import is_gguf
from streamjax.data.text.gguf.reading import write_tokenizer_files
from streamjax.models.decoder import Decoder
from streamjax.models.files.checkpoint import save
from streamjax.models.files.hugging_face import save_hf
from streamjax.models.files.native_format import save_safetensors
from streamjax.models.files.peft import save_lora
from streamjax.models.lora.attaching import merge_lora
from streamjax.parallel.multiprocess import gather_json
from streamjax.snapshots.run import Snapshots
from streamjax.training.run.config import SnapshotConfig, TrainConfig

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)
CONFIG_FILE = "train_config.json"
KEY_FILE = "snapshots_key"
# What may change between two starts of a run, because no step depends on it.
_FREE_FIELDS = frozenset(
    (
        "name",
        "mesh",
        "log_interval",
        "eval_interval",
        "eval_batches",
        "checkpoint_interval",
        "keep_checkpoints",
        "checkpoint_copies",
        "snapshots",
        "data.prefetch",
        "reference",
        "rollouts.samples",
        "optimizer.skip_nonfinite",  # a run that stopped may go on with it
        "optimizer.spike_factor",
        "diloco.replicas",  # they may become more or fewer, but not none
    )
)
_RESULTS = ("model", "adapters")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@contextlib.contextmanager
def one_run_in(workdir: Path) -> Iterator[None]:
    """Make the folder and keep other runs on this machine out of it; the kernel lets go of it when a process dies.

    A folder that was made for nothing, since the run did not come to its first file, is taken away again.

    Raises:
      ValueError: another run is in it, or it cannot be made.
    """
    if jax.process_index() > 0:
        yield
        return
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be used: {error.strerror or error}") from error
    try:
        _lock(folder, workdir)
        yield
    finally:
        os.close(folder)
        if made:
            with contextlib.suppress(OSError):
                workdir.rmdir()  # only if it is empty


def _lock(folder: int, workdir: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is at work in {workdir}: wait for it, stop it, or choose another --workdir"
        ) from None
    except OSError as error:  # a file system without locks
        _log.warning("%s: two runs in it would not be noticed (%s)", workdir, error.strerror)


def claim(workdir: Path, config: TrainConfig) -> None:
    """Write the configuration into the folder, or check that it is the one that is there.

    Raises:
      ValueError: the folder holds a run that another configuration began, or a model that no run has made.
    """
    file = workdir / CONFIG_FILE
    values = config.to_json_dict()
    if file.exists():
        check_unchanged(workdir, _read(file), values, "choose another --workdir")
    elif foreign := next((workdir / name for name in _RESULTS if (workdir / name).exists()), None):
        raise ValueError(
            f"{foreign} is there, and no run has made it; a run would replace it: choose another --workdir"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        replace_text(file, json.dumps(values, indent=2) + "\n")


def check_unchanged(place: str | Path, before: dict[str, Any], values: dict[str, Any], advice: str) -> None:
    """Compare the configuration of a run that lies at a place with that of the one that is to go on there.

    Raises:
      ValueError: they differ in what a step depends on.
    """
    for name, old, new in _changes(before, values):
        if name not in _FREE_FIELDS and name.split(".")[0] not in _FREE_FIELDS:
            raise ValueError(f"{place} holds a run with config.{name}={old!r}, not {new!r}: {advice}")


def open_snapshots(config: SnapshotConfig, workdir: Path) -> Snapshots | None:
    """Those of the run in a folder; None where the configuration wants none.

    The key lies in the folder. Keepers that know it hold snapshots of this very run, and of none before it.
    """
    if not config.interval:
        return None
    found = gather_json(_key(workdir / KEY_FILE) if jax.process_index() == 0 else "")[0]
    seconds = 60.0 * config.keep_minutes
    return Snapshots(bytes.fromhex(found), most=config.group, lost=config.lost, seconds=seconds)


def _key(file: Path) -> str:
    if not file.exists():
        replace_text(file, secrets.token_hex(16) + "\n")
        os.chmod(file, 0o600)
    return file.read_text().strip()


def export(model: Decoder, workdir: Path, config: TrainConfig) -> None:
    """Write the model, and the tokenizer's files, into `model/`, where `streamjax.load` and `load_tokenizer` find them.

    The layout is Hugging Face's where it has a name for the architecture, else `streamjax.save_safetensors`'s; where
    several processes hold the model, that of `streamjax.save`. Adapters are merged into that
    model, and lie alone in `adapters/`, in PEFT's layout. Over quantised weights they stay beside them, in
    `streamjax.save`'s layout.
    """
    folder, tokenizer = workdir / "model", config.data.tokenizer
    if config.lora.rank:
        if jax.process_count() == 1:
            save_lora(model, workdir / "adapters", config.init_from)
        model = model if config.weights else merge_lora(model)
    if jax.process_count() > 1 or config.weights:
        save(model, folder)
    else:
        try:
            save_hf(model, folder)
        except ValueError:
            save_safetensors(model, folder)
    if tokenizer is not None and jax.process_index() == 0 and is_gguf(user_path(tokenizer)):
        write_tokenizer_files(user_path(tokenizer), folder)
    elif tokenizer is not None and jax.process_index() == 0:
        source = user_path(tokenizer)
        source = source if source.is_dir() else source.parent
        for name in _TOKENIZER_FILES:
            if (source / name).exists():
                shutil.copy2(source / name, folder / name)


def _read(file: Path) -> dict[str, Any]:
    """The configuration in a workdir; `method` stood at its top before there was a group `backprop`."""
    values = read_json(file)
    if "method" in values:
        values["backprop"] = {"method": values.pop("method")}
    return values


def _changes(before: Any, after: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(name, before, after) of the fields that both nested dictionaries have, and in which they differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        shared = [field for field in after if field in before]
        return [c for f in shared for c in _changes(before[f], after[f], f"{name}.{f}" if name else f)]
    return [] if before == after else [(name, before, after)]

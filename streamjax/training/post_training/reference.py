"""Log-probabilities under the model that a run starts from: the weights below the adapters, or numbers on disk."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from streamjax.checkpoints import user_path
from streamjax.models.decoder import Decoder
from streamjax.models.lora.adapters import LoRAParam
from streamjax.parallel.multiprocess import gather_json
from streamjax.training.backprop.log_probs import token_log_probs
from streamjax.training.backprop.trainable_parameters import combine, partition

_log = logging.getLogger(__name__)
_FORMAT = "1"
_BLOCK = 1 << 22


def base_model(model: Decoder) -> Decoder:
    """The model as it is without its adapters, which are zero in it; its other arrays are the same."""
    adapters, rest = partition(model, LoRAParam)
    return combine(jax.tree.map(jnp.zeros_like, adapters), rest)


def answer_log_probs(
    model: Decoder, batch: Mapping[str, Array | np.ndarray], chunk_size: int | None = None
) -> Float[Array, " B"]:
    """The weighted sum of the log-probabilities of each row's targets, in nats."""
    logp = token_log_probs(model, batch, chunk_size=chunk_size)
    return jnp.sum(jnp.where(jnp.asarray(batch["weights"]) == 0, 0.0, batch["weights"] * logp), axis=1)


def stored_log_probs(
    key: str, pairs: int, folder: Path, compute: Callable[[], Float32[np.ndarray, "N 2"]]
) -> Float32[np.ndarray, "N 2"]:
    """The log-probabilities of the chosen and the rejected answers, from the folder, or computed and put there.

    Args:
      key: a hash of all that they depend on.
      pairs: how many there are.
      folder: where arrays lie by their keys. One that is damaged is computed again.
      compute: what computes them.
    """
    file = folder / f"{key}.npy"
    found = _read(file, pairs)
    if all(gather_json(found is not None)):  # processes on other machines may see another disk
        assert found is not None
        _log.info("reference log-probabilities of %d pairs from %s", pairs, file)
        return found
    values = compute()
    if jax.process_index() == 0:
        _write(file, values)
        _log.info("reference log-probabilities of %d pairs are now in %s", pairs, file)
    return values


def reference_key(init_from: str | None, about: Mapping[str, Any]) -> str:
    """A hash of a model's files and of what else log-probabilities depend on.

    Args:
      init_from: the model's folder or file; None where `about` says what it is.
      about: plain values.

    Raises:
      ValueError: a file cannot be read.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for name in sorted(about):
        digest.update(f"{name}={about[name]!r}\n".encode())
    if init_from is not None:
        path = user_path(init_from)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            digest.update(file.relative_to(path).as_posix().encode() + b"\0" + _sha256(file))
    return digest.hexdigest()


def _sha256(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            digest = hashlib.sha256()
            for block in iter(partial(stream.read, _BLOCK), b""):
                digest.update(block)
            return digest.digest()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _read(file: Path, pairs: int) -> Float32[np.ndarray, "N 2"] | None:
    """What is in a file; None where it is not there, or damaged."""
    try:
        found = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError):
        _log.warning("%s cannot be read: it is computed again", file)
        return None
    if found.shape == (pairs, 2) and found.dtype == np.float32 and np.isfinite(found).all():
        return found
    _log.warning("%s is damaged: it is computed again", file)
    return None


def _write(file: Path, values: np.ndarray) -> None:
    """In one step, so that nobody finds half of it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as stream:
            np.save(stream, values)
        os.replace(stream.name, file)
    except OSError as error:
        _log.warning("%s cannot be written (%s): the next start computes it again", file, error.strerror or error)

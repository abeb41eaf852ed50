"""Side networks in files: one safetensors file with a card, for the model that it was trained beside."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from streamjax.checkpoints.measured_files import measured_file
from streamjax.checkpoints.pytrees import named_arrays
from streamjax.checkpoints.user_paths import user_path
from streamjax.models.decoder import Decoder
from streamjax.models.side_network import SideConfig, SideDecoder, SideNetwork
from streamjax.streaming.saving.fingerprints import fingerprint_in_any_dtype

_KIND = "side network"
_CARD = (
    "Side network (LongMem, arXiv 2306.07174): layers beside a frozen model, of which one recalls keys and values that "
    "the model's layer `layer` has left in a bank; for sj.with_side_network and --side_network of streamjax with the "
    "cache preset long_mem, and for this model alone."
)


def save_side_network(model: SideDecoder, path: str | Path, tokens: int) -> None:
    """Write the side network of a model, as float32; its metadata is the card.

    Args:
      model: the model with its side network.
      path: of a safetensors file.
      tokens: how many were read in training.
    """
    config = model.side.config
    about = {"layer": str(config.layer), "reduction": str(config.reduction), "tokens": str(tokens)}
    arrays = {name: np.array(leaf, np.float32) for name, leaf in named_arrays(model.side).items()}
    own = {"kind": _KIND, "model": fingerprint_in_any_dtype(model)}
    save_file(arrays, user_path(path), metadata={**own, **about, "card": _CARD})


def with_side_network(model: Decoder, path: str | Path) -> SideDecoder:
    """The model with the side network of a file, whose logits it gives from now on.

    Args:
      model: the model that it was trained beside; it stays as it is.
      path: what `python -m train.side_network` wrote.

    Raises:
      ValueError: no such file, another model's, or a damaged one; one line that names it.

    Example:
      >>> model = sj.with_side_network(model, "side.safetensors")
      >>> state = sj.init_state(model, sj.kv.preset("long_mem", sinks=4, window=28, capacity=256))
    """
    with measured_file(path, _KIND, "side network", "it has no side network") as (file, about):
        if about["model"] != (own := fingerprint_in_any_dtype(model)):
            raise ValueError(f"it belongs to model {about['model']}, and this one is {own}")
        config = SideConfig(int(about["layer"]), int(about["reduction"]))
        empty = jax.eval_shape(lambda: SideNetwork.empty(model.config, config, model.dtype))
        leaves = []
        for name, wanted in named_arrays(empty).items():
            found = file.get_tensor(name)
            if found.shape != wanted.shape or not np.isfinite(found).all():
                raise ValueError(f"{name} is no array of {wanted.shape} numbers")
            leaves.append(jnp.asarray(found, wanted.dtype))
        return SideDecoder(model, jax.tree.unflatten(jax.tree.structure(empty), leaves))

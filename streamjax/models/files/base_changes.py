"""Changes of a model's own weights, told of the tensors that a Hugging Face checkpoint of it would have.

An adapter's folder may hold such tensors whole (PEFT's `modules_to_save`, trained biases), or changes that no adapter
beside the weights can express. A tensor may be a part of a parameter, and a parameter a part of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from streamjax.models.decoder import Decoder
from streamjax.models.families import FAMILIES, Source
from streamjax.models.files.hugging_face import Slot, export_tensor, parameter_slots
from streamjax.models.quantising import refuse_quantised

Change = Callable[[np.ndarray], np.ndarray]  # a tensor's values, float32, -> its new values


def tensor_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's checkpoint, by name, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    plain = jax.eval_shape(partial(Decoder, model.config), jax.random.key(0))  # without adapters, codes or stacks
    for slot in parameter_slots(plain, FAMILIES[model.config.family]):
        for source in (source for sources in slot.sources for source in sources):
            shape = source.shape(slot.shape)
            before = shapes.get(source.name, (0,))[0] if source.rows else 0
            shapes[source.name] = (before + shape[0], *shape[1:])
    return shapes


def change_tensors(model: Decoder, changes: Mapping[str, Change]) -> Decoder:
    """The model with some of its tensors changed, in their dtype and on their devices; the others are shared."""
    refuse_quantised(model, f"the adapters' folder changes {next(iter(changes))} itself")
    leaves, structure = jax.tree.flatten(model)
    slots = parameter_slots(model, FAMILIES[model.config.family])
    held: dict[str, list[tuple[int, int, Source]]] = {}  # tensor -> leaf, row of a stack, which part
    for index, slot in enumerate(slots):
        for row, sources in enumerate(slot.sources):
            for source in sources:
                if source.name in changes:
                    held.setdefault(source.name, []).append((index, row, source))
    for name, places in held.items():
        places.sort(key=lambda place: place[2].rows or (0, 0))
        parts = [np.asarray(export_tensor(slots[i], row, source), np.float32) for i, row, source in places]
        changed = changes[name](np.concatenate(parts))
        start = 0
        for (index, row, source), part in zip(places, parts, strict=True):
            leaves[index] = _written(slots[index], leaves[index], row, source, changed[start : start + len(part)])
            start += len(part)
    copy: Decoder = jax.tree.unflatten(structure, leaves)
    return copy


def untie(model: Decoder) -> Decoder:
    """The same model with an output head of its own, if it had none."""
    if not model.config.tie_embeddings:
        return model
    config = model.config.replace(tie_embeddings=False)
    scanned = len(model.stack) > 0
    build = partial(Decoder, config, dtype=model.dtype, scan_layers=scanned)
    head = FAMILIES[config.family].tensors(config.blocks[0])["head"][0]
    copy = jax.eval_shape(build, jax.random.key(0))
    for name in ("embedding", "embedding_norm", "layer_inputs", "stack", "layers", "norm", "head_bias"):
        setattr(copy, name, getattr(model, name))
    assert copy.head is not None
    copy.head = nnx.Param(rearrange(model.embedding[...], head.pattern), axes=copy.head.get_metadata("axes"))
    return copy


def _written(slot: Slot, leaf: jax.Array, row: int, source: Source, values: np.ndarray) -> jax.Array:
    """A parameter with the part that a tensor holds of it replaced."""
    place = (row, *source.index()) if slot.stacked else source.index()
    new = source.load(values, source.sizes(slot.shape))
    return jax.device_put(leaf.at[place].set(jnp.asarray(new, leaf.dtype)), leaf.sharding)

"""Adapters on a whole model: adding them, finding them, merging them into the weights (LoRA, 2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from pallas_kernels.partial import accumulator
from streamjax.models.block import Block
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig
from streamjax.models.decoder import Decoder
from streamjax.models.lora.adapters import TARGETS, Adapter, pad_members
from streamjax.models.mixers.attention import Attention
from streamjax.models.quantisation import QuantisedKernel
from streamjax.models.quantising import refuse_quantised
from streamjax.parallel.mesh import shard_model

Shape = tuple[int, ...]
Ranks = Mapping[str, tuple[int, float]]  # target -> rank and alpha
# (target, layer, shape of a, shape of b) -> the two factors of an adapter
Factors = Callable[[str, int, Shape, Shape], tuple[Array, Array]]


def add_lora(model: Decoder, rank: int, alpha: float, targets: Iterable[str], key: Array) -> Decoder:
    """The model with an adapter on each of the targets, in all layers. Its outputs do not change: `B` starts at zero.

    Args:
      model: a model without adapters, in either layout; the same key gives both the same adapters.
      rank: of every adapter.
      alpha: the change of a projection is `(alpha / rank) A B`.
      targets: projections by name: "q", "k", "v", "o", and of the MLP "gate" (where it has one), "up" and "down".
      key: of the initial `A`, normal with variance 1 / fan-in.

    Adapters are float32 (float64 for a float64 model), and lie on the mesh that the model lies on.

    Raises:
      ValueError: a rank below 1, an alpha that is not positive, a target that the model does not have, or none; a model
        that has adapters.

    Example:
      >>> tuned = sj.add_lora(model, rank=4, alpha=8.0, targets=("q", "v"), key=jax.random.key(0))
      >>> bool(jnp.allclose(sj.forward(tuned, prompt), sj.forward(model, prompt)))
      True
    """
    check_lora(rank, alpha, targets := tuple(targets))
    known = {target: None for block in model.config.blocks for target in places(block)}
    for target in targets:
        if target not in known:
            raise ValueError(f"LoRA target {target!r}: this model's MLP has none; choose from {', '.join(known)}")
    initial = partial(_initial, adapter_dtype(model), key)
    return attach(model, {target: (rank, alpha) for target in targets}, initial)


def check_lora(rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    """Raise ValueError for what makes no sense on any model."""
    if rank < 1:
        raise ValueError(f"LoRA rank is {rank}: at least 1 is needed")
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha is {alpha}: it must be positive; twice the rank is common")
    if not targets:
        raise ValueError(f"no LoRA targets: choose from {', '.join(TARGETS)}")
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown LoRA target {target!r}: choose from {', '.join(TARGETS)}")


def merge_lora(model: Decoder) -> Decoder:
    """The model with every adapter added to the weights beside it, in their dtype: plain weights, the same logits.

    A model without adapters comes back as it is.

    Raises:
      ValueError: the weights are quantised.

    Example:
      >>> tuned = sj.add_lora(model, rank=4, alpha=8.0, targets=("q", "v"), key=jax.random.key(0))
      >>> sj.save_hf(sj.merge_lora(tuned), "tuned")  # a folder that transformers loads
    """
    if ranks_of(model):
        refuse_quantised(model, "adapters cannot be merged into them; save_lora writes adapters alone")
    copy = copy_of(model)
    for block, _ in _blocks(copy):
        for target, place in places(block.config).items():
            module, adapter = place.module_of(block), _adapter(block, target)
            if adapter is None:
                continue
            kernel = getattr(module, place.kernel)
            change = adapter.product()
            if place.members is not None:
                change = pad_members(change, kernel.shape[-2], place.members[0])
            merged = (kernel[...].astype(change.dtype) + change).astype(kernel[...].dtype)
            setattr(module, place.kernel, kernel.replace(merged))
            setattr(module, f"{target}_lora", None)
    return copy


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the weights of a target lie in a layer.

    module: the layer's module that has them, its "projections" or its "mlp". kernel: the attribute there. inputs: how
    many of the kernel's axes are input axes, the first ones. members: which part is meant of the kernel's last axis but
    one; None: all of the kernel.
    """

    module: str
    kernel: str
    inputs: int
    members: tuple[int, int] | None

    @property
    def path(self) -> str:
        """The kernel's place in a layer, as tables of tensors have it."""
        return f"{'mlp' if self.module == 'mlp' else 'mixer.projections'}.{self.kernel}"

    def module_of(self, block: Block) -> nnx.Module:
        """The module in a layer, or in a stack of layers."""
        if self.module == "mlp":
            assert block.mlp is not None
            return block.mlp
        assert isinstance(block.mixer, Attention)
        return block.mixer.projections

    def shapes(self, kernel: Shape, rank: int) -> tuple[Shape, Shape]:
        """Shapes of the factors for a kernel of one layer."""
        inputs, outputs = kernel[: self.inputs], kernel[self.inputs :]
        if self.members is not None:
            outputs = (*outputs[:-2], self.members[1] - self.members[0], outputs[-1])
        return (*inputs, rank), (rank, *outputs)


def places(config: BlockConfig) -> dict[str, Place]:
    """Every target that a layer has."""
    found: dict[str, Place] = {}
    if isinstance(config.mixer, AttentionConfig):
        key = config.mixer.query_members
        found = {
            "q": Place("projections", "qkv", 1, (0, key)),
            "k": Place("projections", "qkv", 1, (key, key + 1)),
            "v": Place("projections", "qkv", 1, (key + 1, key + 2)),
            "o": Place("projections", "out", 3, None),
        }
        for lacking in "v" if config.mixer.value_is_key else "kv" if config.mixer.keys_of is not None else "":
            del found[lacking]
    if not isinstance(config.mlp, DenseConfig):
        return found
    if config.mlp.gated:
        found |= {"gate": Place("mlp", "up", 1, (0, 1)), "up": Place("mlp", "up", 1, (1, 2))}
    else:
        found |= {"up": Place("mlp", "up", 1, (0, 1))}
    return found | {"down": Place("mlp", "down", 1, None)}


def adapter_of(model: Decoder, layer: int, target: str) -> Adapter | None:
    """The adapter on a target of one layer; a slice where it lies in the stack."""
    if layer >= model.stacked_layers:
        return _adapter(model.layers[layer - model.stacked_layers], target)
    row, column = divmod(layer, len(model.stack))
    return jax.tree.map(lambda leaf: leaf[row], _adapter(model.stack[column], target))


def ranks_of(model: Decoder) -> dict[str, tuple[int, float]]:
    """Rank and alpha of the model's adapters, by target; empty where it has none."""
    adapters = {target: _adapter(block, target) for block, _ in _blocks(model) for target in places(block.config)}
    return {target: (adapter.rank, adapter.alpha) for target, adapter in adapters.items() if adapter is not None}


def refuse_adapters(model: Decoder) -> None:
    """Raise ValueError if the model has adapters."""
    if ranks_of(model):
        raise ValueError(
            "the model has LoRA adapters: merge_lora adds them to its weights, save_lora writes them alone"
        )


def empty_adapters(model: Decoder, ranks: Ranks) -> Decoder:
    """The model with adapters of zeros: what a checkpoint is restored into."""
    dtype = adapter_dtype(model)
    return attach(model, ranks, lambda target, layer, a, b: (jnp.zeros(a, dtype), jnp.zeros(b, dtype)))


def attach(model: Decoder, ranks: Ranks, factors: Factors) -> Decoder:
    """The model with adapters of these ranks and alphas, their factors as given.

    Raises:
      ValueError: the model has adapters.
    """
    refuse_adapters(model)
    copy = copy_of(model)
    for block, layers in _blocks(copy):
        for target, (rank, alpha) in ranks.items():
            place = places(block.config).get(target)
            if place is None:  # a layer of another kind than those that have it
                continue
            module = place.module_of(block)
            kernel = getattr(module, place.kernel)
            axes = kernel.get_metadata("axes")
            shapes = place.shapes(kernel.shape[-len(axes) :], rank)
            made = [factors(target, layer, *shapes) for layer in layers]
            a, b = jax.tree.map(lambda *x: jnp.stack(x), *made) if kernel.ndim > len(axes) else made[0]
            adapter = Adapter(a, b, alpha, (axes[: place.inputs], axes[place.inputs :]))
            setattr(module, f"{target}_lora", _beside(kernel, adapter))
    return copy


def adapter_dtype(model: Decoder) -> jnp.dtype:
    """In which adapters are made for a model."""
    return accumulator(model.dtype)


def _initial(dtype: jnp.dtype, key: Array, target: str, layer: int, a: Shape, b: Shape) -> tuple[Array, Array]:
    key = jax.random.fold_in(jax.random.fold_in(key, layer), TARGETS.index(target))
    return jax.random.normal(key, a, dtype) / math.sqrt(math.prod(a[:-1])), jnp.zeros(b, dtype)


def _adapter(block: Block, target: str) -> Adapter | None:
    place = places(block.config).get(target)
    return None if place is None else getattr(place.module_of(block), f"{target}_lora")


def _blocks(model: Decoder) -> Iterator[tuple[Block, range]]:
    """The model's modules of layers, stacked and single, and the indices of the layers in each."""
    stacked = model.stacked_layers
    for position, block in enumerate(model.stack):
        yield block, range(position, stacked, len(model.stack))
    for index, block in enumerate(model.layers, stacked):
        yield block, range(index, index + 1)


def _beside(kernel: nnx.Param | QuantisedKernel, adapter: Adapter) -> Adapter:
    """The adapter on the mesh where its projection's weights lie."""
    value = jax.tree.leaves(kernel)[0]
    sharding = None if isinstance(value, jax.core.Tracer) else getattr(value, "sharding", None)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return shard_model(adapter, sharding.mesh)
    return adapter


def copy_of(model: Decoder) -> Decoder:
    """The model in modules of its own; the arrays are shared."""
    leaves, structure = jax.tree.flatten(model)
    copy: Decoder = jax.tree.unflatten(structure, leaves)
    return copy

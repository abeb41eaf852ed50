"""How long a training step takes on a mesh, by its operations and by the bytes that cross its axes.

The model is coarse: it ranks meshes, and predicts no step time. Keys that go round a ring are taken to do so beside
attention. All else is added up, as a TPU's compiler schedules it: weights that fsdp gathers, sums over `tensor`, the
zigzag layout's exchange, and the gradient's reduction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from streamjax.models.config import (
    AttentionConfig,
    BlockConfig,
    DenseAndExpertsConfig,
    ExpertsConfig,
    LatentAttentionConfig,
    ModelConfig,
)
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK
from streamjax.training.mesh_choice.chips import Chip

AXES = ("data", "fsdp", "context", "tensor")  # from devices far apart to near ones, as `make_mesh` lays them out
EFFICIENCY = 0.5  # share of the peak that products reach
HOP = 1e-6  # seconds until a message has come to the next device
_PASSES = {"full": 3.0, "remat": 4.0, "layer": 4.04, "chunk": 4.08}  # forward passes that a step's operations make
_ITEM, _WIDE = 2, 4  # bytes of an activation, and of a weight or its gradient


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step of a model asks for, whatever the mesh.

    Attributes:
      matrix: parameters that each token is multiplied with.
      layers: parameters of the layers, all of them.
      ends: parameters of the embedding and the output.
      pairs: floating-point operations of attention forwards, of all rows.
      exchanged: bytes of keys and values of the layers that attend to all tokens, all rows.
      heads: channels of queries of these layers, added up.
      count: layers.
      width: channels of the model.
    """

    matrix: int
    layers: int
    ends: int
    pairs: float
    exchanged: float
    heads: int
    count: int
    width: int

    @classmethod
    def from_config(cls, config: ModelConfig, rows: int, length: int) -> Work:
        """Of `rows` sequences of `length` tokens."""
        ends = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
        matrix = config.vocab_size * config.d_model + sum(_used(block, config.d_model) for block in config.blocks)
        pairs = exchanged = 0.0
        heads = 0
        for block in config.blocks:
            mixer = block.mixer
            if not isinstance(mixer, AttentionConfig | LatentAttentionConfig):
                continue
            reach = (mixer.window or mixer.chunk) if isinstance(mixer, AttentionConfig) else None
            seen = length / 2 if reach is None else min(reach, length / 2)
            pairs += 4.0 * mixer.num_heads * mixer.head_dim * rows * length * seen
            if reach is None:
                exchanged += 2.0 * _ITEM * mixer.num_kv_heads * mixer.head_dim * rows * length
                heads += mixer.num_heads * mixer.head_dim
        layers = config.parameter_count - ends
        return cls(matrix, layers, ends, pairs, exchanged, heads, config.num_layers, config.d_model)


def _used(block: BlockConfig, width: int) -> int:
    """Parameters of a layer that a token meets: of experts the chosen ones."""
    count, mlp = block.parameter_count(width), block.mlp
    experts = mlp.experts if isinstance(mlp, DenseAndExpertsConfig) else mlp
    if isinstance(experts, ExpertsConfig):
        count -= (experts.num_experts - experts.experts_per_token) * experts.expert_parameters(width)
    return count


def step_seconds(
    work: Work,
    axes: Mapping[str, int],
    chip: Chip,
    *,
    rows: int,
    length: int,
    method: str,
    segment: int = 1,
    keep_attention: bool = False,
    microbatches: int = 1,
) -> dict[str, float]:
    """Seconds of a step by what they go to; their sum is the step.

    Args:
      work: of all the step's rows.
      axes: devices along each of `AXES`.
      chip: each device.
      rows, length: of the step.
      method, segment, keep_attention: of `loss_and_grad`.
      microbatches: into which the rows are dealt out, one after the other.
    """
    devices = math.prod(axes[name] for name in AXES)
    data, fsdp, context, tensor = (axes[name] for name in AXES)
    inner = {name: math.prod(axes[after] for after in AXES[place + 1 :]) for place, name in enumerate(AXES)}

    def crossing(name: str, received: float, turns: float) -> float:
        """Seconds until a device has received so many bytes along an axis, in so many rounds of it."""
        if axes[name] == 1:
            return 0.0
        wait = turns * (axes[name] - 1) * HOP
        return received / chip.bandwidth(axes[name], inner[name], devices) + wait

    tokens = rows * length / (data * fsdp * context)  # of a device, and of those along tensor together
    passes = _PASSES[method] + (1.0 if segment > 1 else 0.0)
    peak = EFFICIENCY * chip.flops * devices
    linear = passes * 2.0 * work.matrix * rows * length / peak
    attention = (passes - keep_attention) * work.pairs / peak
    read = 3 * microbatches * _ITEM * (work.layers + work.ends) / tensor / chip.memory_bandwidth
    linear = max(linear, read)

    size = (work.layers + work.ends) / tensor
    chunks = math.ceil(length / DEFAULT_CHUNK)
    staged = method == "chunk" and context > 1  # each device along context has a part of the layers
    if staged:
        idle = (chunks + context - 1) / chunks
        linear, attention = linear * idle, attention * idle
        size = (work.layers / context + work.ends) / tensor
    # The chunk order has every layer anew for each chunk, but a stage's, which are few.
    times = microbatches * (chunks if method == "chunk" and not staged else 1)
    gathers = times * 2 * _ITEM * size * (fsdp - 1) / fsdp
    gather = crossing("fsdp", gathers, 2.0 * times * work.count)
    scatter = crossing("fsdp", microbatches * _WIDE * size * (fsdp - 1) / fsdp, microbatches * work.count)
    own = work.exchanged / (data * fsdp * context * tensor)  # a device's own keys and values
    rounds = 2 if keep_attention else 3  # of keys: forwards, perhaps again, and backwards, with two gradients
    ring = crossing(
        "context", own * ((context - 1) * (rounds + 2) + context * 2), float(rounds * microbatches * work.count)
    )
    stages = 0.0
    if staged:  # activations and their cotangents, to the next stage and to the devices that have the ends
        handed = 6.0 * _ITEM * rows * length / (data * fsdp) * work.width
        ring, stages = 0.0, crossing("context", handed, 6.0 * microbatches * chunks / (context - 1))
    laid = 8 * _ITEM * tokens * work.heads / tensor * min(1, context - 1) * (not staged)
    zigzag = crossing("context", laid, 8.0 * microbatches * work.count / max(1, context - 1))
    summed = 2 * _WIDE * size / fsdp * microbatches
    reduce = sum(crossing(name, summed * (axes[name] - 1) / axes[name], 2.0) for name in ("data", "context"))
    sums = 6 * work.count * 2 * _ITEM * tokens * work.width * (tensor - 1) / tensor
    return {
        "products": linear,
        "attention": attention,
        "ring beyond attention": max(0.0, ring - attention),
        "gathered weights": gather,
        "zigzag": zigzag,
        "stages": stages,
        "gradients": scatter + reduce,
        "tensor": crossing("tensor", sums, 6.0 * microbatches * work.count),
    }

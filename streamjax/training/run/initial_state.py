"""What a run starts from: its mesh, and the first state of new weights, a pretrained model, or adapters on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from streamjax.data import Tokenizer
from streamjax.data.text.tokenizers import require_tokenizer
from streamjax.models.conversion import convert_layers, mark_converted
from streamjax.models.decoder import Decoder
from streamjax.models.files.checkpoint import load
from streamjax.models.files.description import describe_model
from streamjax.models.lora.attaching import add_lora
from streamjax.models.nonfinite import damaged_weights
from streamjax.parallel.mesh import build_sharded
from streamjax.parallel.multiprocess import gather_json
from streamjax.streaming.state import StreamState, init_state
from streamjax.training.backprop.planning.method_choice import device_memory_bytes
from streamjax.training.mesh_choice.chips import chip_of
from streamjax.training.mesh_choice.search import choose_mesh
from streamjax.training.run.config import MeshConfig, TrainConfig
from streamjax.training.run.optimizer import make_optimizer
from streamjax.training.run.state import TrainState, new_state


def mesh_sizes(config: TrainConfig) -> tuple[MeshConfig, str]:
    """Devices along each axis, and a line that says what was chosen; no line where nothing was.

    Raises:
      ValueError: with "auto" a device that is not known, or a run that fits the devices in no way.
    """
    if config.mesh != "auto":
        return config.mesh, ""
    devices, first = jax.device_count(), jax.local_devices()[0]
    memory = min(gather_json(device_memory_bytes()))
    if first.platform == "cpu":  # virtual devices share the machine's memory
        memory //= jax.local_device_count()
    model = config.model if config.init_from is None else describe_model(config.init_from)
    assert model is not None
    options = config.backprop.options()
    known = {"chunk_size": options["chunk_size"]}
    if config.backprop.method in ("layer", "chunk"):
        known |= {name: options[name] for name in ("segment", "offload", "offload_fraction")}
        if known["offload_fraction"] == "auto":  # measured later, for the mesh that is chosen here
            known["offload_fraction"] = 1.0
    found = choose_mesh(
        model,
        devices,
        chip_of(first.device_kind),
        rows=config.data.batch_size,
        length=config.data.seq_len,
        method=config.backprop.method,
        microbatches=config.optimizer.accumulation,
        memory_bytes=memory,
        stacked=config.scan_layers,
        platform=first.platform,
        dtype=config.dtype,
        **known,
    )
    return MeshConfig(**found.axes), f"mesh: {found.describe()}"


def initial_state(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh | None) -> TrainState:
    """The state before the first step, each array made or read in its place on the mesh.

    Raises:
      ValueError: the tokenizer has more tokens than the model, or the model of `init_from` cannot be read, has weights
        that are not finite, no place for the adapters, or layers that cannot be changed.
    """
    optimizer = make_optimizer(config.optimizer, config.steps)
    dtype, skipping = jnp.dtype(config.dtype), config.optimizer.skip_nonfinite > 0
    if config.init_from is None:
        model_config = config.model
        assert model_config is not None
        _check_vocabulary(model_config.vocab_size, tokenizer)

        def build(key: jax.Array) -> TrainState:
            model = Decoder(
                model_config, key, dtype=dtype, param_dtype=jnp.dtype(jnp.float32), scan_layers=config.scan_layers
            )
            return new_state(model, optimizer, new_stream(config, model), skipping=skipping)

        return build_sharded(build, mesh, jax.random.key(config.seed))

    lora = config.lora
    model = load(config.init_from, dtype if lora.rank else jnp.float32, mesh, config.scan_layers, config.weights)
    if damage := damaged_weights(model):
        raise ValueError(f"config.init_from={config.init_from}: {damage}: the weights are damaged")
    model.dtype = dtype
    _check_vocabulary(model.config.vocab_size, tokenizer)
    missing = f"config.init_from={config.init_from}: set config.data.tokenizer to its tokenizer's folder"
    require_tokenizer(tokenizer, model.config.vocab_size, missing)
    if lora.rank:
        model = add_lora(model, lora.rank, lora.scale, lora.targets, jax.random.key(config.seed))
    distill = config.distill
    if distill.layers:
        model = convert_layers(
            model, distill.layers, recurrent=distill.recurrent, window=distill.window, sinks=distill.sinks,
            key=jax.random.key(config.seed),
        )  # fmt: skip
        if distill.trained != "all":
            model = mark_converted(model, distill.layers, recurrent_only=distill.trained == "recurrent")
    return build_sharded(
        lambda model: new_state(model, optimizer, new_stream(config, model), config.trainable, skipping), mesh, model
    )


def new_stream(config: TrainConfig, model: Decoder) -> StreamState | None:
    """Streams that have seen nothing, one a row of a batch; None in ordinary training."""
    if not config.backprop.carry_state:
        return None
    return init_state(model, config.backprop.built_cache(), config.data.batch_size)


def _check_vocabulary(size: int, tokenizer: Tokenizer) -> None:
    needed = tokenizer.text_vocab_size
    if size < needed:
        raise ValueError(f"the model's vocab_size is {size}; tokenizer {tokenizer.name!r} needs {needed}")

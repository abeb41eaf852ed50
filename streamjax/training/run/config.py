"""What a training run is: one typed, frozen description."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

from flax import nnx

from streamjax.attention.context.sequence import Exchange
from streamjax.data import DataConfig
from streamjax.field_checks import Count, Fraction, Interval, Positive, Seed, Size, check_fields
from streamjax.kv.presets import parse_preset, preset
from streamjax.kv.presets.registry import Built
from streamjax.models.config import ModelConfig, UniformConfig
from streamjax.models.conversion import ConvertedParam
from streamjax.models.lora.adapters import LoRAParam
from streamjax.models.lora.attaching import check_lora
from streamjax.models.rounding import Weights
from streamjax.training.backprop.loss_and_grad import Method, check_free, check_keeping
from streamjax.training.backprop.planning.memory_model import DEFAULT_CHUNK
from streamjax.training.backprop.planning.method_choice import WHOLE_METHODS
from streamjax.training.backprop.planning.shared_sequences import shared_chunk
from streamjax.training.backprop.trainable_parameters import Trainable
from streamjax.training.diloco.config import DiLoCoConfig
from streamjax.training.distillation.config import DistillConfig
from streamjax.training.elimination.config import LeMoConfig
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.objectives.dpo import DPO
from streamjax.training.objectives.grpo import GRPO
from streamjax.training.objectives.objective import CrossEntropy
from streamjax.training.pipeline.paths import PipelineConfig
from streamjax.training.post_training.rollouts import RolloutConfig
from streamjax.training.run.optimizer import OptimizerConfig

Axis = Annotated[int, Interval(-1, 2**31 - 1)]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, all devices together; one may be -1 for those that are left. All 1: one device.

    `data` and `fsdp` split the rows of a batch, `context` each row's tokens; see `streamjax.parallel.make_mesh`.
    `replica` is for `diloco`, `stage` splits the layers (`pipeline`).
    """

    data: Axis = 1
    fsdp: Axis = 1
    tensor: Axis = 1
    context: Axis = 1
    expert: Axis = 1
    replica: Axis = 1
    stage: Axis = 1

    def __post_init__(self) -> None:
        check_fields(self)
        for field in dataclasses.fields(self):
            if getattr(self, field.name) == 0:
                raise ValueError(f"MeshConfig.{field.name} is 0: it must be a number of devices, or -1 for all others")


@dataclasses.dataclass(frozen=True)
class BackpropConfig:
    """How the gradient of a step is made; see `streamjax.training.loss_and_grad`.

    All but `carry_state` and `cache` choose between memory and time; the gradient is the same.

    Attributes:
      method: what is kept for the backward pass, and in which order it runs; one of `streamjax.training.METHODS`.
        "auto" takes the fastest that the device's memory allows, and chooses `segment`, the offload and
        `keep_attention` with it.
      chunk_size: tokens of a chunk, where a sequence is cut into chunks; 2048, or all of a shorter one, where None.
      segment: layers from one kept input to the next, where the method keeps layers' inputs; those between are
        computed again.
      offload: "host" moves what is kept a layer to the host's memory; None leaves it on the device.
      offload_fraction: the share of it that is moved, 0 to 1; "auto" is as much as costs no time, by what is measured
        of the device and its link to the host when the run begins.
      context_exchange: how devices along the mesh axis `context` come to each other's keys in full attention: "ring",
        "gather", or "auto", which gathers while that takes no more than 256 MiB.
      keep_attention: with "remat" and "layer", keep what attention found as well, as much memory again: then attention
        runs forwards once and not twice.
      carry_state: train on streams: each row of a batch is read with the KV cache that the batch before it left. See
        `streamjax.training.streaming_loss_and_grad`, which has an order of its own; only `chunk_size` counts there.
      cache: the cache of these streams, by the name and options of a preset: "streaming_llm:sinks=4,window=1020".
    """

    method: Method = "full"
    chunk_size: Size | None = None
    segment: Size = 1
    offload: Literal["host"] | None = None
    offload_fraction: Fraction | Literal["auto"] = 1.0
    context_exchange: Exchange = "auto"
    keep_attention: bool = False
    carry_state: bool = False
    cache: str = "streaming_llm"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method == "auto":
            check_free(self.segment, self.offload, self.keep_attention)
        if self.offload_fraction == "auto" and self.offload is None:
            raise ValueError('BackpropConfig.offload_fraction is "auto", and nothing is moved: set offload to "host"')
        if self.keep_attention:
            check_keeping(self.method, self.segment)
        self.built_cache()  # so that a wrong name or option is told
        for name in ("method", "segment", "offload"):
            value, default = getattr(self, name), getattr(BackpropConfig, name)
            if self.carry_state and value != default:
                raise ValueError(
                    f"BackpropConfig.{name} is {value!r}: carry_state has an order of its own, leave it at {default!r}"
                )

    def built_cache(self) -> Built:
        """The cache that `cache` names, for all layers or one a layer."""
        name, options = parse_preset(self.cache)
        return preset(name, **options)

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `loss_and_grad`."""
        names = ("method", "chunk_size", "segment", "offload", "offload_fraction", "context_exchange", "keep_attention")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters on a pretrained model (2106.09685): with a rank above 0 they are trained, and nothing else is.

    Attributes:
      rank: of every adapter; 0 trains all weights instead.
      alpha: an adapter's part is scaled by alpha / rank; twice the rank where None.
      targets: projections with an adapter: "q", "k", "v", "o", "gate", "up", "down".
    """

    rank: Count = 0
    alpha: Positive | None = None
    targets: tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rank:
            check_lora(self.rank, self.scale, self.targets)

    @property
    def scale(self) -> float:
        """`alpha`, as `sj.add_lora` takes it."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def trainable(self) -> Trainable:
        """The type of parameters that are trained."""
        return LoRAParam if self.rank else nnx.Param


@dataclasses.dataclass(frozen=True)
class SnapshotConfig:
    """Snapshots in the memory of the machines of a run, from which it goes on without reading the disk.

    Attributes:
      interval: steps from one to the next; none where 0.
      group: machines of a group, of which each codes a part of what the others hold.
      lost: machines that a group may lose at once.
      keep_minutes: how long they are kept for a run that has died.
    """

    interval: Count = 0
    group: Size = 8
    lost: Count = 1
    keep_minutes: Positive = 60.0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
      name: of the run, for its model card and its metrics.
      model: the architecture of a new model, flat or as a list of blocks; None with `init_from`.
      data: what is read.
      steps: optimizer steps.
      init_from: a Hugging Face folder, a .gguf file or a streamjax checkpoint to start from; None: random weights.
      objective: what is minimised: `CrossEntropy()` on text and conversations, `DPO()` on preferences, `GRPO()` on
        answers that the model writes to prompts, `Distillation()` on text with a teacher.
      reference: where DPO's log-probabilities under the model of `init_from` come from: "stored" computes them once for
        all pairs and keeps them on disk, "base" at every step, from the weights below the adapters.
      rollouts: how GRPO gets answers and their rewards.
      optimizer: how weights follow gradients.
      backprop: how gradients are made, and what memory that takes.
      lora: adapters to train on the weights of `init_from`, in place of these weights.
      weights: "int8" or "int4" quantises the weights below the adapters (QLoRA, 2305.14314); as they are where None.
      dtype: of activations; master weights and optimizer state are float32. Weights that adapters leave as they are
        have this dtype, too.
      scan_layers: one compiled body for repeating layers; compiles fast, and a little slower to run on a CPU.
      mesh: how the run is spread over devices; "auto" takes the fastest way by a model of a step's costs
        (`streamjax.training.choose_mesh`) over all devices that there are.
      distill: the teacher of `Distillation`, and which layers of `init_from` get other token mixers.
      pipeline: how microbatches, `optimizer.accumulation` of them, go through the stages along `mesh.stage`.
      diloco: replicas that train apart and exchange little; ordinary training with 0 replicas.
      lemo: how many of a row's tokens layers compute; all where `lemo.share` is 1.0.
      seed: of the initial weights.
      log_interval: steps from one line of metrics to the next.
      eval_interval: steps from one evaluation to the next; there is one at the end in any case.
      eval_batches: batches of an evaluation; all of the validation split where it has fewer.
      checkpoint_interval: steps from one checkpoint to the next.
      keep_checkpoints: how many of the newest stay.
      checkpoint_copies: an address to which each checkpoint is copied beside the steps ("gs://bucket/runs/mine", or
        whatever else fsspec reaches); a workdir without checkpoints goes on from there.
      snapshots: what is kept in memory between two checkpoints.
    """

    name: str
    model: UniformConfig | ModelConfig | None
    data: DataConfig
    steps: Size
    init_from: str | None = None
    objective: CrossEntropy | DPO | GRPO | Distillation = dataclasses.field(default_factory=CrossEntropy)
    reference: Literal["stored", "base"] = "stored"
    rollouts: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    backprop: BackpropConfig = dataclasses.field(default_factory=BackpropConfig)
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    weights: Weights | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    mesh: MeshConfig | Literal["auto"] = dataclasses.field(default_factory=MeshConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
    diloco: DiLoCoConfig = dataclasses.field(default_factory=DiLoCoConfig)
    lemo: LeMoConfig = dataclasses.field(default_factory=LeMoConfig)
    seed: Seed = 0
    log_interval: Size = 10
    eval_interval: Size = 500
    eval_batches: Size = 20
    checkpoint_interval: Size = 500
    keep_checkpoints: Size = 3
    checkpoint_copies: str | None = None
    snapshots: SnapshotConfig = dataclasses.field(default_factory=SnapshotConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.model is None) == (self.init_from is None):
            raise ValueError("TrainConfig needs either model (a new one) or init_from (a path), and not both")
        if self.lora.rank and self.init_from is None:
            raise ValueError(
                f"lora.rank is {self.lora.rank}, and adapters need a pretrained model: set init_from to its folder "
                "and model to none"
            )
        if self.weights and not self.lora.rank:
            raise ValueError(
                f"weights is {self.weights!r}, and quantised weights are not trained: set lora.rank to train adapters "
                "over them, or weights to none"
            )
        if self.data.batch_size % self.optimizer.accumulation:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of optimizer.accumulation "
                f"{self.optimizer.accumulation}"
            )
        chunk_size = self.backprop.chunk_size
        if chunk_size is not None and chunk_size > self.data.seq_len:
            raise ValueError(f"backprop.chunk_size {chunk_size} is more than data.seq_len {self.data.seq_len}")
        if self.backprop.carry_state:
            self._check_streams()
        self._check_objective()
        self._check_teacher()
        self._check_replicas()
        self._check_stages()
        self._check_elimination()
        self.check_context(1 if self.mesh == "auto" else self.mesh.context)

    def _check_objective(self) -> None:
        """Whether the data and the rows of a batch fit the objective."""
        name = type(self.objective).__name__
        text = ("text", "conversations")
        formats = {"DPO": ("preferences",), "GRPO": ("prompts",)}.get(name, text)
        if self.data.format not in formats:
            raise ValueError(
                f"objective {name} needs data.format {' or '.join(map(repr, formats))}, not {self.data.format!r}"
            )
        rows, parts = self.data.batch_size, self.optimizer.accumulation * self.objective.rows
        if rows % parts:
            raise ValueError(f"data.batch_size {rows} is no multiple of {parts}: {name} has pairs in each microbatch")
        if self.reference == "base" and not self.lora.rank:
            raise ValueError('reference is "base", the weights below adapters: set lora.rank, or reference to "stored"')
        if isinstance(self.objective, GRPO):
            if rows % self.rollouts.group_size:
                raise ValueError(
                    f"data.batch_size {rows} is no multiple of rollouts.group_size {self.rollouts.group_size}"
                )
            if self.rollouts.max_new_tokens >= self.data.seq_len:
                raise ValueError(
                    f"rollouts.max_new_tokens {self.rollouts.max_new_tokens} leaves no room for a prompt in "
                    f"data.seq_len {self.data.seq_len}"
                )

    @property
    def trainable(self) -> Trainable:
        """The type of parameters that are trained."""
        if self.lora.rank or not self.distill.layers or self.distill.trained == "all":
            return self.lora.trainable
        return ConvertedParam

    def _check_teacher(self) -> None:
        """Whether the objective has the teacher that it needs, and layers can be changed as the run says."""
        distill, learns = self.distill, isinstance(self.objective, Distillation)
        if learns and distill.teacher is None:
            raise ValueError("objective Distillation learns from a teacher: set distill.teacher to its folder")
        if learns and self.backprop.carry_state:
            raise ValueError(
                "objective Distillation has a teacher that reads whole rows, and backprop.carry_state reads streams: "
                "set it to false"
            )
        if isinstance(self.objective, Distillation) and self.objective.matches == "layers" and not distill.layers:
            raise ValueError('objective Distillation(matches="layers") aligns layers: set distill.layers')
        if distill.layers and self.init_from is None:
            raise ValueError("distill.layers are those of a pretrained model: set init_from to its folder")
        if distill.layers and self.lora.rank:
            raise ValueError(f"distill.layers are trained themselves: set lora.rank to 0, not {self.lora.rank}")

    def _check_replicas(self) -> None:
        """Whether replicas can train as this run says."""
        replicas = self.diloco.replicas
        if self.mesh == "auto":
            if replicas:
                raise ValueError(
                    f'mesh is "auto", and diloco.replicas {replicas} need a mesh of their own: give its sizes'
                )
            return
        if not replicas:
            if self.mesh.replica != 1:
                raise ValueError(f"mesh.replica is {self.mesh.replica}: it is for replicas, set diloco.replicas, too")
            return
        rows, parts = self.data.batch_size, replicas * self.optimizer.accumulation
        if rows % parts:
            raise ValueError(
                f"data.batch_size {rows} is not a multiple of {parts}: diloco.replicas times optimizer.accumulation"
            )
        if not isinstance(self.objective, CrossEntropy):
            name = type(self.objective).__name__
            raise ValueError(f"diloco.replicas is {replicas}, and objective {name} trains one model: set it to 0")
        if self.backprop.carry_state:
            raise ValueError(
                f"diloco.replicas is {replicas}, and backprop.carry_state trains one model: set either off"
            )

    def _check_stages(self) -> None:
        """Whether a pipeline can train as this run says; what only the model and the devices tell is checked later."""
        stages = 1 if self.mesh == "auto" else self.mesh.stage
        if stages == 1:
            if self.pipeline != PipelineConfig():
                raise ValueError("pipeline says how stages are gone through, and mesh.stage is 1: set mesh.stage, too")
            return
        assert self.mesh != "auto"
        others = [name for name in ("fsdp", "context", "expert", "replica") if getattr(self.mesh, name) != 1]
        if others:
            raise ValueError(
                f"mesh.{others[0]} is {getattr(self.mesh, others[0])}: mesh.stage goes with data and tensor only"
            )
        if not self.scan_layers:
            raise ValueError(f"mesh.stage is {stages}, and stages have parts of stacked layers: set scan_layers=true")
        if self.backprop.method not in ("full", "remat", "auto"):
            raise ValueError(f'backprop.method is {self.backprop.method!r}: with mesh.stage use "full" or "remat"')
        if self.backprop.carry_state:
            raise ValueError(
                f"backprop.carry_state reads streams in one piece, and mesh.stage is {stages}: set it to 1"
            )
        if not isinstance(self.objective, CrossEntropy):
            name = type(self.objective).__name__
            raise ValueError(f"objective {name} is not for pipelines, and mesh.stage is {stages}: use other axes")

    def _check_elimination(self) -> None:
        """Whether layers can leave tokens out as this run says."""
        share, block = self.lemo.share, self.lemo.block
        if share == 1.0:
            return
        say = f"lemo.share is {share}, and"
        if self.backprop.method not in WHOLE_METHODS or self.backprop.carry_state:
            raise ValueError(
                f"{say} layers choose from whole rows: set backprop.method to "
                f"{' or '.join(map(repr, reversed(WHOLE_METHODS)))}, and carry_state to false"
            )
        if self.data.seq_len % block:
            raise ValueError(f"{say} data.seq_len {self.data.seq_len} is no multiple of lemo.block {block}")
        if isinstance(self.objective, GRPO | Distillation) or self.diloco.replicas:
            what = "diloco.replicas" if self.diloco.replicas else f"objective {type(self.objective).__name__}"
            raise ValueError(f"{say} {what} computes all tokens: set lemo.share to 1.0")
        for name in ("context", "stage", "expert"):
            if self.mesh == "auto" or getattr(self.mesh, name) != 1:
                given = 'mesh "auto"' if self.mesh == "auto" else f"mesh.{name} {getattr(self.mesh, name)}"
                raise ValueError(f"{say} {given} does not go with it: give mesh.data, mesh.fsdp or mesh.tensor")

    def check_context(self, devices: int, model: ModelConfig | UniformConfig | None = None) -> None:
        """Raise ValueError for what cannot be trained with sequences over so many devices along `mesh.context`.

        model: what a folder says of a pretrained one; None: that is not known yet.
        """
        if devices <= 1:
            return
        if self.data.seq_len % devices:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is not a multiple of mesh.context {devices}: each device along it "
                "has an equal part of every sequence"
            )
        if self.backprop.carry_state:
            raise ValueError(
                f"backprop.carry_state reads streams in chunks, and mesh.context {devices} splits whole sequences: "
                "use the other mesh axes"
            )
        method, model = self.backprop.method, model or self.model
        if method in (*WHOLE_METHODS, "auto"):
            return
        shared_chunk(model, method, self.data.seq_len, self.backprop.chunk_size or DEFAULT_CHUNK, devices)

    def _check_streams(self) -> None:
        if self.data.packing != "streams":
            raise ValueError(
                f'backprop.carry_state needs rows that go on in the next batch: set data.packing to "streams", '
                f"not {self.data.packing!r}"
            )
        if self.optimizer.accumulation != 1:
            raise ValueError(
                f"backprop.carry_state reads each batch in one piece: set optimizer.accumulation to 1, not "
                f"{self.optimizer.accumulation}"
            )
        built = self.backprop.built_cache()
        ends = [cache.capacity for cache in (built if isinstance(built, tuple) else (built,))]
        capacity = min((end for end in ends if end is not None), default=None)
        length = max(self.steps, self.eval_batches) * self.data.seq_len
        if capacity is not None and capacity < length:
            raise ValueError(
                f"backprop.cache {self.backprop.cache!r} ends after {capacity} tokens and the streams after {length}: "
                'use one without an end, such as "streaming_llm"'
            )

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values, as they come back from JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        values["objective"]["type"] = type(self.objective).__name__
        if self.distill.recurrent is not None:
            values["distill"]["recurrent"]["type"] = self.distill.recurrent.type_name
        return values

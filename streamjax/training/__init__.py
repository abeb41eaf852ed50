"""Training: losses, gradients, the optimizer, and the loop that runs a configuration."""

from streamjax.training.backprop.log_probs import token_log_probs
from streamjax.training.backprop.loss_and_grad import METHODS, loss_and_grad
from streamjax.training.backprop.planning.memory_model import Memory, estimate
from streamjax.training.backprop.planning.method_choice import Choice, choose, device_memory_bytes
from streamjax.training.backprop.streaming_loss import streaming_loss, streaming_loss_and_grad
from streamjax.training.diloco.config import DiLoCoConfig
from streamjax.training.distillation.config import DistillConfig
from streamjax.training.elimination.config import LeMoConfig
from streamjax.training.mesh_choice.chips import CHIPS, Chip, chip_of
from streamjax.training.mesh_choice.search import MeshChoice, choose_mesh
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.objectives.dpo import DPO
from streamjax.training.objectives.grpo import GRPO, group_advantages
from streamjax.training.objectives.objective import CrossEntropy, Objective
from streamjax.training.pipeline.gradient import pipeline_loss_and_grad
from streamjax.training.pipeline.paths import PipelineConfig
from streamjax.training.post_training.rewards import Answer
from streamjax.training.post_training.rollouts import RolloutConfig
from streamjax.training.run.config import BackpropConfig, LoRAConfig, MeshConfig, SnapshotConfig, TrainConfig
from streamjax.training.run.evaluation import evaluate
from streamjax.training.run.loop import RunStopped, train
from streamjax.training.run.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from streamjax.training.run.overrides import apply_overrides, describe
from streamjax.training.run.state import TrainState, new_state, shard_batch
from streamjax.training.run.step import accumulate_gradients, eval_step, make_train_step, streaming_eval_step

__all__ = [
    "CHIPS",
    "DPO",
    "GRPO",
    "METHODS",
    "Answer",
    "BackpropConfig",
    "Chip",
    "Choice",
    "CrossEntropy",
    "DiLoCoConfig",
    "DistillConfig",
    "Distillation",
    "LeMoConfig",
    "LoRAConfig",
    "Memory",
    "MeshChoice",
    "MeshConfig",
    "Objective",
    "OptimizerConfig",
    "PipelineConfig",
    "RolloutConfig",
    "RunStopped",
    "SnapshotConfig",
    "TrainConfig",
    "TrainState",
    "accumulate_gradients",
    "apply_overrides",
    "chip_of",
    "choose",
    "choose_mesh",
    "describe",
    "device_memory_bytes",
    "estimate",
    "eval_step",
    "evaluate",
    "group_advantages",
    "learning_rate_schedule",
    "loss_and_grad",
    "make_optimizer",
    "make_train_step",
    "new_state",
    "pipeline_loss_and_grad",
    "shard_batch",
    "streaming_eval_step",
    "streaming_loss",
    "streaming_loss_and_grad",
    "token_log_probs",
    "train",
]

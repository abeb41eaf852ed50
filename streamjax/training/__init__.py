"""Training: losses, gradients, the optimizer, and the loop that runs a configuration."""

from streamjax.training.backprop import METHODS, loss_and_grad
from streamjax.training.choice import Choice, choose, device_memory_bytes
from streamjax.training.config import BackpropConfig, LoRAConfig, MeshConfig, TrainConfig
from streamjax.training.dpo import DPO
from streamjax.training.grpo import GRPO, group_advantages
from streamjax.training.loop import RunStopped, evaluate, train
from streamjax.training.memory_model import Memory, estimate
from streamjax.training.objectives import CrossEntropy, Objective
from streamjax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from streamjax.training.overrides import apply_overrides, describe
from streamjax.training.scoring import token_log_probs
from streamjax.training.state import TrainState, new_state, shard_batch
from streamjax.training.step import accumulate_gradients, eval_step, make_train_step, streaming_eval_step
from streamjax.training.streaming_loss import streaming_loss, streaming_loss_and_grad

__all__ = [
    "DPO",
    "GRPO",
    "METHODS",
    "BackpropConfig",
    "Choice",
    "CrossEntropy",
    "LoRAConfig",
    "Memory",
    "MeshConfig",
    "Objective",
    "OptimizerConfig",
    "RunStopped",
    "TrainConfig",
    "TrainState",
    "accumulate_gradients",
    "apply_overrides",
    "choose",
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
    "shard_batch",
    "streaming_eval_step",
    "streaming_loss",
    "streaming_loss_and_grad",
    "token_log_probs",
    "train",
]

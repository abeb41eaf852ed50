"""Group relative policy optimisation: a chat model answers prompts, and what is rewarded becomes likelier.

    python -m benchmarks.training.post_training_data --folder=runs/data
    python -m train --config=configs/grpo.py --workdir=runs/grpo --config.init_from=MODEL --config.data.tokenizer=MODEL

MODEL is a folder of a chat model, such as SmolLM2-135M-Instruct. Records are prompts, here with the `reference` that an
answer is compared with (docs/data.md). `--config.rollouts.rewards="('regex:^[0-9]', 'my_rewards:politeness')"` names
others, your own functions among them. A batch is 2 prompts with 8 answers each. On the made data, digits to be
repeated, the reward rises (docs/training.md has the figures).
"""

from streamjax.data import DataConfig
from streamjax.training.objectives.grpo import GRPO
from streamjax.training.post_training.rollouts import RolloutConfig
from streamjax.training.run.config import LoRAConfig, TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="grpo",
        model=None,
        init_from="runs/SmolLM2-135M-Instruct",
        data=DataConfig(
            source="runs/data/grpo",
            format="prompts",
            packing="rows",
            truncation="drop",
            tokenizer="runs/SmolLM2-135M-Instruct",
            seq_len=40,
            batch_size=16,
        ),
        steps=48,
        objective=GRPO(kl=0.02),
        rollouts=RolloutConfig(
            rewards=("exact_match", "benchmarks.training.post_training_data:digits_in_place"),
            group_size=8,
            max_new_tokens=12,
            updates=2,
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, final_fraction=0.1, warmup_steps=4, weight_decay=0.0),
        lora=LoRAConfig(rank=16, targets=("q", "k", "v", "o", "gate", "up", "down")),
        log_interval=2,
        eval_interval=16,
        eval_batches=1,
        checkpoint_interval=8,
    )

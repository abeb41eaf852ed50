"""Direct preference optimisation: of two answers a chat model comes to prefer the chosen one.

    python -m benchmarks.training.post_training_data --folder=runs/data
    python -m train --config=configs/dpo.py --workdir=runs/dpo --config.init_from=MODEL --config.data.tokenizer=MODEL

MODEL is a folder of a chat model, such as SmolLM2-135M-Instruct. Records are prompts with a chosen and a rejected
answer (docs/data.md); `--config.data.source=` names your own. The log-probabilities under MODEL are computed once, and
kept on disk for other runs. A batch of 8 rows is 4 pairs. On the made data, where the shorter answer is preferred, 16
steps raise the margin of held-out pairs (docs/training.md has the figures).
"""

from streamjax.data import DataConfig
from streamjax.training.objectives.dpo import DPO
from streamjax.training.run.config import LoRAConfig, TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="dpo",
        model=None,
        init_from="runs/SmolLM2-135M-Instruct",
        data=DataConfig(
            source="runs/data/dpo",
            format="preferences",
            packing="rows",
            tokenizer="runs/SmolLM2-135M-Instruct",
            seq_len=64,
            batch_size=8,
        ),
        steps=16,
        objective=DPO(beta=0.1),
        optimizer=OptimizerConfig(learning_rate=2e-4, final_fraction=0.1, warmup_steps=2, weight_decay=0.0),
        lora=LoRAConfig(rank=16, targets=("q", "k", "v", "o", "gate", "up", "down")),
        log_interval=4,
        eval_interval=8,
        eval_batches=5,
        checkpoint_interval=8,
    )

"""Supervised fine-tuning: a chat model learns from conversations, on the assistant's tokens alone.

    python -m benchmarks.training.post_training_data --folder=runs/data
    python -m train --config=configs/sft.py --workdir=runs/sft --config.init_from=MODEL --config.data.tokenizer=MODEL

MODEL is a folder of a chat model, such as SmolLM2-135M-Instruct. Records are conversations, or prompts with completions
(docs/data.md); `--config.data.source=` names your own. Adapters of rank 16 on all projections are trained;
`--config.lora.rank=0` trains all weights, `--config.weights=int8` quantises those below the adapters. 60 steps of 512
tokens teach SmolLM2-135M to answer in JSON (docs/training.md has the figures).
"""

from streamjax.data import DataConfig
from streamjax.training.run.config import LoRAConfig, TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="sft",
        model=None,
        init_from="runs/SmolLM2-135M-Instruct",
        data=DataConfig(
            source="runs/data/sft",
            format="conversations",
            packing="pack",
            tokenizer="runs/SmolLM2-135M-Instruct",
            seq_len=256,
            batch_size=2,
        ),
        steps=60,
        optimizer=OptimizerConfig(learning_rate=5e-4, final_fraction=0.1, warmup_steps=5, weight_decay=0.0),
        lora=LoRAConfig(rank=16, targets=("q", "k", "v", "o", "gate", "up", "down")),
        log_interval=5,
        eval_interval=20,
        eval_batches=4,
        checkpoint_interval=20,
    )

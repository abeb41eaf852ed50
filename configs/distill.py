"""A student of a pretrained model: layers of attention become Gated DeltaNet, aligned one by one, then end to end.

    python -m train --config=configs/distill.py --workdir=runs/aligned --config.init_from=MODEL \\
        --config.distill.teacher=MODEL --config.data.tokenizer=MODEL
    python -m train --config=configs/distill.py --workdir=runs/distilled --config.init_from=runs/aligned/model \\
        --config.distill.teacher=MODEL --config.data.tokenizer=MODEL --config.objective.matches=predictions \\
        --config.optimizer.learning_rate=3e-4 --config.steps=100

MODEL is a folder of SmolLM2-135M, whose every fourth layer is changed; the recurrent mixers begin with the queries,
keys, values and output of the attention that they replace. The first run teaches each of them what that attention makes
of the same input (MOHAWK's second stage, 2408.10189), the second one the student's predictions (InfiniteVL,
2512.08829). `--config.distill.window=128` keeps a window beside the recurrent mixers (LoLCATs, 2410.10254); with
`--config.distill.recurrent=none`, too, the layers have windows alone. docs/training.md has what it led to.
"""

from streamjax.data import DataConfig
from streamjax.models.config import GatedDeltaConfig
from streamjax.training.distillation.config import DistillConfig
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="distill",
        model=None,
        init_from="runs/SmolLM2-135M-Instruct",
        data=DataConfig(tokenizer="runs/SmolLM2-135M-Instruct", seq_len=512, batch_size=2),
        steps=200,
        objective=Distillation(matches="layers"),
        distill=DistillConfig(
            teacher="runs/SmolLM2-135M-Instruct",
            layers=(5, 9, 13, 17, 21, 25),
            recurrent=GatedDeltaConfig(num_heads=9, num_groups=9, key_dim=64, value_dim=64),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=10, weight_decay=0.0),
        log_interval=5,
        eval_interval=100,
        eval_batches=4,
        checkpoint_interval=25,
    )

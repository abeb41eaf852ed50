"""A student of the demo's model: three of its four layers become Gated DeltaNet, aligned one by one, then end to end.

    python -m train --config=configs/distill.py --workdir=runs/aligned
    python -m train --config=configs/distill.py --workdir=runs/distilled --config.init_from=runs/aligned/model \\
        --config.objective.matches=predictions --config.distill.trained=all --config.optimizer.learning_rate=1e-3

InfiniteVL's shape (2512.08829): three layers of four keep a state of fixed size, and the fourth attends, in streams
through sinks and a window. The recurrent mixers begin with the queries, keys, values and output of the attention that
they replace. The first run teaches each of them what that attention makes of the same input (MOHAWK's second stage,
2408.10189), the second one the teacher's predictions. docs/training.md has what it leads to. Another teacher,
SmolLM2-135M for instance, needs its own names, layers and heads:

    --config.init_from=FOLDER --config.distill.teacher=FOLDER --config.data.tokenizer=FOLDER \\
        --config.distill.layers=5,9,13,17,21,25 --config.distill.recurrent.num_heads=9 \\
        --config.distill.recurrent.num_groups=9

`--config.distill.window=128` keeps a window beside the recurrent mixers (LoLCATs, 2410.10254); with
`--config.distill.recurrent=none`, too, the layers have windows alone.
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
        init_from="models/stdlib_byte",
        data=DataConfig(seq_len=512, batch_size=2),
        steps=200,
        objective=Distillation(matches="layers"),
        distill=DistillConfig(
            teacher="models/stdlib_byte",
            layers=(0, 1, 3),
            recurrent=GatedDeltaConfig(num_heads=4, num_groups=4, key_dim=64, value_dim=64),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, final_fraction=0.05, warmup_steps=10, weight_decay=0.0),
        eval_interval=100,
        eval_batches=10,
        checkpoint_interval=20,
    )

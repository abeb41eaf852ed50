"""The model of hsa_recall.py with full attention and RoPE in the place of windows and chunk memory, for comparison.

    python -m train --config=configs/dense_recall.py --workdir=runs/near --config.data.seq_len=256 \\
        --config.data.batch_size=32 --config.steps=400
    python -m train --config=configs/dense_recall.py --workdir=runs/dense_recall --config.model=none \\
        --config.init_from=runs/near/model

It learns the same task from the same rows, and loses it beyond the length of these rows. The shipped model had its
short rows in two runs of 200 steps.
"""

from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="dense_recall",
        model=UniformConfig(
            vocab_size=259,
            d_model=192,
            num_layers=4,
            num_heads=2,
            num_kv_heads=1,
            head_dim=96,
            mlp_dim=480,
            tie_embeddings=True,
            max_position=1024,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="recall", seq_len=1024, batch_size=8),
        steps=150,
        optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.05, warmup_steps=100, weight_decay=0.05),
        eval_interval=250,
        eval_batches=10,
        checkpoint_interval=100,
    )

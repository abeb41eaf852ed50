"""A byte-level model of 0.1 million parameters, trained for seconds: to see the whole chain work, and for the tests.

    python -m train --config=configs/tiny.py --workdir=runs/tiny

60 steps of 1,024 bytes take about ten seconds on 2 cores, most of them for compiling. The loss falls from 5.6 to 2.6
nats per byte, which is how often each byte occurs and a little more.
"""

from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="tiny",
        model=UniformConfig(
            vocab_size=259,
            d_model=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=128,
            tie_embeddings=True,
            max_position=128,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="builtin", seq_len=128, batch_size=8),
        steps=60,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=10),
        log_interval=5,
        eval_interval=30,
        eval_batches=4,
        checkpoint_interval=20,
    )

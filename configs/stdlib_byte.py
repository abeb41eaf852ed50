"""A byte-level model of 3.0 million parameters, trained on the built-in corpus (CPython's standard library).

    python -m train --config=configs/stdlib_byte.py --workdir=runs/stdlib_byte

The context is 512 bytes, and every row begins with BOS, as a stream does. 3,000 steps of 4,096 bytes are 1.7 passes
over 7.3 MB. Held-out bits per byte at the end: 1.38 on the validation split, 1.49 on the test split (the corpus of
Python 3.11.7). On 2 cores it trains at 7,000 bytes a second with the machine to itself, half an hour; beside other work
it took 65 minutes.
"""

from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="stdlib_byte",
        model=UniformConfig(
            vocab_size=259,
            d_model=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=704,
            tie_embeddings=True,
            max_position=512,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="builtin", seq_len=512, batch_size=8, packing="concat", bos_each_row=True),
        steps=3000,
        optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.05, warmup_steps=200, weight_decay=0.1),
        eval_interval=500,
        eval_batches=20,
        checkpoint_interval=200,
    )

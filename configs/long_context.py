"""A byte-level model trained on sequences of 32,768 bytes, by chunked backprop.

    python -m train --config=configs/long_context.py --workdir=runs/long_context

2.3 million parameters; two layers of three see 512 bytes, the third sees all. `--config.backprop.method=remat` trains
the same model with gradient checkpointing: the same losses, more memory. docs/long_context.md has the curve and the
peak of resident memory of a run on 2 cores.
"""

from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig
from streamjax.training.run.config import BackpropConfig, TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="long_context",
        model=UniformConfig(
            vocab_size=259,
            d_model=192,
            num_layers=6,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            mlp_dim=512,
            windows=(512, 512, None) * 2,
            tie_embeddings=True,
            max_position=32768,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="builtin", seq_len=32768, batch_size=1, packing="concat", bos_each_row=True),
        steps=40,
        optimizer=OptimizerConfig(learning_rate=3e-3, final_fraction=0.1, warmup_steps=5, weight_decay=0.1),
        backprop=BackpropConfig(method="layer", chunk_size=2048),
        scan_layers=True,
        log_interval=1,
        eval_interval=40,
        eval_batches=1,
        checkpoint_interval=10,
    )

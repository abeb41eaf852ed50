"""A small model with hierarchical sparse attention that learns to find facts, and then finds them at any distance.

    python -m train --config=configs/hsa_recall.py --workdir=runs/near --config.data.seq_len=256 \\
        --config.data.batch_size=32 --config.steps=400
    python -m train --config=configs/hsa_recall.py --workdir=runs/hsa_recall --config.model=none \\
        --config.init_from=runs/near/model
    python -m train --config=configs/hsa_recall.py --workdir=runs/cut --config.model=none \\
        --config.init_from=runs/hsa_recall/model --config.data.source=recall:passkey:cut=64 --config.data.seq_len=256 \\
        --config.data.batch_size=32 --config.optimizer.learning_rate=1e-3 --config.steps=180

Sliding windows of 64 tokens everywhere; the input of the third layer is remembered in chunks of 64, which the two upper
layers read, 8 chunks a token: HSA-UltraLong's shape (2511.23319) in small. Rows have pass keys in them and questions
about these (`data/recall/training_rows.py`); half of the rows have several named keys. In rows of 256 tokens the model
learns to copy a key within minutes, which in long rows alone takes much longer; then rows of 1,024 teach it to choose
among chunks, the longer the better: the shipped model took 2,500 steps (models/hsa_recall has every run). The last run
has keys cut by the boundaries of chunks, which are rare and else stay the one thing that it gets wrong.
`python -m infer.recall` asks the model over contexts a thousand times as long.
"""

from streamjax.data import DataConfig
from streamjax.models.config import HSAConfig, UniformConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        name="hsa_recall",
        model=UniformConfig(
            vocab_size=259,
            d_model=192,
            num_layers=4,
            num_heads=2,
            num_kv_heads=1,
            head_dim=96,
            mlp_dim=480,
            tie_embeddings=True,
            windows=(64,) * 4,
            hsa=HSAConfig(layers=(2, 3), memory_layers=(2,), chunk_size=64, top_k=8),
            max_position=1024,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="recall", seq_len=1024, batch_size=8),
        steps=500,
        optimizer=OptimizerConfig(learning_rate=2e-3, final_fraction=0.1, warmup_steps=50, weight_decay=0.05),
        eval_interval=200,
        eval_batches=10,
        checkpoint_interval=100,
    )

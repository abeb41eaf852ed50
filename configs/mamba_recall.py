"""Mamba-2 alone on facts that are to be found: it learns to copy pass keys, and forgets them in longer texts.

    python -m train --config=configs/mamba_recall.py --workdir=runs/near
    python -m train --config=configs/mamba_recall.py --workdir=runs/mamba_recall --config.model=none \\
        --config.init_from=runs/near/model --config.data.source=recall:passkey:cut=64 --config.data.seq_len=1024 \\
        --config.data.batch_size=4 --config.data.shuffle_seed=7 --config.steps=100 \\
        --config.optimizer.learning_rate=1.5e-3 --config.optimizer.warmup_steps=10

What configs/ramba_recall.py learns with a chunk memory, on such rows, without one; docs/recall.md has both. The second
of two layers begins as one that copies (`SSDConfig.copies`, 2410.11135). From other weights four wider layers had not
learnt to copy within 111 steps; these two have within 100, at less than a quarter of the parameters.
"""

from streamjax.data import DataConfig
from streamjax.models.config import BlockConfig, ModelConfig, SSDConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def get_config() -> TrainConfig:
    mixers = (
        SSDConfig(num_heads=4, num_groups=1, head_dim=32, state_dim=64, copies=copies) for copies in (False, True)
    )
    return TrainConfig(
        name="mamba_recall",
        model=ModelConfig(
            vocab_size=259,
            d_model=64,
            blocks=tuple(BlockConfig(mixer, None) for mixer in mixers),
            tie_embeddings=True,
            max_position=1024,
            bos_token_id=256,
            eos_token_ids=(257,),
        ),
        data=DataConfig(source="recall:passkey", seq_len=256, batch_size=16),
        steps=300,
        optimizer=OptimizerConfig(learning_rate=6e-3, final_fraction=0.1, warmup_steps=30, weight_decay=0.05),
        eval_interval=300,
        eval_batches=10,
        checkpoint_interval=100,
    )

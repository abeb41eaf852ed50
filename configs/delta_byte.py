"""A byte-level model in InfiniteVL's shape: three layers of Gated DeltaNet and one of windows, for endless streams.

    python -m train --config=configs/delta_byte.py --workdir=runs/delta_byte

InfiniteVL (2512.08829) has one layer of sliding-window attention to three of Gated DeltaNet, all that a stream keeps
has a fixed size, and it reads streams many times longer than its rows. This one has 0.7 million parameters, rows of 256
bytes of the built-in corpus and a window of 64, and takes two to three minutes of CPU time; models/delta_byte is such a
model. `python -m benchmarks.training.delta_byte` reads streams of a hundred times that length, and with `--dense` it
trains `dense()`, too, the same model with full attention in all layers.
"""

from streamjax.data import DataConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, GatedDeltaConfig, ModelConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def _model(*blocks: BlockConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=259,
        d_model=128,
        blocks=blocks,
        tie_embeddings=True,
        max_position=256,
        bos_token_id=256,
        eos_token_ids=(257,),
    )


def hybrid() -> ModelConfig:
    """Three layers whose states have 4 heads of 32 x 32, and one that sees 64 tokens."""
    delta = BlockConfig(GatedDeltaConfig(num_heads=4, num_groups=4, key_dim=32, value_dim=32), DenseConfig(224))
    window = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, window=64), DenseConfig(224))
    return _model(delta, delta, delta, window)


def dense() -> ModelConfig:
    """Full attention in every layer, and about as many parameters."""
    full = BlockConfig(AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32), DenseConfig(256))
    return _model(full, full, full, full)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="delta_byte",
        model=hybrid(),
        data=DataConfig(source="builtin", seq_len=256, batch_size=16),
        steps=140,
        optimizer=OptimizerConfig(learning_rate=4e-3, final_fraction=0.05, warmup_steps=20, weight_decay=0.1),
        eval_interval=140,
        eval_batches=10,
        checkpoint_interval=50,
    )

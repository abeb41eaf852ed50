"""RAMba in small: Mamba-2 with hierarchical sparse attention, on facts that are to be found.

    python -m train --config=configs/ramba_recall.py --workdir=runs/near --config.data.seq_len=256 \\
        --config.data.batch_size=16 --config.optimizer.learning_rate=3e-3 --config.steps=120
    python -m train --config=configs/ramba_recall.py --workdir=runs/ramba_recall --config.model=none \\
        --config.init_from=runs/near/model

Every layer is Mamba-2 without an MLP (2405.21060), whose states forget; the input of the third one is remembered in
chunks of 64 tokens, which the two upper layers read, 8 chunks a token (2504.16795). In rows of 256 tokens the model
learns to copy a key within 70 steps; rows of 1,024 then teach it to choose among chunks. Half of the keys are cut by
the boundaries of chunks. That takes ten minutes of CPU time; models/ramba_recall has the two runs of the shipped model.
`python -m infer.recall --model=FOLDER --cache=hsa:capacity=TOKENS` asks the model; configs/mamba_recall.py is Mamba-2
without a memory.
"""

from streamjax.data import DataConfig
from streamjax.models.config import AttentionConfig, BlockConfig, DenseConfig, HSAConfig, ModelConfig, SSDConfig
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.optimizer import OptimizerConfig


def mamba() -> ModelConfig:
    """Four layers of Mamba-2 and nothing else."""
    mixer = SSDConfig(num_heads=4, num_groups=1, head_dim=64, state_dim=64)
    return ModelConfig(
        vocab_size=259,
        d_model=128,
        blocks=(BlockConfig(mixer, None),) * 4,
        tie_embeddings=True,
        max_position=1024,
        bos_token_id=256,
        eos_token_ids=(257,),
    )


def get_config() -> TrainConfig:
    heads = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=64)
    memory = HSAConfig((2, 3), (2,), chunk_size=64, top_k=8, attention=heads, mlp=DenseConfig(320))
    return TrainConfig(
        name="ramba_recall",
        model=mamba().replace(hsa=memory),
        data=DataConfig(source="recall:passkey:cut=64", seq_len=1024, batch_size=4),
        steps=200,
        optimizer=OptimizerConfig(learning_rate=1.5e-3, final_fraction=0.1, warmup_steps=20, weight_decay=0.05),
        eval_interval=200,
        eval_batches=10,
        checkpoint_interval=50,
    )

"""Mamba-2 alone on facts that are to be found: configs/ramba_recall.py without the memory, which forgets.

    python -m train --config=configs/mamba_recall.py --workdir=runs/near --config.data.seq_len=256 \\
        --config.data.batch_size=16 --config.optimizer.learning_rate=3e-3 --config.steps=120
    python -m train --config=configs/mamba_recall.py --workdir=runs/mamba_recall --config.model=none \\
        --config.init_from=runs/near/model

The rows, and the order of the runs, are those of configs/ramba_recall.py, beside which it is measured (docs/recall.md).
"""

import dataclasses
import runpy
from pathlib import Path

from streamjax.training.run.config import TrainConfig

_RAMBA = runpy.run_path(str(Path(__file__).with_name("ramba_recall.py")))


def get_config() -> TrainConfig:
    return dataclasses.replace(_RAMBA["get_config"](), name="mamba_recall", model=_RAMBA["mamba"]())

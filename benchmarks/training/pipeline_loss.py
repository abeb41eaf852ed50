"""What SkipPipe's shorter schedules cost in loss: a model trained on 8 virtual devices, as 4 stages of 2 layers.

    python -m benchmarks.training.pipeline_loss            # twenty minutes on 2 cores
    python -m benchmarks.training.pipeline_loss --steps 60 --paths "1F1B" "skip 1/2"

A byte-level model of 0.3 million parameters reads the built-in corpus, 16 rows of 128 bytes a step in 8 microbatches,
over `stage=4 data=2`. `step` is the length of a step's schedule beside that of 1F1B. Every kind of path is trained for
as many steps as 1F1B (`equal`: steps), and for as many as its schedules have time for while 1F1B makes its own
(`equal`: time). `bits a byte` are those of held-out text at a third, two thirds and the end, by the whole model: no
layer is left out. Learning rates fall to the same end over the steps of each run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reporting import Record, in_own_process
from benchmarks.training.pipeline_schedules import PATHS

MODULE, RESULT = "benchmarks.training.pipeline_loss", "training/pipeline_loss"
STAGES, MICROBATCHES, ROWS, PLACES = 4, 8, 16, 3
# XLA ends a process in which one of the devices is 40 seconds late for a collective. A busy machine can do that.
DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=1200"


def share_of_whole(name: str) -> float:
    """The length of a step's schedule, over that of 1F1B."""
    from streamjax.training.pipeline.schedule import plan

    return plan(STAGES, MICROBATCHES, PATHS[name]).length() / plan(STAGES, MICROBATCHES).length()


def trained(name: str, steps: int) -> dict[str, Any]:
    """Train in this process; held-out bits a byte at each of the places."""
    from streamjax.data import DataConfig
    from streamjax.models.config import UniformConfig
    from streamjax.training import OptimizerConfig, TrainConfig, train
    from streamjax.training.run.config import MeshConfig

    model = UniformConfig(
        vocab_size=259, d_model=64, num_layers=2 * STAGES, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=128,
        tie_embeddings=True, max_position=128, bos_token_id=256, eos_token_ids=(257,),
    )  # fmt: skip
    config = TrainConfig(
        name="pipeline_loss",
        model=model,
        data=DataConfig(source="builtin", seq_len=128, batch_size=ROWS),
        steps=steps,
        optimizer=OptimizerConfig(4e-3, final_fraction=0.05, warmup_steps=steps // 10, accumulation=MICROBATCHES),
        mesh=MeshConfig(stage=STAGES, data=2),
        pipeline=PATHS[name],
        scan_layers=True,
        log_interval=steps // PLACES,
        eval_interval=steps // PLACES,
        eval_batches=8,
        checkpoint_interval=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, progress=False)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    bits = [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line]
    return {f"bits a byte at {place + 1}/{PLACES}": round(bits[place], 3) for place in range(PLACES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of 1F1B")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS), help="1F1B is the first")
    parser.add_argument("--output", type=Path, help=f"of results; results/{RESULT}.json if not given")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}"
    if arguments.child:
        name, steps = arguments.child
        print(json.dumps(trained(name, int(steps))))
        return
    record = Record(RESULT, arguments.output, steps=arguments.steps)
    for name, equal in itertools.product(arguments.paths, ("steps", "time")):
        share = share_of_whole(name)
        if record.has(paths=name, equal=equal) or (equal == "time" and share == 1):
            continue
        count = arguments.steps if equal == "steps" else PLACES * round(arguments.steps / share / PLACES)
        found = in_own_process(MODULE, "--child", name, count)
        record.add({"paths": name, "step": round(share, 2), "equal": equal, "steps": count, **found})
    record.finish()


if __name__ == "__main__":
    main()

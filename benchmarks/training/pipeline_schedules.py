"""Schedules of a pipeline: 1F1B, and SkipPipe's partial and reordered paths.

    python -m benchmarks.training.pipeline_schedules

A forward pass of a stage takes 1, a backward pass 3, which computes the stage's layers again. `length` is that of the
schedule in lockstep, as the program runs it; `of 1F1B` its share of the length of 1F1B for as many stages and
microbatches. `busiest` is how long the busiest stage computes, below which no schedule of these paths is; `held` how
many microbatches' inputs a stage must be able to hold (GPipe: all of them). `skip` is the share of the stages that each
microbatch leaves out; with `first` none leaves out the first one.
"""

from __future__ import annotations

from typing import Any

from benchmarks.reporting import report
from streamjax.training.pipeline.paths import WHOLE, PipelineConfig
from streamjax.training.pipeline.schedule import plan

SIZES = ((4, 8), (4, 32), (8, 16), (8, 64))
PATHS = {
    "1F1B": WHOLE,
    "swaps 1": PipelineConfig(swaps=1),
    "skip 1/4": PipelineConfig(skip=0.25),
    "skip 1/4, swaps 1": PipelineConfig(skip=0.25, swaps=1),
    "skip 1/2": PipelineConfig(skip=0.5),
    "skip 1/2, swaps 1": PipelineConfig(skip=0.5, swaps=1),
    "skip 1/2, first": PipelineConfig(skip=0.5, first=True),
}


def rows() -> list[dict[str, Any]]:
    found = []
    for stages, microbatches in SIZES:
        whole = plan(stages, microbatches).length()
        for name, config in PATHS.items():
            schedule = plan(stages, microbatches, config)
            found.append(
                {
                    "stages": stages,
                    "microbatches": microbatches,
                    "paths": name,
                    "different paths": len(set(schedule.paths)),
                    "ticks": schedule.ticks,
                    "length": int(schedule.length()),
                    "of 1F1B": f"{schedule.length() / whole:.2f}",
                    "busiest": int(schedule.busy()),
                    "held": schedule.slots,
                }
            )
    return found


if __name__ == "__main__":
    report("training/pipeline_schedules", rows())

"""Which requests run now: policies, a file each, under one protocol."""

from collections.abc import Callable

from streamjax.serving.scheduling.chunk_pace import ChunkPace
from streamjax.serving.scheduling.fcfs import FCFS
from streamjax.serving.scheduling.mlfq import MLFQ
from streamjax.serving.scheduling.policy import Policy, Work

POLICIES: dict[str, Callable[[], Policy]] = {"fcfs": FCFS, "mlfq": MLFQ}

__all__ = ["FCFS", "MLFQ", "POLICIES", "ChunkPace", "Policy", "Work"]

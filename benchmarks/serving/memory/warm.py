"""What an engine holds of the host's memory when it has compiled everything, with the chunk in one program or apart.

    python -m benchmarks.serving.memory.warm --model=FOLDER    # 2 idle cores: some 3 minutes

SmolLM2-135M-Instruct in float32, 16 rows of 4 sinks and a window of 508 tokens, narrow as `infer.serve` has it; each
engine in a process of its own. MiB: `live arrays` are those of JAX, weights and rows; `allocated` all that the C
library has given out, the compiled programs with it; `resident` the process without files. Behind the warm-up the
engine gives back what the compiler has freed (`streamjax.host_memory`); `held back` is what that was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path

from benchmarks.reporting import Record, in_own_process
from benchmarks.serving.process_usage import resident_mib

ROWS = 16


class _Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]  # ctypes wants a list


def allocated_mib() -> float:
    """What glibc has given out."""
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = _Mallinfo
    found = library.mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20


def measure(folder: str, fused: bool) -> dict[str, int]:
    """MiB of an engine of this process behind its warm-up."""
    import jax

    import streamjax as sj
    from benchmarks.serving.guesses import CACHE
    from streamjax.serving import engine as engines

    before: list[float] = []
    release = engines.release_freed_memory

    def noted() -> None:
        before.append(resident_mib(os.getpid()))
        release()

    engines.release_freed_memory = noted
    model, tokenizer = sj.load(folder, dtype="float32"), sj.load_tokenizer(folder)
    one = sj.Engine(model, tokenizer, CACHE, rows=ROWS, narrow=True, fused=fused)
    one.warm_up()
    resident = resident_mib(os.getpid())
    live = sum(x.nbytes for x in jax.live_arrays()) / 2**20
    figures = {
        "live arrays": live,
        "allocated": allocated_mib(),
        "resident": resident,
        "held back": before[0] - resident,
    }
    return {name: round(value) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder of SmolLM2-135M-Instruct, as Hugging Face has it")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=["apart", "fused"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.child == "fused")))
        return
    record = Record("serving/memory/warm", options.output, model=Path(options.model).name, rows_of_the_engine=ROWS)
    for programs in ("apart", "fused"):
        if not record.has(programs=programs):
            found = in_own_process("benchmarks.serving.memory.warm", f"--model={options.model}", f"--child={programs}")
            record.add({"programs": programs, **found})
    record.finish()


if __name__ == "__main__":
    main()

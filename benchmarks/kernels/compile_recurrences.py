"""The kernels of recurrent layers, compiled for chips that are not there, at the shapes of known models.

    python -m benchmarks.kernels.compile_recurrences                          # what is not there yet; some minutes
    python -m benchmarks.kernels.compile_recurrences --chips h100 --force

`both passes` is `chunkwise_recurrence` of 2,048 tokens in bfloat16, forwards and backwards; `one token` is a layer's
update for 16 streams, by `delta_update` where the rule is the delta rule, and else by what XLA makes of a sum over the
new state. Behind a TPU's kernel stands its fast memory, behind a GPU's its registers, the bytes that a thread spills
(stored and loaded), and shared memory, all by the chips' own compilers, which refuse what a chip does not take.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import aot
from benchmarks.kernels import state_updates
from benchmarks.kernels.gpu import machine_code
from benchmarks.kernels.schedules.recurrence import CHIPS, MODELS, both_passes
from benchmarks.reporting import RESULTS, report

NAME = "kernels/compile_recurrences"
PROGRAMS = ("both passes", "one token")
WHOLE = tuple(model for model in MODELS if model != "Kimi-Linear 48B, a quarter")  # that one is tokamax's
_VMEM = r'"used_scoped_memory_configs":\[{"memory_space":"1","offset":"\d+","size":"(\d+)"}'


def measure(chip: str, model: str, program: str) -> dict[str, Any]:
    """A line of the table, compiled in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = aot.child_environment(CHIPS[chip])
        if chip == "h100":
            environment["XLA_FLAGS"] = f"--xla_dump_to={folder}"
        command = [sys.executable, "-m", "benchmarks.kernels.compile_recurrences", "--child", chip, model, program]
        done = subprocess.run(command, env=environment, cwd=aot.ROOT, capture_output=True, text=True, check=False)
        line = {"chip": chip, "model": model, "program": program}
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {**line, "temporaries, MB": "-", "kernels": f"refused: {said[:200]}"}
        found = json.loads(done.stdout.splitlines()[-1])
        if chip == "h100":
            parts = [_on_gpu(name, figures) for name, figures in sorted(machine_code.figures(Path(folder)).items())]
        else:
            parts = [f"{name} {size / 2**20:.2f} MiB" for name, size in sorted(found["vmem"].items())]
        kernels = "; ".join(parts) or "XLA's own"
        return {**line, "temporaries, MB": found["temp"], "kernels": kernels}


def _on_gpu(name: str, figures: dict[str, Any]) -> str:
    registers, spills = (figures.get(key, "?") for key in ("registers", "spills"))
    return f"{name} {registers} / {spills} / {round(figures.get('shared', 0) / 1024)} KiB"


def compile_here(chip: str, model: str, program: str) -> dict[str, Any]:
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding, use_abstract_mesh

    place = SingleDeviceSharding(aot.devices(CHIPS[chip])[0])

    def array(*shape: int, dtype: Any = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def trace() -> Any:
        if program == "one token":
            return state_updates.trace(chip, MODELS[model], place)
        function, arrays, _ = both_passes(chip, model, array)
        return jax.jit(function).trace(*arrays)

    if chip == "h100":
        gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
        with use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=gpu)):
            traced = trace()
    else:
        traced = trace()
    compiled = traced.lower(lowering_platforms=("cuda" if chip == "h100" else "tpu",)).compile()
    vmem: dict[str, int] = {}
    for name, size in re.findall(rf"tpu_custom_call.*?{machine_code.KERNELS}.*?{_VMEM}", compiled.as_text()):
        vmem[name] = max(vmem.get(name, 0), int(size))
    temporaries = round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1)
    return {"temp": temporaries, "vmem": vmem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--models", nargs="+", choices=WHOLE, default=list(WHOLE))
    parser.add_argument("--force", action="store_true", help="compile also what is there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(compile_here(*options.child)))
        return
    output = RESULTS / f"{NAME}.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    kept = {(row["chip"], row["model"], row["program"]): row for row in rows}
    for chip in options.chips:
        for model in options.models:
            for program in PROGRAMS:
                at = chip, model, program
                if at in kept and not options.force:
                    continue
                kept[at] = measure(*at)
                order = [(c, m, p) for c in CHIPS for m in WHOLE for p in PROGRAMS]
                report(NAME, [kept[key] for key in order if key in kept])


if __name__ == "__main__":
    main()

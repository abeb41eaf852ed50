"""A pretrained model's gradient over the mesh axis `context`, by each order, against that of one device.

    python -m benchmarks.backprop.context_real_model --model FOLDER          # three quarters of an hour on 2 busy cores
    python -m benchmarks.backprop.context_real_model --model FOLDER --lengths 256 --output J

FOLDER has a model in Hugging Face's layout, such as SmolLM2-135M. The tokens are those of the source of Python's
`argparse`, one row, of which all count; weights and sums are float32. Each gradient is taken in a process of its own
whose CPU is cut into virtual devices, four along `context`. One device takes it by `remat`. Chunks have 256 tokens.
`chunk, single` is of layers that are not stacked; 30 layers, stacked or not, are dealt out to 4 devices as 7, 8, 7, 8.

`norm` is that of the whole gradient. `loss off` and `norm off` are relative differences from one device, `gradient off`
is the norm of the difference of the gradients beside the gradient's. `peak MB` is the highest resident memory of the
process with all its devices.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reporting import Record, in_own_process

MODULE, RESULT = "benchmarks.backprop.context_real_model", "backprop/context_real_model"
DEVICES, CHUNK = 4, 256
CASES: dict[str, dict[str, Any]] = {
    "one device": {"method": "remat"},
    "remat, gather": {"method": "remat", "context_exchange": "gather"},
    "remat, ring": {"method": "remat", "context_exchange": "ring"},
    "layer": {"method": "layer", "chunk_size": CHUNK},
    "chunk": {"method": "chunk", "chunk_size": CHUNK},
    "chunk, single": {"method": "chunk", "chunk_size": CHUNK},
}


def gradient(case: str, folder: str, length: int, reference: Path) -> dict[str, Any]:
    """A row of the table. One device writes its gradient to the folder `reference`; others read it there."""
    import jax

    import streamjax as sj
    from streamjax.models.layer_stacking import stack_layers
    from streamjax.parallel.mesh import make_mesh
    from streamjax.training import loss_and_grad, shard_batch

    ids = sj.load_tokenizer(folder).encode(inspect.getsource(argparse))[: length + 1]
    if len(ids) <= length:
        raise SystemExit(f"the text has {len(ids) - 1:,} tokens: use --lengths up to that")
    row = np.asarray([ids], np.int32)
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "weights": np.ones((1, length), np.float32)}
    mesh = make_mesh(context=1 if case == "one device" else DEVICES, devices=jax.devices()[: _devices(case)])
    with jax.set_mesh(mesh):
        model = sj.load(folder, dtype="float32", mesh=mesh, scan_layers=not case.endswith("single"))
        options = CASES[case]
        loss, grads = jax.jit(lambda model, batch: loss_and_grad(model, batch, **options))(
            model, shard_batch(batch, mesh)
        )
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stack_layers(grads))]
    if case == "one device":
        for n, leaf in enumerate(leaves):
            np.save(reference / f"{n}.npy", leaf)
    apart = sum(float(np.sum((leaf - np.load(reference / f"{n}.npy")) ** 2)) for n, leaf in enumerate(leaves))
    norm = sum(float(np.sum(leaf**2)) for leaf in leaves) ** 0.5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return {"loss": float(loss), "norm": norm, "gradient off": apart**0.5 / norm, "peak MB": round(peak)}


def _devices(case: str) -> int:
    return 1 if case == "one device" else DEVICES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="in Hugging Face's layout")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048], help="tokens of the row")
    parser.add_argument("--cases", nargs="+", choices=list(CASES)[1:], default=list(CASES)[1:])
    parser.add_argument("--output", type=Path, help="of the rows")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # case, length, folder of the reference
    arguments = parser.parse_args()
    if arguments.one:
        case, length, reference = arguments.one
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={_devices(case)} "
            "--xla_cpu_collective_call_terminate_timeout_seconds=1200"
        )
        print(json.dumps(gradient(case, arguments.model, int(length), Path(reference))))
        return
    record = Record(RESULT, arguments.output, lengths=arguments.lengths, model=Path(arguments.model).name)
    for length in arguments.lengths:
        with tempfile.TemporaryDirectory() as reference:
            right: dict[str, Any] = {}
            for case in ("one device", *arguments.cases):
                found = in_own_process(MODULE, "--model", arguments.model, "--one", case, length, reference)
                right = right or found
                off = {f"{name} off": abs(found[name] / right[name] - 1) for name in ("loss", "norm")}
                names = ("loss", "norm", "gradient off", "peak MB")
                record.add({"tokens": length, "case": case, **{name: found[name] for name in names}, **off})
    record.finish()


if __name__ == "__main__":
    main()

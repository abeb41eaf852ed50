"""DPO and packed conversations on two processes: what one process finds on the same batches."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

import streamjax as sj
from streamjax.training.run.goodput import Goodput
from tests.processes import one_device_flags

CONFIG = """
from streamjax.data import DataConfig
from streamjax.training import *

def get_config():
    data = DataConfig(source={source!r}, format={format!r}, packing={packing!r}, seq_len=32, batch_size=8)
    return TrainConfig(name="t", model=None, init_from={model!r}, data=data, steps=2, objective={objective},
                       log_interval=1, eval_batches=2, lora=LoRAConfig(rank=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["DPO()", "CrossEntropy()"])
def test_two_processes_find_what_one_finds(tmp_path, objective):
    config = sj.UniformConfig(
        vocab_size=259, d_model=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48,
        tie_embeddings=True,
    )  # fmt: skip
    sj.save_hf(jax.jit(lambda: sj.Decoder(config, jax.random.key(0)))(), tmp_path / "model")
    records = {
        "DPO()": [{"prompt": f"{n}?", "chosen": "ja", "rejected": "nein" * (n % 3 + 1)} for n in range(40)],
        "CrossEntropy()": [{"prompt": f"{n}?", "completion": "so" * 9} for n in range(200)],
    }[objective]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    kind, packing = ("preferences", "rows") if objective == "DPO()" else ("conversations", "pack")
    values = {"source": str(tmp_path / "records.jsonl"), "model": str(tmp_path / "model"), "objective": objective}
    (tmp_path / "config.py").write_text(CONFIG.format(**values, format=kind, packing=packing))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(workdir, rank=None):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": one_device_flags(),
            "STREAMJAX_DATA_DIR": str(tmp_path / f"data_{workdir}"),
        }
        more = []
        if rank is not None:
            more = ["--distributed", "--config.mesh.data=2"]
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": str(rank),
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            }
        command = [sys.executable, "-m", "train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/{workdir}"]
        return subprocess.Popen([*command, *more], env=environment, stderr=subprocess.PIPE, text=True)

    for processes in ([start("two", 0), start("two", 1)], [start("one")]):
        for process in processes:
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=2e-2)
    if objective == "DPO()":  # pairs are dealt out so that a batch has the same ones
        for mine, other in zip(one, two, strict=True):
            for name in mine.keys() - {"tokens_per_second", *Goodput().metrics()}:
                assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5)

"""Replicas as processes: they find what as many replicas on virtual devices of one process find, on the same rows."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import streamjax as sj
from tests.processes import environments, wait_for

COUNT, STEPS, ROWS = 4, 16, 8
CONFIG = """
from streamjax.data import DataConfig
from streamjax.training import *

def get_config():
    data = DataConfig(source={source!r}, format="conversations", packing="rows", seq_len=32, batch_size={rows},
                      shuffle_seed=None)
    diloco = DiLoCoConfig(replicas={count}, sync_interval=6, overlap=3)
    return TrainConfig(name="t", model=None, init_from={model!r}, data=data, steps={steps}, objective=CrossEntropy(),
                       log_interval=1, eval_batches=2, diloco=diloco,
                       optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1))
"""


@pytest.mark.slow
def test_four_replicas_as_processes_are_those_of_virtual_devices(tmp_path):
    """Process r reads records r, r + 4, ...; replica r of one process reads part r of a batch: the same records."""
    config = sj.UniformConfig(
        vocab_size=259, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48,
        tie_embeddings=True,
    )  # fmt: skip
    sj.save_hf(jax.jit(lambda: sj.Decoder(config, jax.random.key(0)))(), tmp_path / "model")
    rng = np.random.default_rng(0)
    records = [
        json.dumps({"prompt": f"{n}?", "completion": "".join(rng.choice(list("abcd"), 12))})
        for n in range(ROWS * STEPS)
    ]
    each = ROWS // COUNT
    beside = [records[first + COUNT * row + r] for first in range(0, len(records), ROWS) for r in range(COUNT)
              for row in range(each)]  # fmt: skip
    for name, own in (("processes", records), ("devices", beside)):
        folder = tmp_path / f"data_{name}"
        folder.mkdir()
        (folder / "train.jsonl").write_text("\n".join(own) + "\n")
        (folder / "validation.jsonl").write_text("\n".join(records[:ROWS]) + "\n")
        text = CONFIG.format(source=str(folder), model=str(tmp_path / "model"), steps=STEPS,
                             rows=ROWS, count=COUNT)  # fmt: skip
        (folder / "config.py").write_text(text)
        command = [sys.executable, "-m", "train", f"--config={folder}/config.py", f"--workdir={tmp_path}/{name}",
                   f"--config.mesh.replica={COUNT}"]  # fmt: skip
        several = environments(COUNT if name == "processes" else 1)
        if name == "devices":
            several[0]["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={COUNT}"
        command += ["--distributed"] * (name == "processes")
        wait_for([subprocess.Popen(command, env=one | {"STREAMJAX_DATA_DIR": str(folder)}, stderr=subprocess.PIPE,
                                   text=True) for one in several], 540)  # fmt: skip
    found, expected = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("processes", "devices")
    )
    assert len(found) == len(expected) == STEPS + 1
    assert expected[-1]["eval_loss"] < 0.9 * expected[0]["loss"]
    for name in ("loss", "grad_norm", "param_norm"):
        np.testing.assert_allclose(*[[line[name] for line in lines[:-1]] for lines in (found, expected)], rtol=1e-3)
    assert found[-2]["sent_bytes"] == expected[-2]["sent_bytes"] > 0
    assert found[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-3)

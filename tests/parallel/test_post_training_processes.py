"""DPO, GRPO and packed conversations on two processes: what one process finds on the same batches."""

import json
import subprocess
import sys

import jax
import pytest

import streamjax as sj
from streamjax.training.run.goodput import Goodput
from tests.processes import environments, wait_for

CONFIG = """
from streamjax.data import DataConfig
from streamjax.training import *

def get_config():
    data = DataConfig(source={source!r}, format={format!r}, packing={packing!r}, seq_len=32, batch_size=8,
                      truncation={truncation!r})
    rollouts = RolloutConfig(rewards=("regex:[a-z]", "length:4"), reward_weights=(1.0, 0.5), group_size=4,
                             max_new_tokens=8, updates=2)
    return TrainConfig(name="t", model=None, init_from={model!r}, data=data, steps=4, objective={objective},
                       rollouts=rollouts, log_interval=1, eval_batches=2, lora=LoRAConfig(rank=2),
                       optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["DPO()", "GRPO(kl=0.1)", "CrossEntropy()"])
def test_two_processes_find_what_one_finds(tmp_path, objective):
    config = sj.UniformConfig(
        vocab_size=259, d_model=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=48,
        tie_embeddings=True,
    )  # fmt: skip
    sj.save_hf(jax.jit(lambda: sj.Decoder(config, jax.random.key(0)))(), tmp_path / "model")
    records = {
        "DPO()": [{"prompt": f"{n}?", "chosen": "ja", "rejected": "nein" * (n % 3 + 1)} for n in range(40)],
        "GRPO(kl=0.1)": [{"prompt": f"{n}?", "reference": str(n)} for n in range(40)],
        "CrossEntropy()": [{"prompt": f"{n}?", "completion": "so" * 9} for n in range(200)],
    }[objective]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    kind, packing, truncation = {
        "DPO()": ("preferences", "rows", "end"),
        "GRPO(kl=0.1)": ("prompts", "rows", "drop"),
        "CrossEntropy()": ("conversations", "pack", "end"),
    }[objective]
    values = {"source": str(tmp_path / "records.jsonl"), "model": str(tmp_path / "model"), "objective": objective}
    text = CONFIG.format(**values, format=kind, packing=packing, truncation=truncation)
    (tmp_path / "config.py").write_text(text)
    for workdir, count in (("two", 2), ("one", 1)):
        data = {"STREAMJAX_DATA_DIR": str(tmp_path / f"data_{workdir}")}
        command = [sys.executable, "-m", "train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/{workdir}"]
        command += ["--distributed", "--config.mesh.data=2"] if count > 1 else []
        processes = [
            subprocess.Popen(command, env=each | data, stderr=subprocess.PIPE, text=True)
            for each in environments(count)
        ]
        wait_for(processes, 300)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    if objective == "GRPO(kl=0.1)":
        assert two[-1]["eval_reward"] == pytest.approx(one[-1]["eval_reward"], abs=0.1)
        assert len({line["reward"] for line in one[:-1]}) > 1
        samples = [(tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("one", "two")]
        assert samples[0] == samples[1]
        assert len(samples[0]) == 2 * 4
    else:
        assert two[-1]["eval_loss"] == pytest.approx(one[-1]["eval_loss"], rel=2e-2)
    if objective != "CrossEntropy()":  # pairs and prompts are dealt out so that a batch has the same ones
        for mine, other in zip(one, two, strict=True):
            for name in mine.keys() - {"tokens_per_second", *Goodput().metrics()}:
                assert other[name] == pytest.approx(mine[name], rel=1e-3, abs=1e-5)

"""Runs with a pipeline: what a configuration may say, and a step like that of one device."""

import jax
import pytest

from streamjax.data import DataConfig
from streamjax.models.config import UniformConfig
from streamjax.training import TrainConfig, apply_overrides, eval_step
from streamjax.training.run.loop import _Run

MODEL = UniformConfig(vocab_size=300, d_model=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24)


@pytest.fixture
def run_config(tmp_path):
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index:02}.txt").write_text("stream runs on and the window holds what it can " * 20)
    data = DataConfig(source=str(tmp_path / "text"), seq_len=16, batch_size=8, num_workers=0)
    return TrainConfig(name="x", model=MODEL, data=data, steps=1, scan_layers=True)


@pytest.mark.slow
def test_a_run_over_stages_steps_as_it_is_told(run_config, tmp_path):
    """The loss of its first step is that of the batch on one device; each stage has moments of its layers alone."""
    overrides = {"mesh.stage": "4", "mesh.data": "2", "optimizer.accumulation": "4", "backprop.method": "auto"}
    run = _Run(apply_overrides(run_config, overrides.items()), tmp_path / "run", progress=False)
    with run.on_mesh():
        batch, _ = run.feed.next(run.state.model, 0)
        model = jax.device_get(run.state.model)
        state, found = run.train_step(run.state, batch)
    run.close()
    loss, weight = eval_step(model, jax.device_get(batch))
    assert float(found["loss"]) == pytest.approx(float(loss / weight), rel=1e-5)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == model.stack[0].mlp.down.shape]
    assert len(moments) >= 2
    assert all(x.sharding.spec[0] == "stage" for x in moments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scan_layers": "false"}, "mesh.stage is 4, and stages have parts of stacked layers: set scan_layers=true"),
        ({"mesh.fsdp": "2"}, "mesh.fsdp is 2: mesh.stage goes with data and tensor only"),
        ({"backprop.method": "chunk"}, 'backprop.method is \'chunk\': with mesh.stage use "full" or "remat"'),
        ({"mesh.stage": "1", "pipeline.skip": "0.5"}, "pipeline says how stages are gone through, and mesh.stage is 1"),
        ({"pipeline.skip": "1.0"}, "PipelineConfig.skip is 1.0: it must be"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(run_config, overrides, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        apply_overrides(run_config, list({"mesh.stage": "4", **overrides}.items()))
    assert "\n" not in str(error.value)

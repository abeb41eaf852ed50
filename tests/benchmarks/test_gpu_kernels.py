"""What `benchmarks.kernels.gpu` does where there is no GPU: its checks in an interpreter, and the work it counts."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels.gpu import all_kernels, chunks, decoding, flash, hsa, parts, torch_flash, weights
from benchmarks.kernels.gpu.all_kernels import DTYPES, PARTS
from benchmarks.kernels.gpu.parts import TOLERANCE, Device
from benchmarks.model_shapes import SHAPES
from pallas_kernels import api
from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow
from tests.covering import rest_slow

MODEL = "small"
LENGTHS = {flash: 96, chunks: 128, hsa: 192, decoding: 64 * 8, weights: 200}


@pytest.fixture
def small(monkeypatch):
    """A model of few heads by the name `MODEL`, and few pages of few streams."""
    monkeypatch.setattr(decoding, "BATCH", 2)
    monkeypatch.setattr(decoding, "PAGES", 5)
    config = SHAPES["qwen2.5-0.5b"].replace(
        num_heads=4, num_kv_heads=2, head_dim=64, d_model=256, vocab_size=500, mlp_dim=512
    )
    monkeypatch.setitem(SHAPES, MODEL, config)


@pytest.mark.parametrize("first", [0, 5, 33])
@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(7), SlidingWindow(90), SinkWindow(3, 7), SinkWindow(20, 4)])
def test_counts_the_pairs_of_a_pattern(pattern, first):
    index = jnp.arange(40)
    visible = pattern.mask(index[first:, None], index[None])
    assert flash.pairs(pattern, 40, first) == int(jnp.sum(visible))


def error(name, dtype=jnp.float32):
    part = PARTS[name]
    return part.errors(MODEL, name, "triton", dtype, length=LENGTHS[part], interpret=True)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", rest_slow(PARTS, "paged"))
def test_the_kernels_are_right(name):
    for dtype in DTYPES["triton"]:
        assert 0 < error(name, dtype) < TOLERANCE[jnp.dtype(dtype).name]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        pytest.param("chunk", "chunk_gradients", marks=pytest.mark.slow),
        ("paged", "paged_attention"),
        pytest.param("sinks", "flash_attention", marks=pytest.mark.slow),
        pytest.param("chunk-sinks", "chunk_attention", marks=pytest.mark.slow),
        pytest.param("hsa", "hsa_attention", marks=pytest.mark.slow),
        pytest.param("decode-int4", "decode_attention", marks=pytest.mark.slow),
        pytest.param("scores", "page_scores", marks=pytest.mark.slow),
        pytest.param("int4-up", "grouped_product", marks=pytest.mark.slow),
        pytest.param("int4-table", "grouped_product", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_kernel_is_noticed(name, kernel, monkeypatch):
    right = getattr(api, kernel)
    monkeypatch.setattr(api, kernel, lambda *args, **more: jax.tree.map(lambda x: 1.03 * x, right(*args, **more)))
    assert error(name, jnp.bfloat16) > TOLERANCE["bfloat16"]


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["local", "sinks", "chunk-sinks"])
def test_the_windows_that_are_checked_are_short(name, monkeypatch):
    """A kernel without the window is wrong where it is checked."""
    kernel = "chunk_attention" if name.startswith("chunk") else "flash_attention"
    right = getattr(api, kernel)
    monkeypatch.setattr(api, kernel, lambda q, k, v, pattern, **more: right(q, k, v, Full(), **more))
    assert error(name, jnp.bfloat16) > TOLERANCE["bfloat16"]


def test_infinities_have_to_be_where_they_are():
    assert parts.worst([np.array([1.0, -np.inf])], [np.array([2.0, -np.inf])]) == 0.5
    for wrong in ([1.0, 5.0], [np.nan, -np.inf], [-np.inf, 1.0]):
        assert parts.worst([np.array(wrong)], [np.array([2.0, -np.inf])]) == np.inf


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_the_sides_of_a_chunk_and_of_scores_are_the_same(monkeypatch):
    """What XLA is timed with computes what the kernels do."""
    arrays = chunks.inputs(MODEL, 512, 0, jnp.float32, 256)
    for pattern in (Full(), SinkWindow(4, 100)):
        mine = chunks.both(pattern, 256, *arrays, interpret=True)
        loops = chunks.both_by_loops(pattern, 256, *arrays)
        join = [jnp.moveaxis(x, 3, 1).reshape(mine[0].shape) for x in loops[:2]]
        assert parts.worst(mine, (*join, *loops[2:])) < 1e-5
    bounds = decoding.bounds(MODEL, 64 * 40, 0, jnp.float32)
    scores = decoding.ours("scores", bounds, interpret=True)
    assert parts.worst(scores, decoding.by_index(bounds).reshape(scores.shape)) < 1e-5
    codes = weights.inputs(MODEL, "int4-up", 200, 0, jnp.float32)
    assert parts.worst(weights.by_xla("int4-up", codes), weights.exactly("int4-up", codes)) < 1e-5


@pytest.mark.usefixtures("small")
def test_torch_computes_the_same():
    pytest.importorskip("torch")
    arrays = flash.inputs(MODEL, 50, 0, jnp.float32)
    plain = flash.backward(partial(flash.by_jax, "xla", Full()), *arrays)
    for backward, right in ((False, plain[:1]), (True, jax.tree.leaves(plain))):
        side = torch_flash.flash(backward)
        found = side.call(*side.prepare(arrays[: 4 if backward else 3]))
        found = [x.detach().transpose(1, 2).numpy() for x in (found if backward else [found])]
        assert parts.worst(found, list(right)) < 1e-5


def test_lines_have_a_rate_and_leave_out_what_cannot_run(capsys):
    def broken(x):
        raise ValueError("not here\nmore")

    sets = parts.copies(lambda seed: (jnp.full(2**20, float(seed)),))
    assert len(sets) == parts.SPREAD // 2**22
    device = Device({"GB/s": 4.0}, repeats=3)
    waited = []
    foreign = parts.Foreign(np.square, lambda x: [np.asarray(x[0])], lambda: waited.append(1))
    programs = {"streamjax": lambda x: x + 1, "broken": broken, "foreign": foreign}
    line, other = device.lines(programs, sets, "GB/s", 2**23, model="m")
    assert other["side"] == "foreign"
    assert len(waited) == 2 + 3
    assert line["side"] == "streamjax"
    assert line["ours / this"] == 1.0
    assert line["model"] == "m"
    np.testing.assert_allclose(line["GB/s"] * line["ms"] * 1e6, 2**23, rtol=1e-9)
    np.testing.assert_allclose(line["of the ceiling"], line["GB/s"] / 4.0)
    assert "broken cannot run this: not here\n" in capsys.readouterr().out


def test_calls_take_turns_over_the_inputs():
    seen = []

    def program(x):
        jax.debug.callback(lambda x: seen.append(int(x)), x)
        return x

    parts._Side(program, [(jnp.int32(i),) for i in range(3)]).clock(2, 5)
    jax.effects_barrier()
    assert sorted(seen) == [0, 0, 1, 2, 2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", rest_slow(PARTS, "local", "scores"))
def test_measures_every_part(name, monkeypatch):
    """Every side is called, with the shapes of the last chunk, of whole sequences, of caches; no clock needed."""
    called = []

    def lines(self, programs, sets, unit, amount, **labels):
        for side, program in programs.items():
            if side not in ("jax cudnn", "tokamax", "torch flash"):
                jax.eval_shape(program, *sets[0])
            called.append(side)
        assert amount > 0
        assert unit in ("TFLOP/s", "GB/s")
        assert labels["pattern"] == name
        return [labels]

    monkeypatch.setattr(Device, "lines", lines)
    monkeypatch.setattr(parts, "SPREAD", 1)
    monkeypatch.setattr("pallas_kernels.api.platforms.platform_implementation", lambda: "triton")
    assert PARTS[name].measure(MODEL, name, 4096, ["triton"], Device({}, 1))
    assert "streamjax" in called


class Fake:
    """A part whose kernel has a given error, or none that can run."""

    KERNELS = ("triton", "mosaic_gpu")

    def __init__(self, *errors):
        self.given = dict(zip((jnp.bfloat16, jnp.float32), errors, strict=True))

    def errors(self, model, name, kernel, dtype):
        if isinstance(self.given[dtype], str):
            raise ValueError(self.given[dtype])
        return self.given[dtype]

    def measure(self, model, name, length, kernels, device):
        assert kernels == ["triton"]  # the only one that this machine has
        return [{"pattern": name, "tokens": length, "GB/s": 1.0}]


def test_a_wrong_kernel_is_named_and_not_timed(monkeypatch, tmp_path, capsys):
    fakes = {"right": Fake(1e-3, 1e-6), "wrong": Fake(1e-3, 1e-4), "broken": Fake("no such\nthing", 1e-6)}
    output = tmp_path / "out.json"
    monkeypatch.setattr(all_kernels, "PARTS", fakes)
    monkeypatch.setattr(Device, "measured", lambda repeats: Device({"GB/s": 2.0}, repeats))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--models", "gemma-3-4b", "--output", str(output)])
    with pytest.raises(SystemExit, match=r"wrong results: gemma-3-4b/wrong/triton, gemma-3-4b/broken/triton$"):
        all_kernels.main()
    body = json.loads(output.read_text())
    assert [(row["pattern"], row["tokens"]) for row in body["rows"]] == [("right", 8192), ("right", 32768)]
    assert body["numerics"]["gemma-3-4b/wrong/triton"] == {"bfloat16": 1e-3, "float32": 1e-4}
    assert body["numerics"]["gemma-3-4b/broken/triton"]["bfloat16"] == np.inf
    assert "triton cannot run gemma-3-4b, broken: no such\n" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, tmp_path, capsys):
    output = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--output", str(output)])
    all_kernels.main()
    assert "no GPU here" in capsys.readouterr().out
    assert not output.exists()


def test_lengths_that_are_too_short_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_kernels", "--lengths", "1024"])
    with pytest.raises(SystemExit) as ended:
        all_kernels.main()
    assert ended.value.code == 2
    assert "chunks and pages need 4,096 tokens" in capsys.readouterr().err

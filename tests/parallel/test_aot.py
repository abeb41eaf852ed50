"""Two layers of Llama-3.1-8B, compiled for TPU slices that are not there: memory of one chip, and what is copied.

The compiler is the real one (libtpu), so what it assigns is what a chip would hold.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(sys.prefix) / "aot"
MB = 1e6

pytestmark = pytest.mark.skipif(
    not (LIBRARY / "libtpu").exists(),
    reason=f"no TPU compiler: `make test` installs it, or pip install --target {LIBRARY} libtpu",
)


def _bytes_on_one_chip(case: str, tmp_path: Path) -> dict:
    """What `benchmarks/caches/tpu_memory.py` finds for two layers of one of its cases."""
    output = tmp_path / "aot.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.caches.tpu_memory",
        "--cases",
        case,
        "--layers",
        "2",
        "--output",
        str(output),
    ]
    # caches stay in main memory: moves to and from fast memory would hide copies that are none of the program's needs
    command += ["--option", "xla_tpu_msa_inefficient_use_to_copy_ratio=1.0"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
    return json.loads(output.read_text())["bytes_on_one_chip"][case]


def _expected_layer(tensor: int) -> float:
    """Bytes of one layer's bf16 weights on one of `tensor` chips, counted from the architecture."""
    d, heads, kv, width, mlp = 4096, 32, 8, 128, 14336
    return 2 * (d * (heads + 2 * kv) * width + heads * width * d + 3 * d * mlp) / tensor + 2 * 2 * d


@pytest.mark.slow
def test_decode_holds_weights_and_caches_and_nothing_else(tmp_path):
    decode = _bytes_on_one_chip("decode-8", tmp_path)
    ends = 2 * 2 * 128256 * 4096 / 8
    slots = 2 * 2 * (8 * 4096 * 128 * 2)  # layers, keys and values, streams x slots x width of one kv head
    expected = 2 * _expected_layer(8) + ends + slots
    assert decode["weights"] + decode["state"] == pytest.approx(expected, rel=0.005)
    assert expected <= decode["argument"] < 1.01 * expected  # no padding
    assert decode["alias"] >= slots  # every cache is updated in place,
    assert decode["copied"] == 0  # and none is copied on the way
    assert decode["temp"] < 16 * MB  # a float32 copy of one chip's part of any kernel would take more
    assert decode["argument"] + decode["output"] - decode["alias"] + decode["temp"] < 1.05 * expected
    # what crosses chips: two sums a layer and one of the embedding's rows, each of 8 streams x 4096 channels
    assert decode["collectives"] == {"all-reduce bf16[8,1,4096]": 1, "all-reduce bf16[8,4096]": 4}


@pytest.mark.slow
def test_pages_in_the_hosts_memory_stay_there(tmp_path):
    """A stream with 262,144 tokens: the device has what is small and what is read, the host the pages, once."""
    decode = _bytes_on_one_chip("decode-1-host-pages", tmp_path)
    pages = 2 * 2 * (8 * (262144 + 64) * 128 * 2)
    assert decode["host"] == decode["host_alias"] == pages
    assert decode["host_temp"] < MB
    weights = 2 * _expected_layer(1) + 2 * 2 * 128256 * 4096
    read = 2 * 2 * (8 * 32 * 64 * 128 * 2)
    assert decode["argument"] < weights + pages / 32 + 10 * MB  # the bounds of every 64 keys, and the window
    assert decode["temp"] < 2 * read


@pytest.mark.slow
def test_pages_are_read_where_they_lie(tmp_path):
    """The same stream: of its keys and values nothing comes to the chip but the page that a token is written to."""
    decode = _bytes_on_one_chip("decode-1-host-attention", tmp_path)
    pages = 2 * 2 * (8 * (262144 + 64) * 128 * 2)
    assert decode["host"] == decode["host_alias"] == pages
    assert decode["host_temp"] < MB  # nothing is copied there: pages are read behind what writes to them
    weights = 2 * _expected_layer(1) + 2 * 2 * 128256 * 4096
    assert decode["argument"] < weights + pages / 32 + 10 * MB  # the bounds of every 64 keys, and the window
    assert decode["temp"] < 2 * 2 * (8 * 32 * 64 * 128 * 2)  # what a fetch of the pages that are read would take


@pytest.mark.slow
def test_decoding_over_a_chunk_memory_copies_none_of_it(tmp_path):
    """8 streams with 262,144 tokens each in the memory of one of two layers, one key head a chip."""
    decode = _bytes_on_one_chip("decode-8-hsa", tmp_path)
    pages = 2 * 2 * (8 * 262144 * 128)
    assert pages < decode["alias"] < 1.05 * pages
    assert decode["copied"] == 0
    assert decode["temp"] < 64 * MB


@pytest.mark.slow
def test_decoding_by_kernels_is_in_place(tmp_path):
    """8 streams on one chip: a kernel a layer reads the caches as they lie."""
    decode = _bytes_on_one_chip("decode-8-kernels", tmp_path)
    assert decode["kernels"] == 2
    assert decode["alias"] >= 2 * 2 * (8 * 8 * 4096 * 128 * 2)
    assert decode["copied"] == 8 * 128256 * 4  # the logits alone
    assert decode["temp"] < 16 * MB


@pytest.mark.slow
def test_prefill_needs_little_beside_its_weights(tmp_path):
    prefill = _bytes_on_one_chip("prefill-512", tmp_path)
    embedding = 2 * 128256 * 4096 / 4  # the output layer is not used
    slots = 2 * 2 * (4096 * 128 * 2) * 2
    expected = 2 * _expected_layer(4) + embedding + slots
    assert prefill["argument"] == pytest.approx(expected, rel=0.01)
    assert prefill["alias"] >= slots
    assert prefill["temp"] < 64 * MB  # logits of a chunk against a block of slots, MLP channels; no copy of weights


@pytest.mark.slow
def test_decoding_by_kernels_on_a_mesh_says_no_more_between_chips(tmp_path):
    """Each of 8 chips calls the kernels on its own streams and key heads; the caches stay as they lie."""
    decode = _bytes_on_one_chip("decode-8-kernels-mesh", tmp_path)
    assert decode["kernels"] == 2
    assert decode["copied"] == 0
    assert decode["alias"] >= 2 * 2 * (4 * 2 * 4096 * 128 * 2)
    assert decode["temp"] < 16 * MB
    assert decode["collectives"] == {"all-reduce bf16[4,1,4096]": 1, "all-reduce bf16[4,4096]": 4}


def test_axes_of_eight_lie_on_a_torus_of_four(tmp_path):
    """Sizes that are no product of a slice's dimensions: half of one, or one and a half."""
    code = "from benchmarks import aot; print(aot.tpu_mesh('v5p:4x4x4', fsdp=8, context=8).shape['context'])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=aot.child_environment("v5p:4x4x4"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8"]

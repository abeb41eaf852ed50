"""What `benchmarks/gpu_kernels.py` does where there is no GPU, and the work that it counts."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks.gpu_kernels import pairs
from pallas_kernels.patterns import Full, SinkWindow, SlidingWindow


@pytest.mark.parametrize("pattern", [Full(), SlidingWindow(7), SlidingWindow(90), SinkWindow(3, 7), SinkWindow(20, 4)])
def test_counts_the_pairs_of_a_pattern(pattern):
    index = jnp.arange(40)
    assert pairs(pattern, 40) == int(jnp.sum(pattern.visible(index[:, None], index[None])))


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no GPU here" in done.stdout
    assert not output.exists()

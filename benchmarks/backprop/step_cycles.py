"""How long one gradient step takes on one TPU that is not there, by the chip's own compiler: `step_cycles`.

XLA's part is what the compiler expects of it (`benchmarks/estimated_cycles.py`). The kernels' part are the bundles of
their schedules times the steps of their grids, over the cores of the chip; or what their products take at the chip's
peak, where that is more: waiting for the matrix units does not show in a schedule. Left out are copies that do not end
beside what is computed, and what is not computed by XLA or by a kernel of attention or of the loss.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.backprop.compile_case import Case, compile_case
from benchmarks.kernels import cross_entropy
from benchmarks.kernels.schedules import flash, schedule_listing
from pallas_kernels.tpu.flash_attention import BLOCK_K, BLOCK_Q
from streamjax import UniformConfig
from streamjax.training.backprop.head.passes import KERNEL_BLOCK


class Chip(NamedTuple):
    """Cores of a chip, what one multiplies and adds in a cycle (counted as two), and its cycles a second.

    The clock is the published peak in bfloat16 over that: four units of 128 x 128.
    """

    cores: int
    flops: int
    clock: float


CHIPS = {"v5e": Chip(1, 4 * 2 * 128**2, 197e12 / (4 * 2 * 128**2)), "v5p": Chip(2, 4 * 2 * 128**2, 229.5e12 / 131072)}
_ATTENTION = {"flash_forward": "forward", "flash_query_gradients": "dq", "flash_key_gradients": "dkv"}
_PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a tile


def step_cycles(case: Case) -> dict[str, Any]:
    """Compile a case with kernels, and read what it takes.

    Args:
      case: of one sequence, of a model whose layers are alike, with full attention; at most one share for all layers.

    Returns:
      What `compile_case` does; where the program fits also seconds: `xla`, `attention`, `loss`, and `seconds` of all.

    Raises:
      RuntimeError: the compile failed, or a kernel that runs has no schedule.
    """
    config, (name, *_) = case.config, case.topology.split(":")
    assert isinstance(config, UniformConfig)
    assert (case.batch, case.kernels) == (1, True)
    chip = CHIPS[name]
    with tempfile.TemporaryDirectory() as folder:
        found = compile_case(case, schedules=Path(folder))
        if "cycles" not in found:
            return found
        tokens = round((case.shares or (1.0,))[0] * (case.length // 64)) * 64
        cycles = {"xla": float(found["cycles"]), "attention": 0.0, "loss": 0.0}
        for kernel, runs in found["runs"].items():
            listings = schedule_listing.listings(Path(folder), kernel)
            if not listings:
                raise RuntimeError(f"{case.topology}, {case.arguments}: no schedule of {kernel}")
            if kernel in _ATTENTION:
                kinds = {_attention(name, _ATTENTION[kernel], config, tokens, each) for each in listings}
                cycles["attention"] += runs * max(kinds) / chip.cores
            else:
                steps, pieces = cross_entropy.steps_of(kernel, KERNEL_BLOCK, config.d_model, config.vocab_size)
                kinds = {cross_entropy.bundles(each, steps, pieces) for each in listings}
                flops = 2 * KERNEL_BLOCK * config.d_model * config.vocab_size * (1 if kernel.endswith("forward") else 3)
                cycles["loss"] += runs * max(*kinds, flops / chip.flops) / chip.cores
        seconds = {part: count / chip.clock for part, count in cycles.items()}
        return {**found, **seconds, "seconds": sum(seconds.values())}


def _attention(chip: str, kernel: str, config: UniformConfig, tokens: int, listing: Path) -> float:
    """Cycles of a core for all heads of a layer."""
    block_q, block_k = (min(block, -(-tokens // 128) * 128) for block in (BLOCK_Q, BLOCK_K))
    steps = flash.steps_of(kernel, tokens, None, block_q, block_k)
    loop = schedule_listing.read(listing)
    case = flash.Case("ours", chip, "causal", f"{block_q}x{block_k}")
    found = {"steps": steps, "always": loop.always, "regions": [[*region] for region in loop.regions]}
    products = 2 * _PRODUCTS[kernel] * block_q * block_k * max(128, config.head_dim) * (steps.whole + steps.cut)
    return config.num_heads * max(flash.cost(case, kernel, found)["bundles"], products / CHIPS[chip].flops)

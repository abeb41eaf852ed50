"""What the tables on experts say of a compiled program: collectives by kind, and bytes put right."""

from benchmarks.models import experts_on_tpu

TEXT = """
  %a.1 = bf16[16,4096,2048]{2,1,0:T(8,128)(2,1)} all-gather(%x), channel_id=1, dimensions={0}
  %b = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), channel_id=2, dimensions={0}
  %c = (f32[8]{0}, bf16[2,8]{1,0}) all-reduce(%p, %q), channel_id=3, to_apply=%add
  %d = bf16[16,8]{1,0} all-gather-done(%b)
  %e = bf16[16,8]{1,0} fusion(%d), kind=kLoop, calls=%f
"""


def test_collectives_of_a_program():
    assert experts_on_tpu.collectives(TEXT) == {
        "all-gather": {"count": 2, "bytes": 2 * (16 * 4096 * 2048 + 16 * 8), "largest": "bf16[16,4096,2048]"},
        "all-reduce": {"count": 1, "bytes": 4 * 8 + 2 * 16, "largest": "f32[8]"},
    }


def test_accessed_bytes_have_the_experts_that_a_loops_body_leaves_out():
    figures = {
        "weights": 1000, "experts": 600, "embedding": 100, "chosen": 60, "one_each": 20, "state": 40, "temp": 0,
        "moved": 460, "ragged": False,
    }  # fmt: skip
    tiles = experts_on_tpu.decode_row("qwen3-v5e-1", {k: v * 10**6 for k, v in figures.items()})
    assert (tiles["floor"], tiles["accessed"], tiles["x floor"]) == ("400", "500", "1.25")
    ragged = experts_on_tpu.decode_row("qwen3-v5e-1", {k: v * 10**6 for k, v in figures.items()} | {"ragged": True})
    assert (ragged["experts by"], ragged["accessed"]) == ("ragged_dot", "460")

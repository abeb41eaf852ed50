"""How many slots of a cache queries attend to at a time, where no kernel does it."""

from __future__ import annotations

import jax

SLOT_BLOCK = 512  # logits of one chunk against at most this many slots exist at a time
DECODE_SLOT_BLOCK = 8192  # the same for a single token, whose logits are few
LEAST_DECODE_BLOCK = 128  # of a single token on a CPU, which reads slots in quarters as far as they are filled
CODED_SLOT_BLOCK = 1024  # of a single token where slots are codes: what is decoded stays in the cache


def slot_block(slots: int, single: bool, bounded: bool, coded: bool = False) -> int:
    """How many slots a chunk of queries, or a `single` one, attends to at a time.

    A CPU reads memory slowly and begins a loop's turn fast: where it is known how far slots are filled (`bounded`), a
    single query visits quarters of them. Elsewhere, and on several devices, which would have to agree on the turns of a
    loop, it reads all at once. Slots that are `coded` are decoded a block at a time everywhere.
    """
    if not single:
        return SLOT_BLOCK if coded else min(slots, SLOT_BLOCK)
    if coded:
        return CODED_SLOT_BLOCK
    if bounded and jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty:
        return min(slots, DECODE_SLOT_BLOCK, max(LEAST_DECODE_BLOCK, -(-slots // 4)))
    return min(slots, DECODE_SLOT_BLOCK)

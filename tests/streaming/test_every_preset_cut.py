"""What the cut of a stream into chunks does to every preset, as the table of docs/caches.md says it."""

import re
from pathlib import Path

import numpy as np
import pytest

import streamjax as sj
from tests.streaming.tiny_models import GQA, build, random_tokens, read_padded

WIDTH, BEHIND = 24, 3
PAGE = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()
SMALL = {
    "inf_llm": {"window": 32},
    "cskv": {"group": 32, "window": 32},
    "razor_attention": {"recent": 32, "capacity": 256},
}
BYTES = {"cskv": 2e5, "inf_llm": 1.5e5, "lserve": 2e5, "mpcache": 1.5e5, "scissorhands": 1e5, "shadow_kv": 3e5,
         "staircase": 1e5}  # fmt: skip
# hsa has tests of its own (tests/models/mixers/test_hierarchical.py); a bank is read by a side network
UNREAD = ("hsa", "long_mem", "loop_serve", "minicache", "xkv")


def rows() -> dict[str, list[str]]:
    """The presets of each row, by its first word."""
    section = PAGE.split("### How cuts show")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (\w+)[^|]*\|[^|]*\| ([^|]*`[^|]*)\|$", section, re.MULTILINE)
    return {word: re.findall(r"`(\w+)`", names) for word, names in lines}


@pytest.mark.quick
def test_every_preset_stands_in_one_row():
    found = sorted(name for names in rows().values() for name in names)
    assert found == sorted(sj.kv.presets())


def streams():
    kinds = [(word, name) for word, names in rows().items() for name in names]
    known = sj.kv.presets()
    return [(word, name) for word, name in kinds if name not in UNREAD and not set(known[name].needs) - {"heads"}]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), streams(), ids=lambda x: x)
def test_streams_are_cut_anyhow(kind, name, tmp_path):
    """Token by token, by sevens and by 24, in one layer, over more tokens than are held where there is no end."""
    model = build(GQA.replace(num_layers=1, head_dim=16))
    gates = tmp_path / "gates.json"
    gates.write_text('{"gates": [[0.9, 0.1]]}')
    entry = sj.kv.presets()[name]
    options = {"heads": str(gates)} if "heads" in entry.options else {}
    budget = BYTES.get(name, 1e5 if "capacity" in entry.options else 5e4)
    options |= SMALL.get(name, {})
    fixed = name == "razor_attention"  # its compensated heads have no size to find
    cache = sj.kv.preset(name, **options) if fixed else sj.kv.sized(name, model, budget, **options)
    if isinstance(cache, sj.kv.Budgeted) and cache.unmeasured:
        cache = cache.cascade
    layers = sj.init_state(model, cache).caches
    end = min(x.capacity or 10**6 for x in layers)
    length = min(end - BEHIND, max(2 * max(x.slots for x in layers), 160), 384) // WIDTH * WIDTH
    tokens = random_tokens(1, length, seed=3)[0]
    found = {}
    for width in (1, 7, WIDTH):
        counts = [width] * (length // width) + [length % width] * (length % width > 0)
        state, logits = read_padded(model, sj.init_state(model, cache), tokens, counts, WIDTH)
        found[width] = logits, read_padded(model, state, tokens[:BEHIND], [1] * BEHIND, WIDTH)[1]
    logits, later = found.pop(1)
    for others, seen in found.values():
        far = np.abs(others - logits).max() / np.abs(logits).max()
        assert far < 1e-4 if kind == "nothing" else kind != "attention" or far > 1e-4, far
        if kind != "attention":  # what tokens see that come behind is what is stored
            np.testing.assert_allclose(seen, later, atol=2e-4 * np.abs(logits).max(), rtol=0)

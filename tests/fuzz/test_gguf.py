"""GGUF files with changes that chance has made: they load, or are refused in one line."""

import random
import struct
import warnings

import pytest

import streamjax as sj
from streamjax.checkpoints.gguf_header import read_header
from tests.fuzz.mutations import PIECES, draws, mutate_bytes, read_or_refused
from tests.gguf_files import byte_tokenizer, tiny_llama

WHOLE = [0, 1, 2, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file, and where its header ends."""
    file = tiny_llama(tmp_path_factory.mktemp("gguf") / "x.gguf", tokenizer=byte_tokenizer(), width=16)
    header = read_header(file)
    return file.read_bytes(), min(tensor.offset for tensor in header.tensors.values())


def mutate(data, rng):
    """A change of any kind, or another number where one of four or eight bytes may stand."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    at = rng.randrange(len(data) - 8)
    value = rng.choice(WHOLE)
    new = struct.pack("<Q", value) if rng.random() < 0.5 else struct.pack("<I", value & 0xFFFFFFFF)
    return data[:at] + new + data[at + len(new) :]


def numbers(data):
    """Places of the metadata's and the tensors' own numbers: behind each key, and behind each tensor's name."""
    keys = [
        at for name in (b"llama.", b".weight", b"tokenizer.") for at in range(len(data)) if data.startswith(name, at)
    ]
    return [at + offset for at in keys for offset in range(5, 50) if at + offset + 8 < len(data)]


def mutate_number(data, places, rng):
    at, value = rng.choice(places), rng.choice(WHOLE)
    return data[:at] + struct.pack("<I", value & 0xFFFFFFFF) + data[at + 4 :]


@draws(60)
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_changed_file_is_read_or_refused_in_one_line(whole, tmp_path, what, draws, capfd):
    data, head = whole
    file = tmp_path / "x.gguf"
    places = numbers(data[:head])
    rng = random.Random(what)
    read = sj.load if what == "model" else sj.load_tokenizer
    refused = 0
    for draw in range(draws):
        start = mutate_number(data[:head], places, rng) if draw % 2 else mutate(data[:head], rng)
        file.write_bytes(start + data[head:])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody knows
            found, _ = read_or_refused(lambda: read(file), (draw, start[:600]))
        capfd.readouterr()  # the tokenizers' Rust code writes its panics to the process's stderr
        refused += found is None
    assert refused


def test_any_bytes_are_refused(tmp_path):
    file = tmp_path / "x.gguf"
    for piece in [*PIECES, b"GGUF" + b"\xff" * 200, b"GGUF\x03\0\0\0" + b"\0" * 200]:
        file.write_bytes(piece)
        for read in (sj.load, sj.load_tokenizer):
            assert read_or_refused(lambda read=read: read(file), piece[:100])[0] is None

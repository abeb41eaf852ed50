"""Headers of GGUF files: what the gguf package reads, and one line for a file that cannot be."""

import struct
import time

import gguf
import numpy as np
import pytest

from streamjax.checkpoints.gguf_header import read_header
from streamjax.evaluation import peak_resident_bytes
from tests.gguf_files import byte_tokenizer, tiny_llama, write_gguf

MAGIC, KEY = b"GGUF", b"general.architecture"


def number(value, size=8):
    return value.to_bytes(size, "little")


def text(value):
    return number(len(value)) + value


def start(tensors, keys, version=3):
    return MAGIC + number(version, 4) + number(tensors) + number(keys)


def entry(key, code, value):
    return text(key) + number(code, 4) + value


def tensor(name=b"x", shape=(4,), kind=0, offset=0, axes=None):
    sizes = b"".join(map(number, shape))
    return text(name) + number(len(shape) if axes is None else axes, 4) + sizes + number(kind, 4) + number(offset)


def test_a_header_is_that_of_the_gguf_package(tmp_path):
    kinds = {"blk.0.ffn_down.weight": gguf.GGMLQuantizationType.Q8_0}
    values = {"a": -3, "b": True, "c": [1, 2], "d": [0.5], "e": [True, False], "f": ["x", "東"]}
    file = tiny_llama(
        tmp_path / "x.gguf", kinds, byte_tokenizer(), values={k: v for k, v in values.items() if k != "a"}
    )
    header, reader = read_header(file), gguf.GGUFReader(file)
    assert header.values.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
    for key, value in header.values.items():
        theirs = reader.fields[key].contents()
        mine = float(np.float32(value)) if isinstance(value, float) else value
        assert (list(value) if isinstance(theirs, list) else mine) == theirs, key
    assert list(header.tensors) == [found.name for found in reader.tensors]
    for found in reader.tensors:
        mine = header.tensors[found.name]
        assert (mine.kind, mine.offset) == (found.tensor_type, found.data_offset)
        assert mine.shape == tuple(found.shape.tolist()[::-1])
        assert mine.rows * mine.row_bytes == found.n_bytes


def test_every_kind_of_value_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    expected = {}
    for name, value in (("uint8", 250), ("int8", -3), ("uint16", 65000), ("int16", -300), ("int32", -70000)):
        getattr(writer, f"add_{name}")(name, value)
        expected[name] = value
    for name, value in (("uint64", 2**63), ("int64", -(2**40)), ("float32", 0.5), ("float64", 1e-300)):
        getattr(writer, f"add_{name}")(name, value)
        expected[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    values = read_header(tmp_path / "x.gguf").values
    assert {key: values[key] for key in expected} == expected


DAMAGED = {
    "empty": (b"", "no GGUF file: it begins with b''"),
    "other": (b"PK\x03\x04", "no GGUF file"),
    "magic alone": (MAGIC, "it ends at byte 4, in its header"),
    "version 1": (start(0, 0, version=1), "of version 1"),
    "big-endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors": (start(2**60, 0), "1152921504606846976 tensors"),
    "keys": (start(0, 2**40), "1099511627776 values in the metadata"),
    "key": (start(0, 1) + number(2**62) + b"x" * 64, "4611686018427387904 characters"),
    "no UTF-8": (start(0, 1) + entry(b"\xff", 8, text(b"x")), "is no UTF-8"),
    "twice": (start(0, 2) + entry(KEY, 8, text(b"x")) * 2, "stands twice"),
    "string": (start(0, 1) + entry(KEY, 8, number(2**63)), "characters"),
    "type": (start(0, 1) + entry(KEY, 77, number(0)), "unknown type 77"),
    "numbers": (start(0, 1) + entry(KEY, 9, number(4, 4) + number(2**61)), "entries of 'general.architecture'"),
    "strings": (start(0, 1) + entry(KEY, 9, number(8, 4) + number(2**30)), "entries of 'general.architecture'"),
    "nested": (start(0, 1) + entry(KEY, 9, (number(9, 4) + number(1)) * 9), "unknown type 9"),
    "alignment": (start(0, 1) + entry(b"general.alignment", 4, number(24, 4)), "no power of two"),
    "axes": (start(1, 0) + tensor(axes=2**31), "2147483648 axes of 'x'"),
    "kind": (start(1, 0) + tensor(kind=999), "the type 999"),
    "block": (start(1, 0) + tensor(kind=2), "of type Q4_0 has the shape [4]"),
    "no size": (start(1, 0) + tensor(shape=(0,)), "has the shape [0]"),
    "beyond": (start(1, 0) + tensor(offset=2**40), "download it again"),
    "large": (start(1, 0) + tensor(shape=(2**62, 2**62)), "download it again"),
    "two": (start(2, 0) + tensor() * 2 + bytes(64), "two tensors 'x'"),
    "overlap": (start(2, 0) + tensor() + tensor(b"y", offset=8) + bytes(128), "'x' and 'y' overlap"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_cannot_be_is_one_line(case, tmp_path):
    data, message = DAMAGED[case]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    before, since = peak_resident_bytes(), time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is looked at
        read_header(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - since < 5
    assert peak_resident_bytes() - before < 1e8


def test_a_file_that_ends_early_is_one_line_wherever_it_ends(tmp_path):
    whole = tiny_llama(tmp_path / "whole.gguf", tokenizer=byte_tokenizer(), width=16).read_bytes()
    file = tmp_path / "cut.gguf"
    for stop in np.unique(np.geomspace(1, len(whole) - 1, 300).astype(int)):
        file.write_bytes(whole[:stop])
        with pytest.raises(ValueError, match=str(file)) as caught:
            read_header(file)
        assert len(str(caught.value).splitlines()) == 1


def test_values_are_of_the_kind_that_is_asked_for(tmp_path):
    header = read_header(write_gguf(tmp_path / "x.gguf", "x", {"size": 3, "eps": 0.5, "nan": float("nan")}, {}))
    assert header.get("x.size", int) == 3
    assert header.get("x.size", float) == 3
    assert header.get("x.none", int, 7) == 7
    for key, kind, message in (
        ("x.none", int, "its metadata have no 'x.none'"),
        ("x.eps", int, "'x.eps' is 0.5; expected int"),
        ("x.nan", float, "'x.nan' is nan; expected float"),
        ("general.architecture", list, "expected list"),
    ):
        with pytest.raises(ValueError, match=message):
            header.get(key, kind)

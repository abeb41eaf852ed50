"""Pages on disk: a stream is read by one process, asked by another; what is damaged is found and the rest stays."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import streamjax as sj
from streamjax.kv.pages.disk_files import PageFiles, PageLayout, PageWriter
from streamjax.streaming.rekv import StreamWriter, ask, choose_pages, fingerprint
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, PARTIAL, build, random_tokens

PAGE = 4


def write(folder, model, tokens, window=64, **options):
    with StreamWriter(model, folder, window=window, page=PAGE, chunk_size=8, **options) as writer:
        for start in range(0, len(tokens), 7):  # pieces that end anywhere
            writer.read(tokens[start : start + 7])
    return PageFiles(folder)


@pytest.mark.usual("gqa-room-in-the-last-page")
@pytest.mark.parametrize(
    ("config", "length"),
    [
        pytest.param(GQA, 40, marks=pytest.mark.slow),
        (GQA, 42),
        (ALIBI, 40),
        pytest.param(PARTIAL, 40, marks=pytest.mark.slow),
    ],
    ids=["gqa", "gqa-room-in-the-last-page", "alibi", "partial"],
)
def test_with_every_page_a_question_is_answered_as_by_dense_attention(tmp_path, config, length):
    """The window holds the whole stream, so its keys are dense attention's; the answer's logits too."""
    model = build(config)
    tokens = random_tokens(1, length + 6)
    pages = write(tmp_path / "p", model, tokens[0, :length])
    assert (pages.tokens, pages.pages, pages.damaged) == (length, -(-length // PAGE), [])
    state = ask(model, pages, tokens[0, length : length + 3], top_k=99)
    found = [model.logits(state.hidden[:, None])[:, 0]]
    for i in range(3):
        state, logits = sj.step(model, state, tokens[:, length + 3 + i : length + 4 + i])
        found.append(logits[:, 0])
    if length % PAGE == 0:
        expected = sj.forward(model, tokens)[:, length + 2 :]
        np.testing.assert_allclose(np.stack(found, 1), expected, atol=1e-4)
    else:  # the question stands behind the whole last page
        gap = -length % PAGE
        places = np.concatenate((np.arange(length), np.arange(length, length + 6) + gap))[None]
        expected = sj.forward(model, tokens, positions=places)[:, length + 2 :]
        np.testing.assert_allclose(np.stack(found, 1), expected, atol=1e-4)


def test_the_chosen_pages_are_those_most_like_the_question(tmp_path):
    """Cosines by a loop of their own; a page is in the answer or it is not."""
    model, tokens = build(GQA), random_tokens(1, 60)
    pages = write(tmp_path / "p", model, tokens[0], window=16)
    query = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    scores = []
    for page in range(pages.pages):
        k, _ = pages.read(1, np.array([page]))
        mean = k[0].mean(axis=1, dtype=np.float64)
        scores.append((mean * query).sum() / np.linalg.norm(mean) / np.linalg.norm(query))
    best = sorted(sorted(range(15), key=lambda p: -scores[p])[:4])
    assert choose_pages(pages, 1, query, 4).tolist() == best


def test_keys_in_the_files_do_not_depend_on_where_they_stood(tmp_path):
    """They are turned back: the same tokens seen through a short window, later in a stream, leave the same page."""
    model, tokens = build(GQA.replace(num_layers=1)), random_tokens(1, 48)
    tokens[0, 40:44] = tokens[0, 8:12]
    pages = write(tmp_path / "p", model, tokens[0], window=8)
    (first, _), (later, _) = pages.read(0, np.array([2])), pages.read(0, np.array([10]))
    np.testing.assert_allclose(first, later, atol=1e-5)


@pytest.mark.slow
def test_another_process_asks(tmp_path):
    """With nothing but the model and the folder."""
    model, tokens = build(GQA), random_tokens(1, 24)
    sj.save(model, tmp_path / "model")
    pages = write(tmp_path / "pages", model, tokens[0])
    _, here = sj.generate(
        model, ask(model, pages, tokens[0, :3], top_k=2), np.zeros((1, 0), np.int32), max_new_tokens=5,
        sampler=sj.Sampler(temperature=0),
    )  # fmt: skip
    code = f"""
import numpy as np, streamjax as sj
from streamjax.kv.pages.disk_files import PageFiles
from streamjax.streaming.rekv import ask
model = sj.load({str(tmp_path / "model")!r})
state = ask(model, PageFiles({str(tmp_path / "pages")!r}), np.array({tokens[0, :3].tolist()}), top_k=2)
print(sj.generate(model, state, np.zeros((1, 0), int), max_new_tokens=5, sampler=sj.Sampler(temperature=0))[1].tolist())
"""
    root = Path(sj.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(np.asarray(here).tolist())


def test_damaged_pages_are_refused_and_the_others_stay(tmp_path):
    """A file cut short, a flipped bit in a page, and one in the index."""
    model, tokens = build(GQA), random_tokens(1, 32)
    folder = tmp_path / "p"
    good = write(folder, model, tokens[0])
    whole = good.read(1, np.arange(8))
    file, size = folder / "layer_001.pages", good.layout.page_bytes
    data = file.read_bytes()
    file.write_bytes(data[: 6 * size + 10])
    short = PageFiles(folder)
    assert short.damaged == [(1, 6), (1, 7)]
    np.testing.assert_array_equal(short.read(1, np.arange(6))[0], whole[0][:6])
    with pytest.raises(ValueError, match=r"layer_001.pages: page 6 is damaged, its checksum is wrong; other pages"):
        short.read(1, np.array([6]))
    assert 6 not in choose_pages(short, 1, np.ones((2, 6), np.float32), 6)
    with pytest.raises(ValueError, match="8 pages are asked for, and 6 can be read in layer 1"):
        ask(model, short, tokens[0, :2], top_k=8)
    file.write_bytes(data[: 2 * size + 5] + bytes([data[2 * size + 5] ^ 1]) + data[2 * size + 6 :])
    flipped = PageFiles(folder)
    with pytest.raises(ValueError, match="page 2 is damaged"):
        flipped.read(1, np.arange(8))
    np.testing.assert_array_equal(flipped.read(1, np.array([1, 3]))[1], whole[1][[1, 3]])
    file.write_bytes(data)
    index = folder / "layer_001.index"
    entries = bytearray(index.read_bytes())
    entries[good.layout.index_dtype.itemsize * 3] ^= 1
    index.write_bytes(bytes(entries))
    assert PageFiles(folder).damaged == [(1, 3)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: StreamWriter(m, p / "x", window=8, page=9), "page is 9: use 1 to 8, the window"),
        (lambda m, p: StreamWriter(m, p, window=8, page=4), "is not empty"),
        (lambda m, p: StreamWriter(build(LOCAL), p / "x"), "this one has windows"),
        (lambda m, p: PageFiles(p / "none"), "manifest.json: this file is missing"),
        (lambda m, p: ask(build(GQA, seed=1), PageFiles(p), np.array([1]), top_k=1), "were written by another model"),
        (lambda m, p: ask(m, PageFiles(p), np.zeros(0, int), top_k=1), "the question has no tokens"),
        (lambda m, p: ask(m, PageFiles(p), np.array([1]), top_k=0), "top_k is 0, of 2 pages"),
        (lambda m, p: PageFiles(p).read(0, np.array([2])), "there is no page 2, the stream has 2"),
    ],
)
def test_bad_requests_are_one_line(tmp_path, call, message):
    model = build(GQA)
    write(tmp_path, model, random_tokens(1, 8)[0])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(model, tmp_path)
    assert "\n" not in str(error.value)


def test_only_the_last_page_may_have_room(tmp_path):
    layout = PageLayout(1, 1, 2, 4, "float32", "")
    writer, page = PageWriter(tmp_path, layout), [np.zeros((1, 4, 2), np.float32)]
    writer.append(page, page, 3)
    with pytest.raises(ValueError, match="written whole"):
        writer.append(page, page, 4)


@pytest.mark.parametrize(("config", "expected"), [(GQA, "3806c42a"), (LOCAL, "f365b7d5"), (ALIBI, "8888a2d9")])
def test_pages_of_earlier_versions_are_still_the_models_own(config, expected):
    """The text was that before configurations had more fields."""
    assert fingerprint(build(config)).startswith(expected)

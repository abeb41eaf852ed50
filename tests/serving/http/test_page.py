"""The page at `/`: in headless Chromium where there is one; else that its files are there and hang together."""

import os
import re
from pathlib import Path

import pytest

from streamjax.evaluation.cache_sizes import CacheSizes, PartSize
from tests.serving.http.browser import CHROMIUM, chromium
from tests.serving.http.conftest import fake_service, patient, serving, until

SIZES = CacheSizes((
    PartSize((0, 1, 2, 3), "Sink(4)", 4, 4096, 40),
    PartSize((0, 1, 2, 3), "Window(28)", 28, 28672, 280),
    PartSize((), "the stream itself", 0, 0, 1032),
))  # fmt: skip


@pytest.fixture
def page_server():
    engine, service = fake_service(cache_sizes=SIZES, cache_words="Sink(4) > Window(28)", trained_length=32)
    engine.answer = lambda request: "Hello <b>you</b>.\nA second line."
    with serving(engine, service) as running:
        yield running


def test_its_files_are_served_and_nothing_comes_from_elsewhere(server):
    answer = patient.get(server.url)
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    names = re.findall(r'(?:src|href)="(/[^"]+)"', answer.text)
    assert len(names) == 3
    texts = [answer.text]
    for name in [*names, "/page/plots.js"]:
        part = patient.get(server.url + name)
        assert part.status_code == 200
        texts.append(part.text)
    assert not [text for text in texts if re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)]
    assert patient.get(f"{server.url}/page/../app.py").status_code == 404
    assert patient.get(f"{server.url}/page/%2e%2e/app.py").status_code == 404


def test_what_it_shows(page_server):
    about = patient.get(f"{page_server.url}/v1/streamjax").json()
    assert about["cache"]["bytes"] == SIZES.total
    assert [part["part"] for part in about["cache"]["parts"]] == ["Sink(4)", "Window(28)", "the stream itself"]
    assert about["engine"]["rows"] == 4


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_chat_in_a_browser(page_server, tmp_path):
    """STREAMJAX_SCREENSHOTS=FOLDER keeps the pictures, to be looked at."""
    pictures = Path(os.environ.get("STREAMJAX_SCREENSHOTS", tmp_path))
    answered = "document.querySelectorAll('.assistant').length === {} && document.getElementById('stop').hidden"
    with chromium(tmp_path / "profile") as page:
        page.size(1200, 760)
        page.open(page_server.url)
        page.until("document.getElementById('model').textContent.includes('tiny')")
        for turn in range(3):
            assert page.value("document.activeElement.id") == "text"  # no mouse is needed
            page.type(f"Say hello {turn}")
            page.press("Enter", 13, "\r")
            page.until(answered.format(turn + 1))
        last = page.value("[...document.querySelectorAll('.assistant')].at(-1).textContent")
        assert last == "Hello <b>you</b>.\nA second line."  # text, whatever it looks like
        requests = page_server.engine.requests
        assert len({request.conversation for request in requests}) == 1
        assert len(requests[-1].prompt) < 50  # the new turn alone
        seen = page.until(
            f"document.getElementById('tokens-now').textContent.replace(/,/g, '') === "
            f"'{page_server.engine.kept[requests[0].conversation].tokens_seen}'"
        )
        assert seen
        assert page.value("document.getElementById('bytes-now').textContent") == "133 kB a stream"
        assert page.value("[...document.querySelectorAll('[role=meter]')].map(e => e.ariaValueNow)") == ["4", "28"]
        assert page.value("document.getElementById('forgotten').textContent").endswith("have left the cache.")
        assert page.value("document.querySelectorAll('aside svg polyline').length") == 4
        flat = page.value("document.querySelector('#bytes .one').getAttribute('points')")
        assert len({point.partition(",")[2] for point in flat.split()}) == 1
        page.screenshot(pictures / "wide.png")
        page.size(1200, 760, dark=True)
        page.screenshot(pictures / "dark.png")
        page.size(360, 740)
        page.until("document.documentElement.scrollWidth <= 360")
        page.screenshot(pictures / "narrow.png")
        page.open(page_server.url)  # again: the conversation is there
        page.until("document.querySelectorAll('.message').length === 6")
        page_server.engine.answer, page_server.engine.pause = (lambda request: "x" * 2000), 0.02
        page.type("Write much")  # the page may not know yet what it talks to: then it sends when it does
        page.press("Enter", 13, "\r")
        page.until("document.querySelectorAll('.message').length === 8 && !document.getElementById('stop').hidden")
        page.press("Escape", 27)
        page.until("document.getElementById('stop').hidden")
        until(page_server.engine.tickets[-1].cancelled.is_set)  # the server sees in its own time that the page has gone
        page.until("fetch('/v1/streamjax').then(answer => answer.ok)")
        assert not page.problems

"""A server over a scripted engine, on a real socket of the loopback, shared by the tests of a file."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
from websockets.sync.client import connect

from streamjax.data.text.tokenizers import ByteTokenizer
from streamjax.serving.http.app import make_app
from streamjax.serving.http.connections import listen, make_server
from streamjax.serving.http.service import Service
from tests.serving.http.fake_engine import FakeEngine

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\x1e\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

PATIENCE = 600.0  # seconds; what a machine that has much else to do may take, and what no test waits for otherwise
patient = SimpleNamespace(
    get=partial(httpx.get, timeout=PATIENCE),
    post=partial(httpx.post, timeout=PATIENCE),
    delete=partial(httpx.delete, timeout=PATIENCE),
    stream=partial(httpx.stream, timeout=PATIENCE),
    socket=partial(connect, open_timeout=PATIENCE, ping_interval=None, max_size=None),
)


class Running:
    """A server, its engine, and clients of it."""

    def __init__(self, engine, service, port: int):
        self.engine, self.service, self.port = engine, service, port
        self.url = f"http://127.0.0.1:{port}"
        self._clients: dict[str, openai.OpenAI] = {}  # each costs a tenth of a second

    def client(self, key: str = "none") -> openai.OpenAI:
        if key not in self._clients:
            self._clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)
        return self._clients[key]


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for what another thread brings about: a machine may be busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def serving(engine, service, **options) -> Iterator[Running]:
    """Serve until the block ends."""
    with listen("127.0.0.1", 0) as own:
        server = make_server(make_app(service, **options), shutdown_seconds=2)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + PATIENCE
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            yield Running(engine, service, own.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def fake_service(template: str | None = TEMPLATE, **options) -> tuple[FakeEngine, Service]:
    """A service of bytes over a scripted engine."""
    tokenizer = ByteTokenizer(chat_template=template)
    engine = FakeEngine(tokenizer)
    return engine, Service(engine, "tiny", tokenizer, 259, (257,), **options)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine, service = fake_service(most_requests=40)
    with serving(engine, service) as running:
        yield running


@pytest.fixture
def engine(server: Running) -> Iterator[FakeEngine]:
    """The server's engine, as it was at first."""
    engine = server.engine
    engine.answer, engine.failure, engine.pause = (lambda request: "hello"), None, 0.0
    engine.requests.clear()
    engine.tickets.clear()
    yield engine
    engine.held.set()

"""Clients that are slow, gone, silent, many or wrong: none holds the engine, and memory is bounded."""

import contextlib
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest

from streamjax.serving.http.connections import Connection
from tests.serving.http.conftest import PATIENCE, fake_service, patient, serving, until
from tests.serving.http.test_chat import HI

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
CHAT = {"model": "tiny", "messages": HI}


def post_raw(server, body: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port)) as own:
        own.sendall(HEAD.replace(b"\r\nContent", b"\r\nConnection: close\r\nContent") % len(body) + body)
        answer = b""
        while part := own.recv(1 << 16):
            answer += part
        return answer


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'"text"',
        b"[" * 100_000,
        b'{"a":' * 99 + b"1" + b"}" * 99,
    ],
)
def test_what_is_no_request_is_refused_in_one_line(server, engine, body):
    answer = post_raw(server, body)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_json"


def test_bodies_are_bounded():
    engine, service = fake_service()
    with serving(engine, service, largest_body=1000) as running:
        for chunked in (False, True):
            body = b'{"x": "' + b"a" * 5000
            content = (body[i : i + 100] for i in range(0, len(body), 100)) if chunked else body
            answer = patient.post(f"{running.url}/v1/chat/completions", content=content)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert patient.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_row(server, engine, stream):
    engine.answer, engine.pause = (lambda request: "x" * 10_000), 0.01
    body = json.dumps({**CHAT, "stream": stream, "max_tokens": 10_000}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as own:
        own.sendall(HEAD % len(body))
        own.sendall(body)
        until(lambda: engine.tickets)
    until(lambda: engine.tickets[0].cancelled.is_set())
    engine.pause, engine.answer = 0.0, lambda request: "hello"
    assert patient.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200


def test_a_client_that_never_reads_is_cancelled_and_stops_nobody(monkeypatch):
    monkeypatch.setattr(Connection, "read_seconds", 2.0)
    engine, service = fake_service()
    engine.answer = lambda request: "x" * 200_000 if request.max_new_tokens > 1000 else "hello"
    with serving(engine, service) as running:
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 100_000}).encode()
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            own.connect(("127.0.0.1", running.port))
            own.sendall(HEAD % len(body))
            own.sendall(body)
            until(lambda: engine.tickets and engine.tickets[0].cancelled.is_set())
            assert patient.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200
            until(lambda: service._requests == 0)


def test_a_slow_reader_gets_all_of_it(server, engine):
    engine.answer = lambda request: "x" * 500
    with patient.stream("POST", f"{server.url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
        lines = []
        for line in answer.iter_lines():
            if len(lines) % 200 == 0:
                time.sleep(0.05)
            lines.append(line)
    assert sum('"content": "x"' in line for line in lines) == 500
    assert lines[-2] == "data: [DONE]"


def test_half_open_connections_end(monkeypatch):
    monkeypatch.setattr(Connection, "request_seconds", 2.0)
    engine, service = fake_service()
    with serving(engine, service) as running:
        silent = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
        for own in silent[::2]:
            own.sendall(b"POST /v1/chat/comp")
        assert patient.post(f"{running.url}/v1/chat/completions", json=CHAT).status_code == 200
        for own in silent:
            own.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                assert own.recv(10) == b""
            own.close()


def test_a_burst_is_shed_and_what_was_taken_is_answered(server, engine):
    engine.held.clear()

    def ask(_):
        answer = client.post(f"{server.url}/v1/chat/completions", json=CHAT)
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        return answer.status_code

    client = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=60))
    with client, ThreadPoolExecutor(60) as pool:
        found = pool.map(ask, range(100))
        until(lambda: len(engine.requests) == 40)  # the server's `most_requests`
        engine.held.set()
        statuses = list(found)
    assert set(statuses) == {200, 429}
    assert statuses.count(200) == len(engine.requests) >= 40
    assert patient.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 200


def test_the_engines_own_queue_sheds(server, engine):
    engine.held.clear()
    engine.most_waiting = 0
    try:
        answer = patient.post(f"{server.url}/v1/chat/completions", json=CHAT)
    finally:
        engine.most_waiting = 64
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")


def test_keys_hosts_and_origins():
    engine, service = fake_service()
    with serving(engine, service, keys=["one", "zwei-ü"]) as running:
        url = f"{running.url}/v1/models"
        assert patient.get(url).status_code == 401
        assert patient.get(url, headers={"Authorization": "Bearer wrong"}).json()["error"]["code"] == "invalid_api_key"
        assert patient.get(f"{running.url}/metrics").status_code == 401
        assert patient.get(url, headers={"Authorization": "Bearer one"}).status_code == 200
        assert [model.id for model in running.client("one").models.list()] == ["tiny"]
        assert patient.get(f"{running.url}/health").json()["status"] == "ok"
        assert patient.get(running.url).status_code == 200
        bad = {"Authorization": "Bearer one", "Origin": "http://elsewhere.example"}
        assert patient.get(url, headers=bad).status_code == 403
        assert patient.get(url, headers={"Authorization": "Bearer one", "Host": "elsewhere.example"}).status_code == 403
        assert patient.get(url, headers={"Authorization": "Bearer one", "Origin": running.url}).status_code == 200


def test_figures_for_prometheus(server, engine):
    patient.post(f"{server.url}/v1/chat/completions", json=CHAT)
    patient.get(f"{server.url}/v1/nothing/{'x' * 50}")
    text = patient.get(f"{server.url}/metrics").text
    assert "streamjax_cache_bytes 1.048576e+06" in text
    assert 'streamjax_requests_total{finish_reason="stop"} 3.0' in text
    assert re.search(r'streamjax_http_responses_total{path="/v1/chat/completions",status="200"} [1-9]', text)
    assert re.search(r'streamjax_http_responses_total{path="other",status="404"} [1-9]', text)
    assert re.search(r"streamjax_time_to_first_token_seconds_count [1-9]", text)
    assert re.search(r"streamjax_time_between_tokens_seconds_count [1-9]", text)


def test_the_end_cancels_what_does_not_end_and_closes_the_engine():
    engine, service = fake_service()
    engine.answer, engine.pause = (lambda request: "x" * 100_000), 0.02
    with serving(engine, service) as running:
        body = {**CHAT, "max_tokens": 100_000, "stream": True}

        def ask():
            with (
                pytest.raises(httpx.HTTPError),
                patient.stream("POST", f"{running.url}/v1/chat/completions", json=body) as answer,
            ):
                list(answer.iter_lines())

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: engine.tickets)
    asking.join(PATIENCE)
    assert engine.closed
    assert engine.tickets[0].cancelled.is_set()

"""OpenAI's batch files: requests in, a line each, and answers out, in any order, of which none is made twice."""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Line:
    """A request of a file: its name there, the endpoint that it is for, and the endpoint's fields."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> list[Line]:
    """All requests of a file.

    Raises:
      ValueError: it cannot be read, or a line is no request; names the line.
    """
    found: dict[str, Line] = {}
    for number, text in enumerate(_text(path).splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = _request(json.loads(text))
            if line.custom_id in found:
                raise ValueError(f"custom_id {line.custom_id[:64]!r} stands in an earlier line too")
        except (ValueError, RecursionError) as error:
            what = "it is no JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else str(error)
            raise ValueError(f"{path}, line {number}: {what}") from error
        found[line.custom_id] = line
    if not found:
        raise ValueError(f"{path}: there is no request in it")
    return list(found.values())


def _request(value: Any) -> Line:
    if not isinstance(value, dict):
        raise ValueError("a request is an object with custom_id, method, url and body")
    name, url, body = value.get("custom_id"), value.get("url"), value.get("body")
    if not isinstance(name, str) or not name:
        raise ValueError("custom_id must be a string that is not empty")
    if value.get("method", "POST") != "POST":
        raise ValueError(f"method must be 'POST', not {str(value['method'])[:64]!r}")
    if url not in (CHAT, COMPLETION):
        raise ValueError(f"url must be {CHAT!r} or {COMPLETION!r}, not {str(url)[:64]!r}")
    if not isinstance(body, dict):
        raise ValueError("body must be an object: the endpoint's fields")
    return Line(name, url, body)


def answered(path: Path) -> set[str]:
    """Names of the requests that a file of answers has; a last line that was cut short is taken out of the file.

    Raises:
      ValueError: it cannot be read, or it is no file of answers.
    """
    if not path.exists():
        return set()
    text = _text(path)
    whole = text[: text.rfind("\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found.add(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: it is no answer to a request; name another file for the answers"
            ) from error
    if len(whole) < len(text):
        with path.open("r+b") as file:
            file.truncate(len(whole.encode()))
    return found


def answer_line(custom_id: str, status: int, body: dict[str, Any]) -> str:
    """A line of a file of answers."""
    response = {"status_code": status, "request_id": f"req_{secrets.token_hex(12)}", "body": body}
    line = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text in UTF-8") from error

"""Hostile queries of the search page, in process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.inputs import TEXTS
from tests.fuzz.rule import cases, result_or_error
from tmass_dist.retrieval.searcher import Searcher, open_searcher
from tmass_dist.web.app import make_app
from tmass_dist.web.service import Service

PARTS = st.binary(max_size=12) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
NUMBERS = st.integers(-3, 200).map(lambda number: str(number).encode()) | st.sampled_from(
    [b"1e3", b"+1", b"9" * 40, b"\xd9\xa1"]
)
PATHS = st.sampled_from(
    ["/", "/api", "/api/state", "/api/search", "/api/similar", "/static/", "/thumbnail/", "/video/"]
)
HEADERS = st.dictionaries(
    st.sampled_from(["host", "range", "origin", "accept", "x"]), st.binary(max_size=20), max_size=2
)


@pytest.fixture(scope="module")
def searcher(gallery: Path) -> Searcher:
    found = open_searcher(gallery)
    found.search(["warm"], 1)
    return found


def _ask(
    searcher: Searcher, path: bytes, query: bytes, headers: dict[str, bytes], method: str
) -> tuple[int, str, bytes]:
    """Status, type of the content and body of one request to the application."""
    service = Service(lambda: searcher)
    app = make_app(service, ["localhost"])
    sent: list[Any] = []
    received = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return received.pop() if len(received) > 1 else received[0]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path.decode("utf-8", "replace"),
        "raw_path": path,
        "root_path": "",
        "query_string": query,
        "headers": [(name.encode(), value) for name, value in ({"host": b"localhost"} | headers).items()],
        "server": ("localhost", 80),
        "client": ("127.0.0.1", 9),
    }

    async def run() -> None:
        service._run()  # what start() runs in a thread
        await app(scope, receive, send)

    try:
        asyncio.run(run())
    except Exception:
        # Starlette answers 500 and then raises the error for the server's log.
        if not sent or sent[0].get("status") != 500:
            raise
    body = b"".join(message.get("body", b"") for message in sent[1:])
    kind = dict(sent[0]["headers"]).get(b"content-type", b"").decode()
    return sent[0]["status"], kind, body[:4000]


@given(
    path=PATHS,
    rest=st.lists(PARTS, max_size=3),
    query=st.lists(st.tuples(st.sampled_from([b"q", b"k", b"row", b"name", b"x"]), PARTS | NUMBERS), max_size=4),
    headers=HEADERS,
    method=st.sampled_from(["GET", "GET", "GET", "HEAD", "POST", "OPTIONS", "X"]),
)
@cases(350)
def test_any_request_is_answered(
    searcher: Searcher, path: str, rest: list[bytes], query: list[tuple[bytes, bytes]], headers: dict, method: str
) -> None:
    """Never by status 500, never by what was sent as markup, and errors are JSON of one line."""
    whole = path.encode() + b"/".join(rest)
    text = "&".join(f"{key.decode()}={quote_from_bytes(value)}" for key, value in query).encode()
    status, kind, body = result_or_error(
        "request to the search page", lambda: _ask(searcher, whole, text, headers, method)
    )
    assert status in (200, 206, 304, 307, 400, 404, 405, 416), (status, body)
    if kind.startswith("application/json") and method != "HEAD":
        answer = json.loads(body)
        assert (status == 200) != ("error" in answer) and "Traceback" not in body.decode()


@given(query=TEXTS | st.text(max_size=300), k=st.integers(0, 120), name=st.none() | TEXTS)
@cases(150)
def test_a_search_finds_what_the_searcher_finds(searcher: Searcher, query: str, k: int, name: str | None) -> None:
    parts = {"q": query, "k": str(k)} | ({"name": name} if name is not None else {})
    text = "&".join(f"{key}={quote_from_bytes(value.encode('utf-8', 'replace'))}" for key, value in parts.items())
    clean, clean_name = (value.encode("utf-8", "replace").decode() for value in (query, name or ""))

    def work() -> tuple[int, list[str], list[str]]:
        status, _, body = _ask(searcher, b"/api/search", text.encode(), {}, "GET")
        found = [result["id"] for result in json.loads(body)["results"]] if status == 200 else []
        expected = []
        if status == 200:
            [results] = searcher.search([clean], k, name=clean_name or None)
            expected = [result.id for result in results]
        return status, found, expected

    result = result_or_error("search of the page", work)
    assert result is not None
    status, found, expected = result
    assert found == expected and (status == 200 or (status == 400 and (not 1 <= k <= 100 or not clean.strip())))

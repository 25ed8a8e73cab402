"""The search page: its JSON interface over HTTP, and the page itself in a headless Chromium."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from tests.conftest import ROOT, run
from tests.processes import until
from tmass_dist import TMass
from tmass_dist.config import load_config
from tmass_dist.models.tmass import build_model
from tmass_dist.retrieval import build
from tmass_dist.retrieval.searcher import open_searcher
from tmass_dist.retrieval.videos import files_of
from tmass_dist.web import service
from tmass_dist.web.app import make_app

CLIPS = ROOT / "tests" / "clips"
HOSTILE = '<img src=x onerror="document.title=1">.mp4'


class Server:
    """``tmass serve`` in a process of its own, on a port of its own."""

    def __init__(self, gallery: Path, *options: str) -> None:
        command = [sys.executable, "-m", "tmass_dist", "serve", str(gallery), "--port", "0", *options]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.url = self.first_line.split()[0].rstrip("/") if self.first_line.startswith("http") else ""

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def json(self, path: str, **parameters: Any) -> tuple[int, dict[str, Any]]:
        status, _, body = self.get(f"{path}?{urllib.parse.urlencode(parameters)}")
        return status, json.loads(body)

    def wait(self) -> None:
        """Until the model is loaded."""
        until(lambda: self.json("/api/state")[1]["state"] != "loading", "model")

    def stop(self) -> str:
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=180)[0]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files: H.264, which browsers play; one in a container that they do not; a name that is markup."""
    base = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    config = load_config("demo.yaml")
    TMass.of_weights(config, build_model(config.model).state_dict(), "this test").save_pretrained(base / "model")
    videos = base / "videos"
    videos.mkdir()
    for name, target in (
        ("gradio_a.mp4", "a.mp4"),
        ("pyfeat_no_face.mp4", HOSTILE),
        ("pyfeat_single_face.mp4", "later-gone.mp4"),
        ("opencv_tree.avi", "tree.avi"),
    ):
        shutil.copy(CLIPS / name, videos / target)
    model = TMass.from_pretrained(base / "model")
    build.update(model, str(base / "model"), base / "gallery", files_of(videos))
    (videos / "later-gone.mp4").unlink()
    (base / "secret.txt").write_text("not to be served")
    return base / "gallery"


@pytest.fixture(scope="module")
def server(gallery: Path) -> Iterator[Server]:
    started = Server(gallery)
    started.wait()
    yield started
    printed = started.stop()
    assert "Traceback" not in printed, printed


def test_a_search_over_http_is_that_of_the_command(server: Server, gallery: Path) -> None:
    status, answer = server.json("/api/search", q="a face", k=3)
    expected = open_searcher(gallery).search(["a face"], k=3)[0]
    assert status == 200 and answer["query"] == "a face" and answer["videos"] == 4
    assert answer["labels"]["noise"] == "seed 0, caption text and trial"
    assert "noise keyed by seed 0, caption text and trial" in answer["label"]
    assert [(r["id"], r["row"], r["frame"]) for r in answer["results"]] == [(r.id, r.row, r.frame) for r in expected]
    for result in answer["results"]:
        assert len(result["thumbnails"]) == len(result["attention"]) == len(result["times_s"]) == 12
        status, headers, body = server.get(result["thumbnails"][result["frame"]])
        assert status == 200 and headers["content-type"] == "image/jpeg" and body[:2] == b"\xff\xd8"


def test_only_files_that_a_browser_may_play_and_that_exist_have_a_video(server: Server) -> None:
    _, answer = server.json("/api/search", q="x", k=10)
    assert answer["absent"] == 1
    assert {r["id"] for r in answer["results"] if r["video"]} == {"a.mp4", HOSTILE}


def test_videos_are_served_whole_and_in_ranges(server: Server) -> None:
    _, answer = server.json("/api/search", q="x", name="a.mp4", k=10)
    [video] = [r["video"] for r in answer["results"] if r["id"] == "a.mp4"]
    content = (CLIPS / "gradio_a.mp4").read_bytes()
    status, headers, body = server.get(video)
    assert (status, body, headers["content-type"]) == (200, content, "video/mp4")
    status, headers, body = server.get(video, Range="bytes=1000-1999")
    assert (status, body) == (206, content[1000:2000])
    assert headers["content-range"] == f"bytes 1000-1999/{len(content)}"
    assert server.get(video, Range=f"bytes={len(content)}-")[0] == 416
    assert server.get(video, Range="bytes=a-b")[0] == 400


def test_more_like_this_leaves_the_video_itself_out(server: Server) -> None:
    _, answer = server.json("/api/search", q="x", k=1)
    [first] = answer["results"]
    status, similar = server.json("/api/similar", row=first["row"], k=10)
    assert status == 200 and similar["similar_to"] == first["id"]
    assert len(similar["results"]) == 3 and first["id"] not in {r["id"] for r in similar["results"]}


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/search", 400, "the query is empty"),
        ("/api/search?q=%20%20", 400, "the query is empty"),
        ("/api/search?q=" + "x" * 100_000, 400, "100000 characters"),
        ("/api/search?q=x&k=0", 400, "from 1 to 100"),
        ("/api/search?q=x&k=101", 400, "from 1 to 100"),
        ("/api/search?q=x&k=99999999999", 400, "from 1 to 100"),
        ("/api/search?q=x&k=%C2%B2", 400, "from 1 to 100"),
        ("/api/search?q=x&k=00000101", 400, "from 1 to 100"),
        ("/api/search?q=x&k=00000" + "1" * 5000, 400, "from 1 to 100"),
        ("/api/similar?row=-1", 400, "row is the number"),
        ("/api/similar?row=99999", 404, "there is no video 99999"),
        ("/video/2000000", 404, "there is no video"),
        ("/thumbnail/0/12.jpg", 404, "there is no frame 12"),
        ("/thumbnail/9/0.jpg", 404, "there is no video 9"),
        ("/thumbnail/" + "1" * 5000 + "/0.jpg", 404, ""),
        ("/thumbnail/0/" + "1" * 5000 + ".jpg", 404, ""),
        ("/video/" + "1" * 5000, 404, ""),
        ("/static/../app.py", 404, ""),
        ("/static/%2e%2e/app.py", 404, ""),
        ("/video/../../secret.txt", 404, ""),
        ("/video/..%2f..%2fsecret.txt", 404, ""),
        ("/nothing", 404, ""),
    ],
)
def test_bad_requests_get_the_right_status_and_one_line(server: Server, path: str, status: int, said: str) -> None:
    got, _, body = server.get(path)
    error = json.loads(body)["error"]
    assert got == status and said in error and "\n" not in error and "not to be served" not in error


def test_a_video_whose_file_is_gone_is_not_found(server: Server) -> None:
    _, answer = server.json("/api/search", q="x", name="later-gone")
    [result] = answer["results"]
    assert result["id"] == "later-gone.mp4" and result["video"] is None
    status, _, body = server.get(f"/video/{result['row']}")
    assert status == 404 and "no longer exists" in json.loads(body)["error"]


def test_a_gallery_that_names_other_files_does_not_serve_them(gallery: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not to be served")
    (tmp_path / "link.mp4").symlink_to(secret)
    copy = shutil.copytree(gallery, tmp_path / "gallery")
    [part] = copy.glob("part-*.json")
    about = json.loads(part.read_text())
    about["videos"][0]["path"], about["videos"][1]["path"] = str(secret), str(tmp_path / "link.mp4")
    part.write_text(json.dumps(about))
    server = Server(copy)
    try:
        server.wait()
        for row in (0, 1):
            status, _, body = server.get(f"/video/{row}")
            assert status == 404 and "no video file of the gallery" in json.loads(body)["error"]
        assert [r["video"] for r in server.json("/api/search", q="x", k=4)[1]["results"] if r["row"] < 2] == [None] * 2
    finally:
        server.stop()


def test_more_searches_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "WORKERS", 2)
    monkeypatch.setattr(service, "MAX_WAITING", 3)
    busy, done = service.Service(lambda: pytest.fail("not loaded here")), threading.Event()

    async def ask_for(number: int) -> list[str]:
        answers = []

        async def ask() -> None:
            try:
                answers.append(await busy.run(lambda: "found" if done.wait(60) else "too late"))
            except service.BusyError as error:
                answers.append(str(error))
                done.set()

        async with anyio.create_task_group() as group:
            for _ in range(number):
                group.start_soon(ask)
        return answers

    assert sorted(anyio.run(ask_for, 6)) == ["found"] * 5 + ["too many searches at once; try again in a moment"]
    assert anyio.run(ask_for, 5) == ["found"] * 5  # there is room again


@pytest.mark.parametrize("cut_off_at", ["search", "answer"])
def test_a_request_that_the_end_of_the_server_cuts_off_leaves_no_traceback(cut_off_at: str) -> None:
    waits = service.Service(lambda: pytest.fail("not loaded here"))
    sent: list[Any] = []

    async def cut_off() -> None:
        reached = asyncio.Event()

        async def forever(*_: Any) -> Any:
            reached.set()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if cut_off_at == "answer" and message["type"] == "http.response.body":
                await forever()  # a video that nobody reads on
            sent.append(message)

        waits.search = forever  # type: ignore[method-assign]
        path = "/api/search" if cut_off_at == "search" else "/api"
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"q=x", "headers": [(b"host", b"x")]}
        task = asyncio.create_task(make_app(waits, ["*"])(scope, forever, send))
        await reached.wait()
        task.cancel()
        await task  # it raises nothing, which uvicorn would log

    asyncio.run(cut_off())
    assert sent[0]["status"] == (503 if cut_off_at == "search" else 200)
    assert len(sent) == (2 if cut_off_at == "search" else 1)


def test_ctrl_c_while_the_model_loads_is_one_line(gallery: Path) -> None:
    code = f"""
import os, signal, sys
import torch
from tmass_dist import serve
from tmass_dist.cli import run_command
from tmass_dist.retrieval import searcher

def load(*_):
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        torch.randn(64, 64) @ torch.randn(64, 64)

searcher.open_searcher = load
sys.argv = ["serve", {str(gallery)!r}, "--port", "0"]
run_command(serve.main)
"""
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_unicode_and_markup_are_only_text(server: Server) -> None:
    for query in ("圆 🎈", "<script>alert(1)</script>", "%00 \x00 ' \" ; --"):
        status, answer = server.json("/api/search", q=query, k=1)
        assert status == 200 and answer["query"] == query.strip()


def test_another_host_name_is_refused_on_loopback(server: Server) -> None:
    assert server.get("/api/state", Host="evil.example")[0] == 400
    assert server.get("/api/state", Host=server.url.removeprefix("http://"))[0] == 200


def test_many_clients_at_once_get_their_own_answers(server: Server) -> None:
    answers: dict[str, list[Any]] = {}

    def ask(query: str) -> None:
        answers[query] = [server.json("/api/search", q=query, k=4) for _ in range(3)]

    threads = [threading.Thread(target=ask, args=(f"query number {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for query, all_of_one in answers.items():
        first = all_of_one[0][1]["results"]
        for status, answer in all_of_one:
            assert status == 200 and answer["query"] == query
            assert [r["id"] for r in answer["results"]] == [r["id"] for r in first]
            # Texts that come together are encoded together, so the last digit may differ.
            assert [r["score"] for r in answer["results"]] == pytest.approx([r["score"] for r in first], abs=1.5e-4)


def test_the_page_answers_while_the_model_loads_and_after_it_failed(gallery: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(gallery, tmp_path / "gallery")
    about = json.loads((copy / "gallery.json").read_text())
    (copy / "gallery.json").write_text(json.dumps(about | {"model": str(tmp_path / "moved away")}))
    server = Server(copy)
    try:
        assert server.get("/")[0] == 200
        status, answer = server.json("/api/search", q="x")
        assert status == 503 and ("loading" in answer["error"] or "there is no model" in answer["error"])
        server.wait()
        assert server.get("/")[0] == 200
        assert "there is no model" in server.json("/api/state")[1]["message"]
        assert server.json("/api/search", q="x")[0] == 503
    finally:
        server.stop()


def test_an_empty_gallery_says_how_to_fill_it(gallery: Path, tmp_path: Path) -> None:
    about = json.loads((gallery / "gallery.json").read_text())
    model = TMass.from_pretrained(about["model"])
    build.update(model, about["model"], tmp_path / "empty", [])
    server = Server(tmp_path / "empty")
    try:
        server.wait()
        assert "tmass index" in server.json("/api/state")[1]["message"]
        assert server.json("/api/search", q="x")[1]["results"] == []
    finally:
        server.stop()


def test_a_port_in_use_no_gallery_and_a_bad_host_are_one_line(gallery: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, said in (
            ([str(gallery), "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            ([str(gallery), "--port", "99999"], "--port is 99999"),
            ([str(gallery), "--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
            ([str(tmp_path)], "there is no gallery in"),
            ([str(gallery), "--candidates", "0"], "--candidates is 0"),
        ):
            done = run("-m", "tmass_dist", "serve", *arguments)
            assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_open_host_is_announced(gallery: Path) -> None:
    server = Server(gallery, "--host", "0.0.0.0")
    assert server.process.stdout is not None
    printed = server.process.stdout.readline()
    server.stop()
    assert "Everyone who reaches 0.0.0.0:" in printed and "no password" in printed


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page, loaded; whatever its console says is an error of the test."""
    opened = browser.new_page(viewport={"width": 1200, "height": 800})
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server.url)
    opened.wait_for_function("() => document.querySelector('#status').textContent.includes('4 videos')")
    yield opened
    assert not said
    opened.close()


def _search(page: Any, query: str) -> None:
    page.fill("#query", query)
    page.press("#query", "Enter")
    page.wait_for_function("q => document.querySelector('#status').textContent.includes('“' + q + '”')", arg=query)


def test_typing_a_query_shows_results_and_a_click_plays_at_the_moment(page: Any, server: Server) -> None:
    _search(page, "a person speaks")
    assert page.locator(".card").count() == 4
    _, answer = server.json("/api/search", q="a person speaks")
    place, result = next((n, r) for n, r in enumerate(answer["results"]) if r["id"] == "a.mp4")
    card = page.locator(".card").nth(place)
    assert card.locator(".id").text_content() == "a.mp4"
    assert card.locator(".score").text_content() == f"{result['score']:.3f}"
    assert card.locator(".attention button").count() == 12
    card.locator(".media").click()
    page.wait_for_function(
        "() => { const v = document.querySelector('video'); return v && v.readyState >= 2 && !v.seeking }"
    )
    now, duration = page.evaluate(
        "[document.querySelector('video').currentTime, document.querySelector('video').duration]"
    )
    assert result["time_s"] - 0.1 <= now <= min(duration, result["time_s"] + 5)
    bar = card.locator(".attention button").nth(0)
    bar.click()
    page.wait_for_function("t => document.querySelector('video').currentTime < t + 3", arg=result["times_s"][0])


def test_a_file_that_the_browser_cannot_play_is_shown_by_its_frames(page: Any, server: Server) -> None:
    _search(page, "a tree")
    _, answer = server.json("/api/search", q="a tree")
    place = next(n for n, r in enumerate(answer["results"]) if r["id"] == "tree.avi")
    media = page.locator(".card").nth(place).locator(".media")
    media.click()
    page.wait_for_function("n => document.querySelectorAll('.media')[n].classList.contains('slides')", arg=place)
    first = media.locator("img").get_attribute("src")
    page.wait_for_function(
        "([n, s]) => document.querySelectorAll('.media')[n].querySelector('img').getAttribute('src') !== s",
        arg=[place, first],
    )


def test_markup_in_names_and_queries_stays_text(page: Any) -> None:
    _search(page, "<b>bold</b>")
    assert HOSTILE in page.locator(".id").all_text_contents()
    assert page.locator("#status b").count() == 0 and page.locator(".id img").count() == 0
    assert page.title() == "Video search"


def test_the_keyboard_the_filter_and_more_like_this(page: Any) -> None:
    _search(page, "x")
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("[...document.querySelectorAll('.card')].indexOf(document.activeElement)") == 1
    name = page.locator(".card").nth(1).locator(".id").text_content()
    page.keyboard.press("m")
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Videos like')")
    assert name in page.locator("#status").text_content() and page.locator(".card").count() == 3
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.fill("#name", "TREE")
    page.press("#name", "Enter")
    page.wait_for_function("() => document.querySelectorAll('.card').length === 1")
    assert page.locator(".id").text_content() == "tree.avi"
    page.reload()  # the address keeps the search
    page.wait_for_function("() => document.querySelectorAll('.card').length === 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_column_without_scrolling_sideways(browser: Any, server: Server, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 700}, color_scheme=scheme)
    page.goto(f"{server.url}/?q=x&k=5")
    page.wait_for_selector(".card")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert len({page.locator(".card").nth(n).bounding_box()["x"] for n in range(4)}) == 1
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(250, 250, 250)") == (scheme == "light")
    page.close()

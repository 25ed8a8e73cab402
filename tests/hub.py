"""A Hugging Face Hub on this machine: the requests by which ``huggingface_hub`` uploads and downloads."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_this_test"


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory, with one commit each. Uploads need ``TOKEN``."""

    files: dict[str, bytes]
    """Content by path: ``organisation/name/file``."""
    status = 200
    """Of the downloads, if it is not 200."""
    requests: list[str]
    stored: dict[str, bytes]
    """Large files by their SHA-256, uploaded before the commit that names them."""
    repositories: set[str]

    def do_HEAD(self) -> None:
        self._download(with_body=False)

    def do_GET(self) -> None:
        self._download(with_body=True)

    def _download(self, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        repository, name = found.groups() if found else ("", "")
        content = self.files.get(f"{repository}/{name}")
        if content is not None and self.status == 200:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)
            return
        known = any(path.startswith(f"{repository}/") for path in self.files) and self.status == 200
        self.send_response(self.status if self.status != 200 and found else 404)
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        body = self._body()
        if self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'user'}/{asked['name']}"
            exists = repository in self.repositories
            self.repositories.add(repository)
            self._answer({"url": f"{self._address}/{repository}", "name": repository}, 409 if exists else 200)
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            self._answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes)
                    ]
                }
            )
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self._address}/store/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[f"{found[1]}/{value['path']}"] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.files[f"{found[1]}/{value['path']}"] = self.stored[value["oid"]]
            self._answer({"commitUrl": f"{self._address}/{found[1]}/commit/{'a' * 40}", "commitOid": "a" * 40})
        else:
            self._answer({"error": f"nothing at {self.path}"}, 404)

    def do_PUT(self) -> None:
        self.requests.append(f"PUT {self.path}")
        content = self._body()
        oid = hashlib.sha256(content).hexdigest()
        self.stored[oid] = content
        self._answer({}, 200 if self.path == f"/store/{oid}" else 400)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def running_hub(files: dict[str, bytes] | None = None) -> Iterator[tuple[str, type[Hub]]]:
    """Address of a Hub that holds ``files``, and its handler."""
    state = {"files": dict(files or {}), "requests": [], "stored": {}, "repositories": set()}
    handler = type("OneHub", (Hub,), state)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()

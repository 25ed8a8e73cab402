"""An HTTP server on loopback that serves a directory and, when told to, fails in the ways of real stores."""

import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer:
    """Serves ``directory``; ``faults[name]`` lists what the next requests for a file get in place of the file.

    Faults: ``cut`` closes the connection in the middle, ``stall`` sends half and waits, ``500`` and ``403`` are
    statuses, ``short`` announces and sends half, ``long`` announces and sends twice the file, ``endless`` never ends,
    ``corrupt`` flips a byte. The fault ``always NAME`` stays.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        """Requests by file name."""
        self.stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                server.answer(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.rsplit("/", 1)[-1]
        self.requests[name] += 1
        path = self.directory / handler.path.lstrip("/")
        fault = self.faults[name][0] if self.faults[name] else ""
        if fault.startswith("always "):
            fault = fault.removeprefix("always ")
        elif fault:
            self.faults[name].pop(0)
        if fault in ("500", "403") or not path.is_file():
            handler.send_response(int(fault or 404))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        content = path.read_bytes()
        half = len(content) // 2
        if fault == "corrupt":
            content = content[:half] + bytes([content[half] ^ 0xFF]) + content[half + 1 :]
        content = {"short": content[:half], "long": content * 2}.get(fault, content)
        handler.send_response(200)
        if fault == "endless":
            handler.send_header("Connection", "close")
        else:
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        try:
            if fault in ("cut", "stall"):
                handler.wfile.write(content[:half])
                handler.wfile.flush()
                self.stopped.wait(60 if fault == "stall" else 0)
                handler.close_connection = True
            elif fault == "endless":
                while not self.stopped.is_set():
                    handler.wfile.write(bytes(100_000))
                    time.sleep(0.001)
            else:
                handler.wfile.write(content)
        except OSError:  # the client closed the connection
            handler.close_connection = True

    def close(self) -> None:
        self.stopped.set()
        self.http.shutdown()
        self.http.server_close()

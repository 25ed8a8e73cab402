"""Search a gallery in the browser: ``python -m tmass_dist.serve GALLERY``.

The server is reachable from this machine only, unless ``--host`` is given. ``/api`` describes its JSON interface.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from tmass_dist.cli import INTERRUPTED, program, run_command
from tmass_dist.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: the port is in use or may not be used, or there is no such host.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
        return listener
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}; choose another --port or --host") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.serve"), description=__doc__)
    parser.add_argument("gallery", type=Path, help="a gallery of tmass index, or a run directory (its test split)")
    parser.add_argument("--model", help="the model, if it is not where it was when the gallery was made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8642, help="0: any free one (8642)")
    parser.add_argument(
        "--candidates",
        type=int,
        default=2000,
        help="most videos, those with the best frames, that are considered (2000)",
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    arguments = parser.parse_args()
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise UserError(f"the page needs {error.name}: pip install 'tmass-dist[serve]'") from error
    from tmass_dist.retrieval.gallery import read_gallery
    from tmass_dist.web.app import make_app
    from tmass_dist.web.service import Service

    if not (arguments.gallery / "config.yaml").is_file():
        read_gallery(arguments.gallery)
    if arguments.candidates < 1:
        raise UserError(f"--candidates is {arguments.candidates}; at least 1")

    def load():
        import torch

        from tmass_dist.retrieval.searcher import open_searcher

        torch.set_num_threads(1)  # several searches run side by side
        return open_searcher(arguments.gallery, arguments.model, arguments.candidates)

    listener = listen(arguments.host, arguments.port)
    port = listener.getsockname()[1]
    is_local = arguments.host in LOOPBACK
    service = Service(load)
    hosts = [*LOOPBACK, "[::1]", "["] if is_local else ["*"]
    name = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    print(f"http://{name}:{port}/  (Ctrl-C ends the server)", flush=True)
    if not is_local:
        print(
            f"Everyone who reaches {name}:{port} can search and watch the videos of {arguments.gallery}. "
            "There is no password and no encryption.",
            flush=True,
        )
    config = uvicorn.Config(
        make_app(service, hosts),
        log_level="warning",
        http="h11",
        lifespan="off",  # the application has none; a second Ctrl-C would leave its traceback
        server_header=False,
        # Room for a query that is far too long, so that it gets an answer that says so.
        h11_max_incomplete_event_size=1 << 20,
        timeout_graceful_shutdown=2,
    )
    try:
        service.start()
        if arguments.open:
            import webbrowser

            webbrowser.open(f"http://{name}:{port}/")
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # the end of Python would abort in the thread that loads the model


if __name__ == "__main__":
    run_command(main)

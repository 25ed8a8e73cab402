"""Files behind a URL, copied to this machine: a copy is complete and checked, or it does not exist."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import random
import time
from pathlib import Path
from typing import Any

from tmass_dist.errors import UserError

RETRY_S = 300.0
"""Default of ``data.retry_s``."""
STALL_S = 30.0
"""A connection that gives no byte for so long (or for a quarter of ``data.retry_s``) is closed, and tried again."""
SLOWEST = 50_000
"""Bytes per second, on average; a download that is slower is stopped and starts again."""
UNKNOWN_LIMIT = 2**31
"""Most bytes of a file whose size is not known beforehand (an index)."""


class DownloadError(OSError):
    """A file could not be downloaded for ``data.retry_s``: the network or the store failed. A later start may help."""


class _TooLargeError(Exception):
    """The store sends more bytes than the index says."""


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL."""
    return "://" in path


def cached_path(url: str, cache: str | None) -> Path:
    """Where the local copy of ``url`` is kept: a subdirectory of ``cache`` for each directory of URLs.

    Raises:
        UserError: ``cache`` is not set.
    """
    if cache is None:
        raise UserError(f"{url} is a URL: set data.cache to the directory for its shards")
    directory, name = url.rsplit("/", 1)
    return Path(cache).expanduser() / hashlib.sha256(directory.encode()).hexdigest()[:16] / name


def fetch(
    url: str,
    cache: str | None,
    size: int | None = None,
    sha256: str | None = None,
    *,
    retry_s: float = RETRY_S,
    verify: bool = False,
) -> Path:
    """The local copy of ``url``, downloaded if it does not exist. Any number of processes may call it at once.

    Args:
        url: anything that fsspec opens; ``s3://`` needs ``pip install s3fs``.
        cache: directory of the local copies.
        size, sha256: expected size in bytes and checksum. Without them the file is downloaded at each call.
        retry_s: seconds for which a download that fails is tried again.
        verify: compare the checksum of an existing copy, and download it again if it differs.

    Raises:
        UserError: the file does not exist, or is not the file that the index describes.
        DownloadError: the download failed for ``retry_s`` seconds.
    """
    import filelock

    path, deadline = cached_path(url, cache), time.monotonic() + retry_s
    if not verify and _is_complete(path, size):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if _is_complete(path, size) and not (verify and sha256_of(path) != sha256):
            return path  # another process has just downloaded it
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # of a killed process: we have the lock
            unfinished.unlink(missing_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            download(url, temporary, size, sha256, max(0.0, deadline - time.monotonic()))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _is_complete(path: Path, size: int | None) -> bool:
    return size is not None and path.is_file() and path.stat().st_size == size


def download(url: str, path: Path, size: int | None, sha256: str | None, retry_s: float) -> None:
    """Download ``url`` to ``path``; a download that fails is tried again, after growing pauses.

    The same wrong content twice is taken for another file, not for a fault of the transfer.

    Raises:
        UserError: the file does not exist, is not the file that the index describes, or fsspec cannot open the URL.
        DownloadError: the download failed for ``retry_s`` seconds.
    """
    began, pause, wrong = time.monotonic(), 0.5, ""
    while True:
        try:
            _download_once(url, path, size, max(1.0, min(STALL_S, retry_s / 4)))
            checksum = sha256_of(path) if sha256 is not None else None
            if size is not None and path.stat().st_size < size:
                raise OSError(f"the store sent {path.stat().st_size} of {size} bytes")
            if checksum == sha256:
                return
            fault = f"its checksum is {checksum}"
        except FileNotFoundError as error:
            raise UserError(f"{url} does not exist") from error
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}") from error
        except _TooLargeError:
            fault = f"it has more than {size or UNKNOWN_LIMIT} bytes"
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            waited = time.monotonic() - began
            if waited + pause > retry_s:
                raise DownloadError(f"{url} cannot be downloaded, tried for {waited:.0f} s: {reason}") from error
            logging.getLogger("tmass_dist").warning("%s: %s; trying again in %.1f s", url, reason, pause)
            time.sleep(pause * random.uniform(0.7, 1.0))  # not all processes at once
            pause = min(2 * pause, 30.0)
            continue
        if fault == wrong:
            raise UserError(f"{url} is not the file that its index describes: {fault}; upload the whole split again")
        wrong = fault


def _download_once(url: str, path: Path, size: int | None, stall_s: float) -> None:
    import fsspec

    limit, deadline = size or UNKNOWN_LIMIT, time.monotonic() + stall_s + (size or UNKNOWN_LIMIT) / SLOWEST

    class Progress(fsspec.Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit:
                raise _TooLargeError
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.value} bytes arrived so far: slower than {SLOWEST} bytes per second")

    # fsspec keeps file systems, and one that was created before a fork does not work after it.
    system, inside = fsspec.core.url_to_fs(url, skip_instance_cache=True, **_timeouts(url, stall_s))
    system.get_file(inside, str(path), callback=Progress())
    if path.stat().st_size > limit:  # not every file system reports its progress
        raise _TooLargeError


def _timeouts(url: str, stall_s: float) -> dict[str, Any]:
    """Options of fsspec's file system that end a connection which gives no bytes."""
    protocol = url.split("://")[0]
    if protocol in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=stall_s, sock_read=stall_s)}}
    if protocol in ("s3", "s3a"):
        retries = {"max_attempts": 1}  # we try again ourselves
        return {"config_kwargs": {"connect_timeout": stall_s, "read_timeout": stall_s, "retries": retries}}
    return {}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Files behind a URL, copied to this machine: a copy is complete and checked, or it does not exist."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from tmass_dist.errors import UserError

TRIES = 3


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URL."""
    return "://" in path


def fetch(url: str, cache: str | None, size: int | None = None, sha256: str | None = None) -> Path:
    """The local copy of ``url``, downloaded if it does not exist. Any number of processes may call it at once.

    Args:
        url: anything that fsspec opens; ``s3://`` needs ``pip install s3fs``.
        cache: directory of the local copies.
        size, sha256: expected size in bytes and checksum. Without them the file is downloaded at each call.

    Raises:
        UserError: one line: the file cannot be downloaded, or is not the file that the index describes.
    """
    import filelock

    if cache is None:
        raise UserError(f"{url} is a URL: set data.cache to the directory for its shards")
    directory, name = url.rsplit("/", 1)
    path = Path(cache).expanduser() / hashlib.sha256(directory.encode()).hexdigest()[:16] / name
    if size is not None and path.is_file() and path.stat().st_size == size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if size is not None and path.is_file() and path.stat().st_size == size:
            return path  # another process has just downloaded it
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            _download(url, temporary)
            if sha256 is not None and sha256_of(temporary) != sha256:
                raise UserError(f"{url} is not the file that its index describes; upload the whole split again")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path) -> None:
    import fsspec

    for attempt in range(1, TRIES + 1):
        try:
            # fsspec keeps file systems, and one that was created before a fork does not work after it.
            system, inside = fsspec.core.url_to_fs(url, skip_instance_cache=True)
            system.get_file(inside, str(path))
            return
        except FileNotFoundError as error:
            raise UserError(f"{url} does not exist") from error
        except Exception as error:
            if attempt == TRIES:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{url} cannot be downloaded, after {TRIES} tries: {reason}") from error
            time.sleep(attempt)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

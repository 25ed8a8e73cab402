"""Files behind a URL, kept on this machine: whole and checked, or absent."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from tmass_dist.errors import UserError

TRIES = 3


def is_remote(path: str) -> bool:
    return "://" in path


def fetch(url: str, cache: str | None, size: int | None = None, sha256: str | None = None) -> Path:
    """The local copy of ``url``, downloaded unless it is there; any number of processes may ask for it at once.

    Args:
        url: anything fsspec opens; ``s3://`` needs ``pip install s3fs``.
        cache: the directory of local copies, never cleaned by us.
        size, sha256: what the file must be; without them it is downloaded each time, as an index may have changed.

    Raises:
        UserError: in one line: it cannot be had, or is not what its index says.
    """
    import filelock

    if cache is None:
        raise UserError(f"{url} is a URL: data.cache must say where its shards are kept")
    directory, name = url.rsplit("/", 1)
    path = Path(cache).expanduser() / hashlib.sha256(directory.encode()).hexdigest()[:16] / name
    if size is not None and path.is_file() and path.stat().st_size == size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if size is not None and path.is_file() and path.stat().st_size == size:
            return path  # another process was faster
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            _download(url, aside)
            if sha256 is not None and sha256_of(aside) != sha256:
                raise UserError(f"{url} is not the file that its index describes; upload the split again, whole")
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path) -> None:
    import fsspec

    for attempt in range(1, TRIES + 1):
        try:
            # A file system made before a fork does not work after it, and so is not kept.
            system, inside = fsspec.core.url_to_fs(url, skip_instance_cache=True)
            system.get_file(inside, str(path))
            return
        except FileNotFoundError as error:
            raise UserError(f"{url} is not there") from error
        except Exception as error:
            if attempt == TRIES:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(f"{url} cannot be had, after {TRIES} tries: {reason}") from error
            time.sleep(attempt)


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
